# pyright: reportInvalidTypeForm=false
"""Rotary embeddings: pairs (2i, 2i+1) of every head rotated in proportion to the position.

Source: Su et al. 2021, RoFormer.
"""

import math
from typing import Any

import torch
from torch import Tensor

from bytelatent.kernels.launch import tl, triton

# Shapes: T positions, H heads, E head size


def cos_sin(position_T: Tensor, head_dim: int, theta: float, scaling: Any = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair's rotation, float32 [T, E/2] each.

    Args:
        scaling: `RopeScaling` of the model's settings; None for the plain rotary embedding.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_T.device, dtype=torch.float32) / head_dim
    frequency = 1.0 / theta**exponents
    if scaling is not None:
        cycles = scaling.original_context / (2 * math.pi / frequency)  # within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        own = ((cycles - low) / (high - low)).clamp(0, 1)
        frequency = (1 - own) * frequency / scaling.factor + own * frequency
    radians = position_T.float()[:, None] * frequency
    return radians.cos(), radians.sin()


def rotary_embedding(position_T: Tensor, head_dim: int, theta: float, scaling: Any = None) -> Tensor:
    """Cosine and sine together, float32 [T, E/2, 2]."""
    return torch.stack(cos_sin(position_T, head_dim, theta, scaling), dim=-1)


def rotate(x_THE: Tensor, rotary_TE2: Tensor) -> Tensor:
    """Rotate each pair of every head by its position; computed in float32 at least, in the dtype of `x_THE`."""
    wide_THE = x_THE if x_THE.dtype == torch.float64 else x_THE.float()
    pairs = wide_THE.unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = rotary_TE2[..., 0][:, None], rotary_TE2[..., 1][:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_THE.dtype)


@triton.jit
def rotated(x, cos, sin, ROWS: tl.constexpr, E: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [ROWS, E // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [ROWS, E])
