import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelatent import vocab


@given(st.binary(max_size=300), st.booleans(), st.booleans())
def test_decoding_gives_back_the_bytes(data: bytes, bos: bool, eos: bool) -> None:
    ids = vocab.encode(data, bos=bos, eos=eos)
    assert ids.tolist() == [1] * bos + [byte + 4 for byte in data] + [2] * eos
    assert ids.dtype == np.int64
    assert vocab.decode(ids) == data


def test_every_byte_has_its_own_id_in_the_vocabulary() -> None:
    ids = vocab.encode(bytes(range(256)), bos=False, eos=False)
    assert ids.tolist() == list(range(4, 260))
    assert vocab.VOCAB_SIZE == 260


@given(st.text(max_size=100))
def test_a_string_is_encoded_as_utf8(text: str) -> None:
    assert vocab.decode(vocab.encode(text)) == text.encode("utf-8")


@given(st.binary(max_size=100))
def test_bytes_read_as_escaped_text_come_back(data: bytes) -> None:
    assert vocab.decode(vocab.encode(data.decode("utf-8", errors="surrogateescape"))) == data


@given(st.lists(st.integers(-1, 259), max_size=100))
def test_decoding_drops_what_is_no_byte(ids: list[int]) -> None:
    assert vocab.decode(ids) == bytes(id_ - 4 for id_ in ids if id_ >= 4)


@pytest.mark.parametrize("nothing", [b"", ""])
def test_the_empty_document(nothing: bytes | str) -> None:
    assert vocab.encode(nothing).tolist() == [vocab.BOS, vocab.EOS]
    assert vocab.encode(nothing, bos=False, eos=False).size == 0
    assert vocab.decode([]) == b""
