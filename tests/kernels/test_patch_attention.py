"""Attention between bytes and patches against loops over bytes, patches and heads; its kernels against that.

The kernels run in Triton's interpreter, which is chosen before Triton is imported: in a process of its own.
"""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from bytelatent.kernels import patch_attention, patch_pooling
from bytelatent.kernels.patch_attention import ByteRanges, decoder_cross_attention, encoder_cross_attention
from bytelatent.kernels.patch_pooling import pool_patches
from tests.kernels.interpreter import interpreted
from tests.model.tiny import patched_stream_of, random_ids, random_starts


def slow_pool(h: Tensor, patch: Tensor, num_patches: int) -> Tensor:
    rows = []
    for p in range(num_patches):
        own = h[patch == p]
        rows.append(own.amax(0) if len(own) else torch.zeros(h.shape[1], dtype=h.dtype))
    return torch.stack(rows)


def slow_own_bytes(q: Tensor, k: Tensor, v: Tensor, patch: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for p, place, head in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        own = torch.nonzero(patch == p).flatten().tolist()
        if own:
            scores = torch.stack([q[p, place, head] @ k[i, head] for i in own]) / q.shape[-1] ** 0.5
            out[p, place, head] = sum(w * v[i, head] for w, i in zip(scores.softmax(0), own, strict=True))
    return out


def slow_read_patch(q: Tensor, k: Tensor, v: Tensor, read: Tensor) -> Tensor:
    out = torch.zeros_like(q)
    for i, head in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        if read[i] >= 0:
            scores = k[read[i], :, head] @ q[i, head] / q.shape[-1] ** 0.5
            out[i, head] = scores.softmax(0) @ v[read[i], :, head]
    return out


def inputs(seed: int, num_bytes: int, num_patches: int, k: int, heads: int, scale: float = 1.0) -> list[Tensor]:
    """Queries of patches, keys and values of bytes, and an order-keeping map of bytes to patches, some without any."""
    random = torch.Generator().manual_seed(seed)
    q = scale * torch.randn(num_patches, k, heads, 4, generator=random)
    key, value = (torch.randn(num_bytes, heads, 4, generator=random) for _ in range(2))
    patch = torch.randint(0, num_patches, [num_bytes], generator=random).sort().values
    return [q, key, value, patch]


sizes = {
    "seed": st.integers(0, 999), "num_bytes": st.integers(1, 12), "num_patches": st.integers(1, 6),
    "k": st.integers(1, 3), "heads": st.integers(1, 2), "scale": st.sampled_from([1.0, 100.0]),
}  # fmt: skip


@settings(max_examples=30)
@given(**sizes)
def test_own_bytes(seed: int, num_bytes: int, num_patches: int, k: int, heads: int, scale: float) -> None:
    """Scores of hundreds, too: the exponentials do not overflow."""
    q, key, value, patch = inputs(seed, num_bytes, num_patches, k, heads, scale)
    out = encoder_cross_attention(q, key, value, ByteRanges.of(patch, num_patches))
    torch.testing.assert_close(out, slow_own_bytes(q, key, value, patch), atol=1e-5, rtol=1e-4)
    empty = [p for p in range(num_patches) if p not in patch.tolist()]
    assert (out[empty] == 0).all()


@settings(max_examples=30)
@given(**sizes)
def test_read_patch(seed: int, num_bytes: int, num_patches: int, k: int, heads: int, scale: float) -> None:
    keys, q, _, patch = inputs(seed, num_bytes, num_patches, k, heads, scale)
    read, values = patch - 1, keys.flip(0)
    out = decoder_cross_attention(q, keys, values, ByteRanges.of(read, num_patches))
    torch.testing.assert_close(out, slow_read_patch(q, keys, values, read), atol=1e-5, rtol=1e-4)
    assert (out[read == -1] == 0).all()


@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 6))
def test_pool(seed: int, num_bytes: int, num_patches: int) -> None:
    _, key, _, patch = inputs(seed, num_bytes, num_patches, 1, 1)
    h = key[:, 0] - 2  # mostly negative, so that a zero that slips into the maximum shows
    assert pool_patches(h, ByteRanges.of(patch, num_patches)).equal(slow_pool(h, patch, num_patches))


@pytest.mark.parametrize("seed", range(3))
def test_gradients(seed: int) -> None:
    """By finite differences; what the values are is tested above."""
    q, key, value, patch = inputs(seed, 9, 5, 2, 2)
    own, read = ByteRanges.of(patch, 5), ByteRanges.of(patch - 1, 5)
    q, key, value = (x.double().requires_grad_() for x in (q, key, value))
    assert gradcheck(lambda q, k, v: encoder_cross_attention(q, k, v, own), [q, key, value])
    assert gradcheck(
        lambda q, k, v: decoder_cross_attention(q, k, v, read), [key, q, q.detach().flip(0).requires_grad_()]
    )
    assert gradcheck(lambda h: pool_patches(h, own), [key.flatten(1)])


@pytest.mark.parametrize("high", [0.0, 2.0])
def test_equally_high_bytes_share_the_gradient(high: float) -> None:
    h = torch.tensor([[high], [-1.0], [high], [high], [3.0]], requires_grad=True)
    pool_patches(h, ByteRanges.of(torch.tensor([0, 0, 0, 0, 2]), 4)).sum().backward()
    assert h.grad is not None
    torch.testing.assert_close(h.grad[:, 0], torch.tensor([1 / 3, 0.0, 1 / 3, 1 / 3, 1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_are_of_the_queries_dtype_and_computed_in_float32(dtype: torch.dtype) -> None:
    q, key, value, patch = inputs(3, 40, 6, 2, 2)
    q, key, value = (x.to(dtype) for x in (q, key, value))
    own = ByteRanges.of(patch, 6)
    expected = encoder_cross_attention(q.double(), key.double(), value.double(), own).to(dtype)
    torch.testing.assert_close(encoder_cross_attention(q, key, value, own), expected, atol=1e-6, rtol=0.008)
    expected = decoder_cross_attention(key.double(), q.double(), q.flip(0).double(), own).to(dtype)
    torch.testing.assert_close(decoder_cross_attention(key, q, q.flip(0), own), expected, atol=1e-6, rtol=0.008)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 999))
def test_runs(sizes: list[int], padding: int, more_slots: int, seed: int) -> None:
    """Every byte that is in a patch, or reads it, lies in the patch's run; a run's other bytes read nothing."""
    generator = torch.Generator().manual_seed(seed)
    documents = [random_ids(generator, size) for size in sizes]
    starts = [random_starts(generator, size) for size in sizes]
    batch = patched_stream_of(documents, starts, padding, more_slots)
    for patch in (batch.patch, batch.read):
        runs = ByteRanges.of(patch, batch.num_patches)
        begin, of_byte = runs.begin.tolist(), patch.tolist()
        assert len(begin) == batch.num_patches + 1
        assert begin[0] == 0
        assert begin[-1] == len(of_byte)
        for number, (first, end) in enumerate(itertools.pairwise(begin)):
            assert first <= end
            assert [at for at, own in enumerate(of_byte) if own == number and not first <= at < end] == []
            assert set(of_byte[first:end]) <= {number, -1}


def check(cases: list[tuple[str, dict]]) -> None:
    """Run cases of `patch_attention_cases.py` in Triton's interpreter."""
    pytest.importorskip("triton")
    found = interpreted("tests.kernels.patch_attention_cases", cases)
    for case, errors in zip(cases, found, strict=True):
        assert all(error < 1 for error in errors.values()), (case, errors)


STREAM = {"sizes": [5, 1, 7], "share": 0.3, "padding": 3, "more_slots": 1}
LONG = {"sizes": [11, 2], "share": 0.03}  # a patch of several blocks
BYTES = {"sizes": [3], "share": 1.0}  # patches of one byte


def test_kernels_of_pooling_and_all_as_operators() -> None:
    check([
        ("pool", {"stream": STREAM, "dim": 40}),
        ("pool", {"stream": LONG, "dim": 300}),
        ("pool", {"stream": STREAM, "dim": 24, "levels": 3}),
        ("pool", {"stream": LONG, "dim": 8, "levels": 5, "dtype": "bfloat16"}),
        ("operators", {}),
    ])  # fmt: skip


def test_kernels_of_attention() -> None:
    """On chosen shapes, and on random ones."""
    cases: list[tuple[str, dict]] = [
        (name, {"stream": stream, "k": k, "heads": heads, "head_dim": head_dim} | more)
        for name in ("own_bytes", "read_patch")
        for stream, k, heads, head_dim, more in [
            (STREAM, 2, 3, 16, {}),
            (LONG, 1, 5, 24, {"scale": 100.0, "block": 2}),
            (LONG, 3, 3, 128, {}),
            (BYTES, 2, 20, 16, {"block": 1}),
            (BYTES, 1, 5, 16, {"scale": 1000.0}),
            (BYTES, 8, 3, 64, {"block": 2}),
            (LONG, 2, 2, 32, {"dtype": "bfloat16"}),
        ]
    ]
    draw = random.Random(0)
    for number in range(6):
        stream = {
            "sizes": [draw.randint(1, 6) for _ in range(draw.randint(1, 3))],
            "share": draw.choice([0.05, 0.3, 0.9]),
            "padding": draw.randint(0, 9),
            "more_slots": draw.randint(0, 3),
        }
        shape = {"k": draw.randint(1, 4), "heads": draw.randint(1, 5), "head_dim": draw.choice([1, 8, 16, 40, 64])}
        more = {"block": draw.choice([1, 2, 4]), "dtype": draw.choice(["float32", "bfloat16"])}
        cases.append((("own_bytes", "read_patch")[number % 2], {"stream": stream} | shape | more))
    check(cases)


NUMBERS = {
    "K": 2, "H": 16, "HEADS": 4, "E": 64, "PADDED_E": 64, "D": 1024, "COLUMNS": 256, "BLOCK": 4, "STAGES": 1,
}  # fmt: skip
KINDS = {"begin_ptr": "*i32", "read_ptr": "*i64", "exact_ptr": "*fp32", "weight_ptr": "*fp32", "size": "i32"}


@pytest.mark.parametrize(
    "name", ["pool", "pool_backward", "own_bytes", "own_bytes_backward", "read_patch", "read_patch_backward"]
)
def test_kernels_compile(name: str) -> None:
    """For a GPU, which takes none; and what the threads of a program share they pass on without shared memory."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = patch_pooling if name.startswith("pool") else patch_attention
    kernel = getattr(module, f"{name}_kernel")
    names = kernel.arg_names
    kinds = {n: "fp32" if n == "scale" else "*bf16" for n in names} | KINDS | dict.fromkeys(NUMBERS, "constexpr")
    source = ASTSource(
        kernel,
        {n: kinds[n] for n in names},
        {(names.index(n),): value for n, value in NUMBERS.items() if n in names},
        {(at,): [["tt.divisibility", 16]] for at, n in enumerate(names) if n.endswith("_ptr")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    assert compiled.metadata.shared == 0
    if name == "pool":  # not a number is the highest of all, which the interpreter finds in any case
        assert "max.NaN.f32" in compiled.asm["ptx"]
