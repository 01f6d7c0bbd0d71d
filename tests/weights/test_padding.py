"""Batches of an export in transformers: each row as if it were alone, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BltForCausalLM, pipeline

from bytelatent import BLT
from tests.weights.test_hugging_face import TOLERANCE, their_logits

TEXTS = ["The", "history of", "a"]


@pytest.fixture
def exported(blt: BLT, tmp_path: Path) -> tuple[Any, Any]:
    blt.save_pretrained(tmp_path / "a", format="hf")
    return BltForCausalLM.from_pretrained(tmp_path / "a"), AutoTokenizer.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("side", ["left", "right"])
def test_its_tokenizer_does_not_pad(exported: tuple[Any, Any], side: str) -> None:
    """transformers reads padding before a text as a part of it, and continues padding after a text."""
    _, tokenizer = exported
    with pytest.raises(ValueError, match="does not have a padding token"):
        tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    tokenizer.padding_side = side
    with pytest.raises(ValueError, match="does not have a padding token"):
        tokenizer.pad(tokenizer(TEXTS), return_tensors="pt")


def test_pipelines_take_no_batches_either(exported: tuple[Any, Any]) -> None:
    model, tokenizer = exported
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
    with pytest.raises(ValueError, match="without pad_token cannot do batching"):
        generate(TEXTS, max_new_tokens=4)
    one_by_one = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert len(one_by_one(TEXTS, max_new_tokens=4)) == 3


def test_rows_of_one_length_are_as_alone(exported: tuple[Any, Any]) -> None:
    """Also where one ends before the others: what follows its end is `<boe>`."""
    model, tokenizer = exported
    ids = torch.tensor(tokenizer(["The", "abc", "xyz"])["input_ids"])
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    for row, prompt in zip(rows, ids, strict=True):
        [alone] = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=8).tolist()
        assert row.tolist() == alone + [0] * (len(row) - len(alone))


def test_the_logits_of_texts_padded_at_their_right(exported: tuple[Any, Any], blt: BLT) -> None:
    """As the guide says, with a token that is set by hand."""
    model, tokenizer = exported
    tokenizer.pad_token = "<boe>"
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    rows: Tensor = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -1)
    assert rows[0].tolist() == [1, *(byte + 4 for byte in b"The"), *[-1] * 7]
    torch.testing.assert_close(their_logits(model, rows), blt.logits(rows), **TOLERANCE)


def test_what_padding_at_the_left_would_do(exported: tuple[Any, Any]) -> None:
    """It moves the patches, and the mask reaches neither patcher nor global transformer: other logits."""
    model, tokenizer = exported
    alone = torch.tensor([tokenizer("The")["input_ids"]])
    padded = torch.nn.functional.pad(alone, (5, 0))
    with torch.no_grad():
        expected = model(alone, use_cache=False).logits[0, -1]
        found = model(padded, attention_mask=(padded > 0).long(), use_cache=False).logits[0, -1]
    assert (expected - found).abs().max() > 1e-2
