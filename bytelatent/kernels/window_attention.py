"""Causal attention inside documents and a window, for packed streams, forward only.

What a query sees is one run of keys: from `low` to itself. So the kernel walks over blocks of keys and masks only the
first ones and the last. Queries are turned by their rotary angles as they are loaded; keys, which several blocks of
queries read, are turned once before, in place.
"""

from typing import Any

import torch
from torch import Tensor

# Shapes: T positions in the stream, H heads, E head size, A = E/2 angles

BLOCK = 64  # queries, and keys, that a program looks at at once; T is a multiple of it
LOG2_E = 1.4426950408889634


def first_seen(position: Tensor, window: int | None) -> Tensor:
    """The first place in the stream that each position sees, int32 [T].

    Args:
        position: [T] in the document, 0 at its start.
        window: positions seen, the own one included; None for all of the document before it.
    """
    place = torch.arange(position.shape[0], device=position.device)
    begin = place - position
    return (begin if window is None else torch.maximum(begin, place - window + 1)).int()


def angles(position: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of pairs (2i, 2i+1), float32 [T, A]."""
    exponents = torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim
    turns = position.float()[:, None] * (1.0 / theta**exponents)
    return turns.cos(), turns.sin()


def turn(x_THE: Tensor, cos_TA: Tensor, sin_TA: Tensor) -> Tensor:
    """Rotate each pair (2i, 2i+1) of every head by its position's angle."""
    pairs = x_THE.float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_TA[:, None], sin_TA[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_THE.dtype)


def can_attend(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether `window_attention` can do such heads."""
    return num_kv_heads == num_heads and head_dim in (16, 32, 64, 128)


def plain_window_attention(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, low_T: Tensor, cos_TA: Tensor, sin_TA: Tensor
) -> Tensor:
    """What `window_attention` computes, with a T x T mask."""
    place = torch.arange(q_THE.shape[0], device=q_THE.device)
    seen = (place[None, :] <= place[:, None]) & (place[None, :] >= low_T[:, None])
    q, k = turn(q_THE, cos_TA, sin_TA), turn(k_THE, cos_TA, sin_TA)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v_THE))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1)


def window_attention(
    q_THE: Tensor, k_THE: Tensor, v_THE: Tensor, low_T: Tensor, cos_TA: Tensor, sin_TA: Tensor
) -> Tensor:
    """Softmax attention of each position over places `low` to itself, with rotary positions, [T, H, E].

    Args:
        q_THE, k_THE, v_THE: strided alike, as parts of one product's output; the keys are turned in place.
        low_T: the first place that a position sees, never falling; see `first_seen`.
        cos_TA, sin_TA: see `angles`.
    """
    size, heads, head_dim = q_THE.shape
    assert size % BLOCK == 0, f"{size} positions are no multiple of {BLOCK}"
    assert q_THE.stride() == k_THE.stride() == v_THE.stride(), "q, k, v are not strided alike"
    assert size * q_THE.stride(0) < 2**31, "the kernel counts places in 32 bits"
    assert q_THE.stride()[1:] == (head_dim, 1), "heads do not lie one after the other"
    from bytelatent.kernels import window_attention_triton

    kernels: Any = window_attention_triton

    out_THE = torch.empty(size, heads, head_dim, dtype=v_THE.dtype, device=v_THE.device)
    row, padded_heads = q_THE.stride(0), 1 << (heads - 1).bit_length()
    kernels.turn_in_place[(size,)](k_THE, cos_TA, sin_TA, row, heads, padded_heads, head_dim, num_warps=4)
    kernels.attend[(heads, size // BLOCK)](
        q_THE,
        k_THE,
        v_THE,
        out_THE,
        low_T,
        cos_TA,
        sin_TA,
        head_dim**-0.5 * LOG2_E,
        row,
        out_THE.stride(0),
        BLOCK,
        head_dim,
        num_warps=4,
    )
    return out_THE
