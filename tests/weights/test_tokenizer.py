"""The tokenizer for transformers: every byte is its own id, whatever the text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bytelatent.weights.side_files import _letters, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, context=123)
    return AutoTokenizer.from_pretrained(folder)


def test_letters_are_those_of_byte_level_vocabularies() -> None:
    theirs = bytes_to_unicode()
    assert _letters() == [theirs[byte] for byte in range(256)]


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 260
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.convert_tokens_to_ids("<boe>") == 0
    assert tokenizer.model_max_length == 123


@given(text=st.text(max_size=40) | st.sampled_from(["<s>", "a </s><boe> b", "\r\n \x00", "e\u0301", "\ufeff", "  x  "]))
def test_ids_are_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, *(byte + 4 for byte in text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
