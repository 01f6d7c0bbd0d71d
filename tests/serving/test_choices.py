"""Bytes as they come, as whole characters with what is known of each byte."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bytelatent.serving.choices import ByteInfo, ChoiceText, CompletionLogprobsWriter, token
from bytelatent.vocab import OFFSET, VOCAB_SIZE

PIECES = st.lists(st.binary(max_size=5) | st.text(max_size=3).map(str.encode), max_size=12)


def update(data: bytes, ended: str | None = None) -> Any:
    size = len(data)
    return SimpleNamespace(
        data=data,
        ids=[byte + OFFSET for byte in data],
        log_probabilities=[-float(byte) for byte in data],
        alternatives=[[(5, -1.0)]] * size,
        starts=[byte % 2 == 0 for byte in data],
        ended=ended,
    )


@given(PIECES)
def test_pieces_are_the_whole_text(pieces: list[bytes]) -> None:
    choice, writer = ChoiceText(), CompletionLogprobsWriter(1)
    text, offsets = "", []
    released = []
    for number, data in enumerate([*pieces, b""]):
        piece = choice.take([update(data, "length" if number == len(pieces) else None)])
        text += piece.text
        released += piece.bytes
        offsets += writer.write(piece.bytes)["text_offset"]
        assert (piece.finish_reason is None) == (number < len(pieces))
    whole = b"".join(pieces)
    assert text == whole.decode("utf-8", "replace")
    assert [info.byte for info in released] == list(whole)
    assert [info.log_probability for info in released] == [-float(byte) for byte in whole]
    assert choice.num_patches == sum(byte % 2 == 0 for byte in whole)
    # A slow obvious version: the character that a byte is in is the last one of the text that ends with the byte.
    expected = [len((whole[: at + 1]).decode("utf-8", "replace")) - 1 for at in range(len(whole))]
    assert offsets == expected


def test_tokens_are_all_different() -> None:
    assert len({token(id_) for id_ in range(VOCAB_SIZE)}) == VOCAB_SIZE


@given(st.binary(max_size=6) | st.text(max_size=3).map(str.encode), st.integers(0, 6), st.booleans())
def test_a_prompt_and_what_follows_are_one_text(data: bytes, cut: int, is_known: bool) -> None:
    """Also where the prompt ends within a character, and its log-probabilities are not asked for."""
    choice, prompt, rest = ChoiceText(), data[:cut], data[cut:]
    infos = [ByteInfo(byte, -1.0, (), True) for byte in prompt] if is_known else []
    pieces = [choice.echo(prompt, infos, final=False), choice.take([update(rest, "length")])]
    text = "".join(piece.text for piece in pieces)
    assert text == data.decode("utf-8", "replace")
    assert bytes(info.byte for piece in pieces for info in piece.bytes) == (data if is_known else rest)
    assert choice.num_bytes == len(rest)
    assert choice.num_patches == sum(byte % 2 == 0 for byte in rest)
    if is_known:
        writer = CompletionLogprobsWriter(0)
        offsets = [at for piece in pieces for at in writer.write(piece.bytes)["text_offset"]]
        assert all(0 <= at < len(text) for at in offsets)
        assert offsets == sorted(offsets)
