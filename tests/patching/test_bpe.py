"""The mode `bpe` on small trained tokenizers: causal, exact, and near the tokenizer's own boundaries."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings, PatchState, next_starts, patch_lengths, step
from bytelatent.vocab import encode
from tests.patching import slow
from tests.patching.conftest import PROSE
from tests.patching.streams import texts

KINDS = ["byte_level", "word_piece", "metaspace"]


def starts(ids: list[int], patching: PatchSettings) -> list[bool]:
    return next_starts(torch.tensor(ids), None, torch.arange(len(ids)), patching).tolist()


def steps(ids: list[int], patching: PatchSettings) -> list[bool]:
    state, decided = PatchState.empty(1), []
    for id_ in ids:
        state, start = step(state, torch.tensor([id_]), None, patching)
        decided.append(bool(start))
    return decided


@pytest.mark.parametrize("kind", KINDS)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, len(PROSE)), st.integers(0, 90)).map(lambda cut: PROSE[cut[0] :][: cut[1]].encode())
        | texts
        | st.binary(max_size=6),
        max_size=4,
    )
)
@example(parts=[b"\xed\xa0", b"\x80\xe2\x82", b"\xf0\x9f\x99\x82" * 20])
@example(parts=["\ufffd a \ufffd".encode(), b"\xef\xbf", b"\xef\xbf\xbd" * 22])
@example(parts=[b"\x80" * 70, b" the harbour"])
@example(parts=["e\u0301le\u0300ve \u212b \ufb01n".encode(), b"\0\0 a\0"])  # what a normalizer joins, splits or drops
def test_every_prefix_is_tokenized_again(tokenizers: dict[str, str], kind: str, parts: list[bytes]) -> None:
    patching = PatchSettings(mode="bpe", tokenizer=tokenizers[kind])
    ids = encode(b"".join(parts)).tolist()
    expected = slow.starts(ids, None, patching)[1:]
    assert starts(ids, patching) == expected
    assert steps(ids, patching) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.lists(st.integers(0, 5) | st.integers(120, 259), max_size=80))
def test_no_bytes_are_too_wrong(tokenizers: dict[str, str], kind: str, ids: list[int]) -> None:
    patching = PatchSettings(mode="bpe", tokenizer=tokenizers[kind])
    found = starts(ids, patching)
    assert found == steps(ids, patching)
    assert all(start for start, id_ in zip(found, ids, strict=True) if id_ < 4)


@pytest.mark.parametrize("kind", KINDS)
def test_boundaries_of_prose_stand_one_byte_after_the_tokenizers(tokenizers: dict[str, str], kind: str) -> None:
    patching = PatchSettings(mode="bpe", tokenizer=tokenizers[kind])
    offsets = Tokenizer.from_file(tokenizers[kind]).encode(PROSE, add_special_tokens=False).offsets
    tokens = {start for start, end in offsets if end > start}  # PROSE is ASCII: characters are bytes
    ids = encode(PROSE).tolist()
    # starts[i] is about the byte i of the text, since BOS stands before it; the first byte of token t is byte t.
    boundaries = {index - 1 for index, start in enumerate(starts(ids, patching)) if start and 1 <= index <= len(PROSE)}
    assert PROSE.isascii()
    assert len(tokens) > 300
    # A token that a later byte merges into the one before leaves a boundary of its own, so there are more boundaries
    # than tokens; those that the tokenizer finds must nearly all be among them.
    assert len(tokens & boundaries) >= 0.95 * len(tokens)
    assert len(tokens & boundaries) >= 0.6 * len(boundaries)


def test_the_limits_in_a_tokenizer_file_are_no_limits_here(tokenizers: dict[str, str], tmp_path: Path) -> None:
    limited = Tokenizer.from_file(tokenizers["byte_level"])
    limited.enable_truncation(3)
    limited.enable_padding(length=40)
    limited.save(str(tmp_path / "limited.json"))
    assert json.loads((tmp_path / "limited.json").read_text())["truncation"]["max_length"] == 3
    ids = encode(PROSE[:200]).tolist()
    unlimited = PatchSettings(mode="bpe", tokenizer=tokenizers["byte_level"])
    assert starts(ids, PatchSettings(mode="bpe", tokenizer=str(tmp_path / "limited.json"))) == starts(ids, unlimited)


@pytest.mark.parametrize("content", ["", "{}", "no json", '{"version": "1.0", "model": {"type": "?"}}', b"\xff\xfe\0"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        starts(encode("text").tolist(), PatchSettings(mode="bpe", tokenizer=str(path)))
    assert str(caught.value).startswith(f"patching.tokenizer: '{path}' is not a tokenizer.json: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        patching = PatchSettings(mode="bpe", tokenizer=str(path))
        with pytest.raises(UserError, match=f"^patching.tokenizer: '{path}' does not exist; [^\n]*$"):
            patch_lengths(torch.tensor([[100]]), None, patching)
        with pytest.raises(UserError, match="does not exist"):
            steps([100], patching)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    patching = PatchSettings(mode="bpe", tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"^patching mode 'bpe' needs the package tokenizers; run: pip install [^\n]*$"):
        steps([100], patching)
