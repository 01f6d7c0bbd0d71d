"""Byte-level BPE: trained, and any bytes to ids and back, against the library's own encoding."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from bytelatent.commands.options import TokenizerSettings
from bytelatent.commands.tokenizer import train_on_text
from bytelatent.errors import UserError
from bytelatent.text.tokenizer import Tokenizer, tokenizer_json, train_tokenizer
from bytelatent.vocab import BOS, EOS, OFFSET, encode

DOCUMENTS = [b"the cat sat on the mat, and then the cat went over the mat.", "die Straße, größer 漢字".encode()] * 20
TEXT = train_tokenizer(DOCUMENTS, 300)
BPE = Tokenizer(TEXT)


def test_ids_of_bytes_come_first_and_merges_after_them() -> None:
    vocab = json.loads(TEXT)["model"]["vocab"]
    assert BPE.size == 300 == len(vocab)
    assert (BPE.bos, BPE.eos) == (BOS, EOS)
    plain = Tokenizer(tokenizer_json())
    every = bytes(range(256))
    assert np.array_equal(plain.encode(every), encode(every))  # ids below 260 are those of bytes
    assert BPE.encode(b"the cat").tolist() == [BOS, vocab["the"], vocab["Ġcat"], EOS]
    assert vocab["the"] >= OFFSET + 256


def test_the_same_text_gives_the_same_file() -> None:
    assert train_tokenizer(iter(DOCUMENTS), 300) == TEXT
    assert train_tokenizer(DOCUMENTS, 280) != TEXT


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@example(b"")
@example(b"\xff\xfe the \xc3\xc3\xa9 cat \xe6\xbc <s></s> \x00")
def test_any_bytes_come_back(data: bytes) -> None:
    ids = BPE.encode(data)
    assert BPE.decode(ids) == data
    assert int(BPE.id_bytes[ids].sum()) == len(data)
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert (ids[1:-1] >= OFFSET).all()  # nothing in a text is a special token


@given(st.text(max_size=40).map(lambda text: text.encode(errors="ignore").decode()))
def test_text_is_encoded_as_by_the_library(text: str) -> None:
    library = Library.from_str(TEXT)
    library.encode_special_tokens = True
    assert BPE.encode(text).tolist() == [*library.encode(text).ids, EOS]


def test_bytes_that_are_no_utf8_do_not_change_the_text_around_them() -> None:
    before, after = BPE.encode("the cat", eos=False), BPE.encode(" sat on", bos=False)
    assert BPE.encode(b"the cat\xff\xe6 sat on").tolist() == [*before, 0xFF + OFFSET, 0xE6 + OFFSET, *after]


def test_it_reaches_other_processes() -> None:
    assert np.array_equal(pickle.loads(pickle.dumps(BPE)).encode("the mat"), BPE.encode("the mat"))


def changed(**model: object) -> str:
    values = json.loads(TEXT)
    return json.dumps({**values, **model})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no tokenizer.json of a byte-level BPE"),
        ("{", "is no tokenizer.json of a byte-level BPE"),
        (changed(model={"type": "WordLevel", "vocab": {"a": 0}}), "is no tokenizer.json of a byte-level BPE"),
        (changed(normalizer={"type": "NFKC"}), "does not give every text back byte for byte"),
        (changed(pre_tokenizer=None), "does not give every text back byte for byte"),
        (changed(added_tokens=[]), "has none of the tokens <s>"),
    ],
)
def test_others_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tokenizer(text)


def test_text_with_few_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("abab abab")
    asked = TokenizerSettings(text=[str(tmp_path / "a.txt")], vocab=5000, out=str(tmp_path / "tokenizer.json"))
    size = train_on_text(asked)[0].vocab_size
    assert 260 < size < 300
    assert f"holds no more than {size} of 5,000 ids" in caplog.text
    assert f"model.vocab_size={size}" in caplog.text


def test_command(tmp_path: Path) -> None:
    rows = [*({"text": text.decode()} for text in DOCUMENTS), {"no": "text"}]
    source, out = tmp_path / "a.jsonl", tmp_path / "tokenizer.json"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TokenizerSettings(text=[str(source)], vocab=300, out=str(out))
    trained, unread = train_on_text(settings)
    assert out.read_text() == TEXT
    assert (trained.vocab_size, trained.num_bytes, trained.bad_rows, unread) == (300, sum(map(len, DOCUMENTS)), 1, {})
    num_tokens = sum(len(BPE.encode(data)) - 2 for data in DOCUMENTS)
    assert trained.mean_token_bytes == pytest.approx(trained.num_bytes / num_tokens)
    with pytest.raises(UserError, match="is there already"):
        train_on_text(settings)
    with pytest.raises(UserError, match="does not exist; train one: blt tokenizer TEXT"):
        Tokenizer.read(tmp_path / "none.json", "data.tokenizer")
