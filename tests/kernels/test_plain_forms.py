"""The plain forms of a decoding step, and what a CPU computes faster in them, against slow ones in float64."""

import pytest
import torch

from bytelatent.inference.sampling import SamplingSlots
from bytelatent.inference.settings import Sampling
from bytelatent.kernels import skinny_linear
from bytelatent.kernels.decode_attention import plain_decode_attention
from bytelatent.kernels.decode_cross_attention import (
    plain_decoder_cross_attention_step,
    plain_encoder_cross_attention_step,
)
from bytelatent.kernels.hash_embed import ngram_powers, plain_hash_embed
from bytelatent.kernels.rotary import rotary_embedding, rotate
from bytelatent.kernels.skinny_linear import plain_skinny_linear
from bytelatent.model.ngram_hash import PRIMES
from bytelatent.vocab import VOCAB_SIZE
from tests.kernels import slow


def test_rotary_embedding() -> None:
    x, rotary = torch.randn(5, 3, 8), rotary_embedding(torch.tensor([0, 1, 7, 30, 2000]), 8, 1e4)
    exact = [[(p / 1e4 ** (2 * pair / 8)) for pair in range(4)] for p in (0, 1, 7, 30, 2000)]
    phases = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(rotary.double(), torch.stack([phases.cos(), phases.sin()], -1), atol=2e-4, rtol=0)
    expected = torch.stack([slow.rotate(one.double(), of) for one, of in zip(x, rotary, strict=True)])
    torch.testing.assert_close(rotate(x, rotary).double(), expected, atol=1e-6, rtol=1e-5)


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
    cached = [torch.randn(4, slots, kv_heads, size).to(dtype) for _ in "kv"]
    others = [part.clone() for part in cached]
    rotary = rotary_embedding(torch.arange(64), size, 1e4)
    options = {"heads": heads, "window": window, "row_B": row}
    for step in range(12):
        position = torch.full((len(rows),), begin + step) - torch.arange(len(rows)).clamp(max=begin)
        qkv = torch.randn(len(rows), (heads + 2 * kv_heads) * size).to(dtype)
        found = plain_decode_attention(qkv.clone(), *cached, position, rotary, **options)
        expected = slow.decode_attention(qkv, *others, position, rotary, **options)
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(found[row >= 0].double(), expected[row >= 0], **close)
        for one, other in zip(cached, others, strict=True):
            torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("rows", [[0], [2], [-1], [3, 0], [1, -1, 2]])
def test_cross_attention(rows: list[int], kv_heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    row = torch.tensor(rows)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    q, (k, v) = torch.randn(len(rows), 4, 8).to(dtype), torch.randn(2, 4, 3, kv_heads, 8).to(dtype)
    for reads in (torch.ones(len(rows), dtype=torch.bool), row > 1):
        for out in (None, torch.full_like(q, torch.nan)):
            found = plain_decoder_cross_attention_step(q, k, v, reads, row_T=row, out=out)
            assert out is None or found is out
            for number, at in enumerate(rows):
                if at >= 0:
                    expected = slow.attend(q[number], k[at], v[at]) if reads[number] else torch.zeros(4, 8).double()
                    torch.testing.assert_close(found[number].double(), expected, **close)
                elif out is not None:
                    assert bool(found[number].isnan().all())
    q, (k, v) = torch.randn(len(rows), 2, 4, 8).to(dtype), torch.randn(2, 4, 9, kv_heads, 8).to(dtype)
    bytes_of = {"count_C": row + 1, "row_C": row}
    found = plain_encoder_cross_attention_step(q, k, v, **bytes_of)
    for number, at in enumerate(rows):
        for query in range(2 if at >= 0 else 0):
            seen = slice(at + 1)
            expected = slow.attend(q[number, query], k[at, seen], v[at, seen])
            torch.testing.assert_close(found[number, query].double(), expected, **close)


@pytest.mark.parametrize("small", [0, 1 << 18])
@pytest.mark.parametrize("eps", [None, 1e-2])
@pytest.mark.parametrize("rows", [1, 3])
def test_products(rows: int, eps: float | None, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By NumPy and by PyTorch; gates so large that their exponentials overflow."""
    monkeypatch.setattr(skinny_linear, "SMALL", small)
    torch.manual_seed(0)
    close = {"rtol": 1e-4, "atol": 1e-2}  # of products of hundreds, gated ones of thousands
    x, weight, residual = torch.randn(rows, 32), torch.randn(48, 32) * 20, torch.randn(rows, 48)
    for given in ({}, {"residual_MN": residual}, {"residual_MN": residual, "residual_scale": 2.0}):
        expected = slow.linear(x, weight, eps=eps, **given)
        torch.testing.assert_close(plain_skinny_linear(x, weight, eps=eps, **given).double(), expected, **close)
        out = residual.clone()
        given = {**given, "residual_MN": out} if given else {}
        assert plain_skinny_linear(x, weight, eps=eps, **given, out=out) is out
        torch.testing.assert_close(out.double(), expected, **close)
    found = plain_skinny_linear(x, weight, gated=True, eps=eps)
    torch.testing.assert_close(found.double(), slow.gated(x, weight, eps=eps), **close)


@pytest.mark.parametrize("longest", [4, 7])
def test_hashes(longest: int) -> None:
    torch.manual_seed(0)
    sizes = [3, longest]
    tables, embedding = torch.randn(4 * 101, 8), torch.randn(VOCAB_SIZE, 8)
    given = (ngram_powers(PRIMES[:2], sizes), tables, embedding)
    tail, history = torch.randint(0, VOCAB_SIZE, (5, 6)), torch.tensor([0, 1, 3, 5, 99])
    expected = slow.hash_embed(tail, history, sizes, 2, tables, embedding, new=1)
    torch.testing.assert_close(plain_hash_embed(tail, history, *given).double(), expected, atol=1e-5, rtol=1e-5)
    for row in range(5):
        found = plain_hash_embed(tail[row : row + 1], history[row : row + 1], *given)
        torch.testing.assert_close(found[0].double(), expected[row], atol=1e-5, rtol=1e-5)
    history = torch.randint(0, 9, (15,))
    expected = slow.hash_embed(tail, history, sizes, 2, tables, embedding, new=3)
    found = plain_hash_embed(tail, history, *given, new=3)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


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
