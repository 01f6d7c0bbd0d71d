"""The published code's outputs, through the public path."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bytelatent import BLT
from bytelatent.kernels.hash_embed import hash_rows, ngram_powers
from bytelatent.model import ByteLM, add_patches, pack_rows
from bytelatent.model.ngram_hash import PRIMES
from bytelatent.weights import load, load_byte_lm


@pytest.mark.parametrize("name", ["blt_k2", "blt_k4_proj"])
def test_logits(goldens: Path, name: str) -> None:
    io = load_file(goldens / name / "io.safetensors")
    model = BLT.from_pretrained(goldens / name, device="cpu")
    logits = model.logits(io["tokens"].long(), io["patch_lengths"].long())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, io["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["blt_k2", "blt_k4_proj"])
def test_rows_of_a_stream_are_apart(goldens: Path, name: str) -> None:
    """Published n-grams do not stop at a document's start; packed rows are rows of their own nevertheless."""
    io = load_file(goldens / name / "io.safetensors")
    model = BLT.from_pretrained(goldens / name, device="cpu")
    rows, lengths = io["tokens"].long(), io["patch_lengths"].long()
    starts = torch.stack([torch.zeros(rows.shape[1] + 1, dtype=torch.bool) for _ in rows])
    for row, counts in zip(starts, lengths, strict=True):
        row[counts.cumsum(0)[counts.cumsum(0) <= rows.shape[1]]] = True
    with torch.no_grad():
        logits = model.model(add_patches(pack_rows(list(rows)), starts[:, 1:].flatten()))
    torch.testing.assert_close(logits.view_as(io["logits"]), io["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["blt_k2", "blt_k4_proj"])
def test_logits_depend_on_the_patches(goldens: Path, name: str) -> None:
    """Else the test above would say nothing of them."""
    io = load_file(goldens / name / "io.safetensors")
    model = BLT.from_pretrained(goldens / name, device="cpu")
    other = torch.ones(3, io["tokens"].shape[1], dtype=torch.long)
    assert (model.logits(io["tokens"].long(), other) - io["logits"]).abs().max() > 0.1


def test_byte_lm(goldens: Path) -> None:
    io = load_file(goldens / "entropy" / "io.safetensors")
    model = load(goldens / "entropy").model
    assert isinstance(model, ByteLM)
    stream = pack_rows(list(io["tokens"].long()))
    with torch.no_grad():
        logits = model(stream)
    torch.testing.assert_close(logits.view_as(io["logits"]), io["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.entropies(stream).view_as(io["entropies"]), io["entropies"], atol=1e-4, rtol=0)
    assert load_byte_lm(goldens / "entropy").settings == model.settings


def test_every_hash(goldens: Path) -> None:
    published = json.loads((goldens / "hashes.json").read_text())
    ids = torch.tensor(published["tokens"])
    history = torch.arange(ids.shape[1]).expand_as(ids).flatten()
    for case in published["cases"]:
        powers = ngram_powers([PRIMES[case["function"]]], [case["n"]])
        ours = hash_rows(ids, history, powers, case["vocab"], new=ids.shape[1])
        assert ours.view_as(ids).tolist() == case["ids"], case
    assert {case["function"] for case in published["cases"]} >= {0, 1}
    assert len(set(PRIMES)) == 11
