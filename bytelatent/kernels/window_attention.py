# pyright: reportInvalidTypeForm=false
"""Causal attention inside documents and a window, for packed streams, forward only.

What a query sees is one run of keys: from `low` to itself. So the kernel walks over blocks of keys and masks only the
first ones and the last. Queries are rotated as they are loaded; keys, which several blocks of queries read, are
rotated once before, in place.
"""

import torch
from torch import Tensor

from bytelatent.kernels.launch import LOG2_E, power_of_two, tl, triton, uses_kernels
from bytelatent.kernels.quantized_heads import dequantize_heads, quantize_heads, quantized_heads, scale_of
from bytelatent.kernels.rotary import rotate, rotated

# Shapes: T positions in the stream, H heads, E head size, A = E/2 rotated pairs

BLOCK = 64  # queries, and keys, of a program at once; T is a multiple of it


def first_seen(position: Tensor, window: int | None) -> Tensor:
    """The first place in the stream that each position sees, int32 [T].

    Args:
        position: [T] in the document, 0 at its start.
        window: positions seen, the own one included; None for all of the document before it.
    """
    place = torch.arange(position.shape[0], device=position.device)
    begin = place - position
    return (begin if window is None else torch.maximum(begin, place - window + 1)).int()


def can_attend(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether `window_attention` takes such heads."""
    return num_kv_heads == num_heads and head_dim in (16, 32, 64, 128)


def plain_window_attention(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    low_T: Tensor,
    cos_TA: Tensor,
    sin_TA: Tensor,
    in_8_bits: bool = False,
) -> Tensor:
    place = torch.arange(q_THE.shape[0], device=q_THE.device)
    seen = (place[None, :] <= place[:, None]) & (place[None, :] >= low_T[:, None])
    rotary_TA2 = torch.stack([cos_TA, sin_TA], dim=-1)
    k_THE.copy_(rotate(k_THE, rotary_TA2))
    for x_THE in (k_THE, v_THE) if in_8_bits else ():
        x_THE.copy_(dequantize_heads(*quantize_heads(x_THE), x_THE.dtype))
    q, k, v = (x.transpose(0, 1)[None] for x in (rotate(q_THE, rotary_TA2), k_THE, v_THE))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)[0].transpose(0, 1)


def window_attention(
    q_THE: Tensor,
    k_THE: Tensor,
    v_THE: Tensor,
    low_T: Tensor,
    cos_TA: Tensor,
    sin_TA: Tensor,
    in_8_bits: bool = False,
) -> Tensor:
    """Softmax attention of each position over places `low` to itself, with rotary positions, [T, H, E].

    Args:
        q_THE, k_THE, v_THE: strided alike, as parts of one product's output; the keys are rotated in place.
        low_T: the first place that a position sees, never falling; see `first_seen`.
        cos_TA, sin_TA: of the positions' rotary embedding, see `cos_sin`; contiguous.
        in_8_bits: whether keys and values are first rounded, in place, to what a KV cache in 8 bits holds.
    """
    if not uses_kernels(q_THE):
        return plain_window_attention(q_THE, k_THE, v_THE, low_T, cos_TA, sin_TA, in_8_bits)
    size, heads, head_dim = q_THE.shape
    row, padded_heads = q_THE.stride(0), power_of_two(heads)
    assert size % BLOCK == 0, f"{size} positions are no multiple of {BLOCK}"
    assert q_THE.stride() == k_THE.stride() == v_THE.stride() == (row, head_dim, 1), "q, k, v are not strided alike"
    assert size * row < 2**31, "the kernel counts places in 32 bits"
    out_THE = torch.empty(size, heads, head_dim, dtype=v_THE.dtype, device=v_THE.device)
    values = v_THE if in_8_bits else None
    rotate_in_place_kernel[(size,)](k_THE, values, cos_TA, sin_TA, row, heads, padded_heads, head_dim, num_warps=4)
    window_attention_kernel[(heads, size // BLOCK)](
        *(q_THE, k_THE, v_THE, out_THE, low_T, cos_TA, sin_TA, head_dim**-0.5 * LOG2_E),
        *(row, out_THE.stride(0), BLOCK, head_dim),
        num_warps=4,
    )
    return out_THE


# Kernels


@triton.jit
def rotate_in_place_kernel(
    k_ptr, v_ptr, cos_ptr, sin_ptr, ROW: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED)[:, None]
    place = at * ROW + head * E + tl.arange(0, E)[None, :]
    pair = at * (E // 2) + tl.arange(0, E // 2)
    cos, sin = tl.load(cos_ptr + pair)[None, :], tl.load(sin_ptr + pair)[None, :]
    k = tl.load(k_ptr + place, mask=head < H, other=0.0)
    k = rotated(k.to(tl.float32), cos, sin, PADDED, E).to(k.dtype)
    if v_ptr is not None:  # as a KV cache in 8 bits holds them
        v = tl.load(v_ptr + place, mask=head < H, other=0.0)
        k, v = as_in_8_bits(k), as_in_8_bits(v)
        tl.store(v_ptr + place, v, mask=head < H)
    tl.store(k_ptr + place, k, mask=head < H)


@triton.jit
def as_in_8_bits(x):
    whole, exponent = quantized_heads(x.to(tl.float32))
    return (whole * scale_of(exponent)[:, None]).to(x.dtype)


@triton.jit
def over_keys(
    state_acc, state_sum, state_max, q, k_ptr, v_ptr, begin, end, row, low, MASKED: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    for at in tl.range(begin, end, BLOCK, num_stages=2):
        k = tl.load(k_ptr + at * ROW)
        v = tl.load(v_ptr + at * ROW)
        score = tl.dot(q, tl.trans(k))
        if MASKED:
            place = at + tl.arange(0, BLOCK)[None, :]
            score = tl.where((place <= row[:, None]) & (place >= low[:, None]), score, -1e30)
        highest = tl.maximum(state_max, tl.max(score, 1))
        weight = tl.exp2(score - highest[:, None])
        shrink = tl.exp2(state_max - highest)
        state_sum = state_sum * shrink + tl.sum(weight, 1)
        state_acc = tl.dot(weight.to(v.dtype), v, state_acc * shrink[:, None])
        state_max = highest
    return state_acc, state_sum, state_max


@triton.jit
def window_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, low_ptr, cos_ptr, sin_ptr, scale, ROW: tl.constexpr, OUT_ROW: tl.constexpr,
    BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0), tl.program_id(1) * BLOCK
    row = first + tl.arange(0, BLOCK)
    wide = row.to(tl.int64)[:, None]
    column = head * E + tl.arange(0, E)[None, :]
    pair = wide * (E // 2) + tl.arange(0, E // 2)[None, :]
    q = tl.load(q_ptr + wide * ROW + column)
    q = (rotated(q.to(tl.float32), tl.load(cos_ptr + pair), tl.load(sin_ptr + pair), BLOCK, E) * scale).to(q.dtype)
    low = tl.load(low_ptr + row)
    # Every query sees all of the keys from the last one's `low` to the first query.
    begin = tl.load(low_ptr + first) // BLOCK * BLOCK
    inner = tl.minimum((tl.load(low_ptr + first + BLOCK - 1) + BLOCK - 1) // BLOCK * BLOCK, first)
    key = tl.arange(0, BLOCK)[:, None] * ROW + column
    acc = tl.zeros([BLOCK, E], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    highest = tl.full([BLOCK], -1e30, tl.float32)
    keys, values = k_ptr + key, v_ptr + key
    acc, total, highest = over_keys(acc, total, highest, q, keys, values, begin, inner, row, low, True, ROW, BLOCK)
    acc, total, highest = over_keys(acc, total, highest, q, keys, values, inner, first, row, low, False, ROW, BLOCK)
    end = first + BLOCK
    acc, total, highest = over_keys(acc, total, highest, q, keys, values, first, end, row, low, True, ROW, BLOCK)
    tl.store(out_ptr + wide * OUT_ROW + column, (acc / total[:, None]).to(q.dtype))
