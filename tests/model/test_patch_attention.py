"""Attention between bytes and patches against loops over bytes, patches and heads."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from bytelatent.model.patch_attention import attend_to_own_bytes, attend_to_read_patch, pool_patches


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
    out = attend_to_own_bytes(q, key, value, patch)
    torch.testing.assert_close(out, slow_own_bytes(q, key, value, patch), atol=1e-5, rtol=1e-4)
    empty = [p for p in range(num_patches) if p not in patch.tolist()]
    assert (out[empty] == 0).all()


@settings(max_examples=30)
@given(**sizes)
def test_read_patch(seed: int, num_bytes: int, num_patches: int, k: int, heads: int, scale: float) -> None:
    keys, q, _, patch = inputs(seed, num_bytes, num_patches, k, heads, scale)
    read, values = patch - 1, keys.flip(0)
    out = attend_to_read_patch(q, keys, values, read)
    torch.testing.assert_close(out, slow_read_patch(q, keys, values, read), atol=1e-5, rtol=1e-4)
    assert (out[read == -1] == 0).all()


@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 6))
def test_pool(seed: int, num_bytes: int, num_patches: int) -> None:
    _, key, _, patch = inputs(seed, num_bytes, num_patches, 1, 1)
    h = key[:, 0] - 2  # mostly negative, so that a zero that slips into the maximum shows
    assert pool_patches(h, patch, num_patches).equal(slow_pool(h, patch, num_patches))


def gradients(function: Callable[..., Tensor], arguments: list[Tensor], where: Tensor) -> list[Tensor]:
    leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
    out = function(*leaves, where)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]


@pytest.mark.parametrize("seed", range(3))
def test_gradients(seed: int) -> None:
    """Weights are float32 whatever the inputs are, so the loops' gradients stand in for finite differences."""
    q, key, value, patch = inputs(seed, 9, 5, 2, 2)
    found, expected = (gradients(f, [q, key, value], patch) for f in (attend_to_own_bytes, slow_own_bytes))
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0.01
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    found, expected = (
        gradients(f, [key, q, q.flip(0).clone()], patch - 1) for f in (attend_to_read_patch, slow_read_patch)
    )
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0.01
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_gradient_of_pooling_by_finite_differences() -> None:
    _, key, _, patch = inputs(5, 9, 5, 1, 1)
    h = key[:, 0].double().requires_grad_()
    assert gradcheck(lambda x: pool_patches(x, patch, 5), [h])
