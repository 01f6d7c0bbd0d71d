"""What a CPU computes a step with, against the forms that are written to be read."""

import pytest
import torch

from bytelatent.inference.sampling import Sampling, SamplingSlots
from bytelatent.inference.step import plain
from bytelatent.kernels.decode_attention import plain_decode_attention, rotary_table
from bytelatent.kernels.decode_patches import plain_gather_bytes, plain_read_patch
from bytelatent.kernels.hash_embed import ngram_powers, plain_hash_embed
from bytelatent.kernels.skinny_linear import plain_skinny_gated, plain_skinny_linear
from bytelatent.model.ngram_hash import PRIMES
from bytelatent.vocab import VOCAB_SIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [[0], [2], [-1], [3, 0], [1, -1, 2]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("window", "begin"), [(5, 0), (5, 21), (None, 7)])
def test_attention(
    window: int | None, begin: int, heads: int, kv_heads: int, rows: list[int], dtype: torch.dtype
) -> None:
    """Rings of 8 slots from their first position on, and when they went round; tables that grow."""
    torch.manual_seed(0)
    slots, size, row = 8 if window else 32, 16, torch.tensor(rows)
    kept = [torch.randn(4, slots, kv_heads, size).to(dtype) for _ in "kv"]
    others = [part.clone() for part in kept]
    options = {"heads": heads, "window": window, "row_B": row}
    for step in range(12):
        position = torch.full((len(rows),), begin + step) - torch.arange(len(rows)).clamp(max=begin)
        qkv = torch.randn(len(rows), (heads + 2 * kv_heads) * size).to(dtype)
        found = plain.attend(qkv.clone(), *kept, position, rotary_table(64, size, 1e4), **options)
        expected = plain_decode_attention(qkv, *others, position, rotary_table(64, size, 1e4), **options)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(found[row >= 0], expected[row >= 0], **close)
        for one, other in zip(kept, others, strict=True):
            torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("rows", [[0], [2], [3, 0], [1, 2, 0]])
def test_reading_and_gathering(rows: list[int]) -> None:
    torch.manual_seed(0)
    row = torch.tensor(rows)
    q, (k, v) = torch.randn(len(rows), 4, 8), torch.randn(2, 4, 3, 4, 8)
    for reads in (torch.ones(len(rows), dtype=torch.bool), row > 1):
        found = plain.read_patch(q, k, v, reads, row_B=row)
        torch.testing.assert_close(found, plain_read_patch(q, k, v, reads, row_B=row))
    q, (k, v) = torch.randn(len(rows), 2, 4, 8), torch.randn(2, 4, 9, 4, 8)
    bytes_of = {"count_C": row + 1, "begin_C": row * 2, "row_C": row}
    torch.testing.assert_close(plain.gather_bytes(q, k, v, **bytes_of), plain_gather_bytes(q, k, v, **bytes_of))


@pytest.mark.parametrize("small", [0, 1 << 18])
@pytest.mark.parametrize("eps", [None, 1e-2])
@pytest.mark.parametrize("rows", [1, 3])
def test_products(rows: int, eps: float | None, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NumPy and by PyTorch; gates so large that their exponentials overflow."""
    monkeypatch.setattr(plain, "SMALL", small)
    torch.manual_seed(0)
    close = {"rtol": 1e-4, "atol": 1e-2}  # of products of hundreds, gated ones of thousands
    x, weight, residual = torch.randn(rows, 32), torch.randn(48, 32) * 20, torch.randn(rows, 48)
    for given in ({}, {"residual_MN": residual}, {"residual_MN": residual, "residual_scale": 2.0}):
        expected = plain_skinny_linear(x, weight, eps=eps, **given)
        torch.testing.assert_close(plain.linear(x, weight, eps=eps, **given), expected, **close)
        out = residual.clone()
        given = {**given, "residual_MN": out} if given else {}
        assert plain.linear(x, weight, eps=eps, **given, out=out) is out
        torch.testing.assert_close(out, expected, **close)
    torch.testing.assert_close(plain.gated(x, weight, eps=eps), plain_skinny_gated(x, weight, eps=eps), **close)


@pytest.mark.parametrize("longest", [4, 7])
def test_hashes(longest: int) -> None:
    torch.manual_seed(0)
    powers = ngram_powers(PRIMES[:2], [3, longest])
    tail, history = torch.randint(0, VOCAB_SIZE, (5, 6)), torch.tensor([0, 1, 3, 5, 99])
    tables, embedding = torch.randn(4 * 101, 8), torch.randn(VOCAB_SIZE, 8)
    for row in range(5):
        part = tail[row : row + 1], history[row : row + 1], powers, tables, embedding
        torch.testing.assert_close(plain.hash_embed(*part), plain_hash_embed(*part))
    whole = tail, history, powers, tables, embedding
    torch.testing.assert_close(plain.hash_embed(*whole), plain_hash_embed(*whole))


def test_what_nobody_asks_for_changes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that a CPU leaves out would have changed nothing, not even the last bit."""
    rows = SamplingSlots.empty(4, "cpu")
    for row, temperature in enumerate([1.0, 0.5, 1.7, 1e-3]):
        rows.put(row, Sampling(temperature=temperature), torch.randint(4, 260, [50]), 9)
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 100:110] = logits[:, 90:100]
    found = rows.weights(logits)
    monkeypatch.setattr("bytelatent.inference.sampling._asked", lambda *_: True)
    assert rows.weights(logits).equal(found)
