# pyright: reportInvalidTypeForm=false
"""Keys and values of a KV cache in 8 bits: each head of a position has a scale.

A scale is a power of two, of which only the exponent is stored. So what is read back is a number of bfloat16, too, and
quantized again gives the same bytes: whoever quantizes, and how often, all read the same numbers.
"""

import numpy as np
import torch
from torch import Tensor

from bytelatent.kernels.launch import tl, triton
from bytelatent.kernels.rotary import rotated

# Shapes: E head size, J key/value heads


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Heads [..., E] as int8, and the exponent of each head's scale, uint8 [...], biased as float32 has it.

    The scale is the largest power of two by which the largest number of a head is 64 at least; 127 stands for more.
    """
    x = x.float()
    exponent = (x.abs().amax(-1).view(torch.int32) >> 23).clamp(min=7) - 6
    return (x / _scale(exponent)).round().clamp(-127, 127).to(torch.int8), exponent.to(torch.uint8)


def dequantize_heads(values: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of `quantize_heads`, [..., E]."""
    return (values.float() * _scale(exponent.int())).to(dtype)


def numbers_of_heads(values: Tensor, exponent: Tensor) -> np.ndarray:
    """The same for NumPy, float32."""
    scale = (exponent.cpu().numpy().astype(np.int32) << 23).view(np.float32)
    return values.cpu().numpy() * scale[..., None]


def _scale(exponent: Tensor) -> Tensor:
    return (exponent << 23).view(torch.float32).unsqueeze(-1)


# Device functions


@triton.jit
def quantized_heads(x):
    """`quantize_heads` of [ROWS, E] float32: whole numbers, float32, and exponents, int32 [ROWS]."""
    exponent = tl.maximum(tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23, 7) - 6
    whole = (x * scale_of(254 - exponent)[:, None] + 12582912.0) - 12582912.0  # 1.5 * 2^23: halves to the even one
    return tl.minimum(tl.maximum(whole, -127.0), 127.0), exponent


@triton.jit
def scale_of(exponent):
    """The scale of an exponent, float32."""
    return (exponent.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def held_heads(x_ptr, scale_ptr, first, slot, seen, dtype: tl.constexpr, J: tl.constexpr, E: tl.constexpr):
    """One head of slots of a cache's row, whose slot 0 has it at `first`, [BLOCK, E]; 8-bit ones in `dtype`."""
    x = tl.load(x_ptr + first * E + (slot[:, None] * (J * E) + tl.arange(0, E)[None, :]), mask=seen[:, None], other=0.0)
    if scale_ptr is not None:
        scale = scale_of(tl.load(scale_ptr + first + slot * J, mask=seen, other=1))
        x = (x.to(tl.float32) * scale[:, None]).to(dtype)
    return x


@triton.jit
def store_new(k, v, cos, sin, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, at, stores, E: tl.constexpr):
    """Rotate a new position's key; store it and its value, [E], as head `at` of a cache; give both as read later."""
    place = at * E + tl.arange(0, E)
    k = tl.reshape(rotated(k[None, :].to(tl.float32), cos, sin, 1, E), [E])
    if k_scale_ptr is None:
        k, v = k.to(k_ptr.dtype.element_ty), v.to(v_ptr.dtype.element_ty)
        tl.store(k_ptr + place, k, mask=stores)
        tl.store(v_ptr + place, v, mask=stores)
    else:
        k, k_exponent = quantized_heads(k.to(v.dtype).to(tl.float32)[None, :])
        v, v_exponent = quantized_heads(v.to(tl.float32)[None, :])
        tl.store(k_ptr + place[None, :], k.to(tl.int8), mask=stores)
        tl.store(v_ptr + place[None, :], v.to(tl.int8), mask=stores)
        one = at + tl.zeros([1], tl.int64)
        tl.store(k_scale_ptr + one, k_exponent.to(tl.uint8), mask=stores)
        tl.store(v_scale_ptr + one, v_exponent.to(tl.uint8), mask=stores)
        k = tl.reshape(k * scale_of(k_exponent)[:, None], [E])
        v = tl.reshape(v * scale_of(v_exponent)[:, None], [E])
    return k.to(tl.float32), v.to(tl.float32)
