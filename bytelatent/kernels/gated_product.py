# pyright: reportInvalidTypeForm=false
"""The first half of a SwiGLU feed-forward in one kernel: both products, the gate and the norm's scale.

RMSNorm divides each row by one number, so it may be done after the product: the kernel reads the states themselves and
the norm's weights are part of the matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.kernels.launch import launch_options, power_of_two, tl, triton, wait_for_earlier

# Shapes: T rows, D width, F feed-forward width

ROWS, COLUMNS, INNER = 128, 256, 64  # of a program's tile, both matrices' columns together
BAND = 8  # tiles of rows that are worked on together, so that the matrix stays in the cache


def interleaved(gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """Both matrices as one, row by row in turn, [2F, D]."""
    return torch.stack([gate_FD, up_FD], dim=1).flatten(0, 1).contiguous()


def row_scale(x_TD: Tensor, eps: float) -> Tensor:
    """What RMSNorm multiplies each row with, float32 [T]."""
    return torch.rsqrt(x_TD.float().pow(2).mean(dim=-1) + eps)


def fast_row_scale(x_TD: Tensor, eps: float, run: Tensor | None = None) -> Tensor:
    """The same by a kernel; anything where `run`, one number on the device, is 0."""
    assert x_TD.stride(1) == 1, "a row is not contiguous"
    size, dim = x_TD.shape
    scale_T = torch.empty(size, dtype=torch.float32, device=x_TD.device)
    padded = power_of_two(dim)
    row_scale_kernel[(size,)](x_TD, scale_T, run, eps, x_TD.stride(0), dim, padded, num_warps=2, **launch_options())
    return scale_T


def can_gate(width: int, dim: int) -> bool:
    """Whether `gated_product` can do a matrix [width, dim]; the states' rows are multiples of `ROWS` besides."""
    return width % COLUMNS == 0 and dim % INNER == 0


def plain_gated_product(x_TD: Tensor, scale_T: Tensor, gate_up_2FD: Tensor) -> Tensor:
    """What `gated_product` computes, in float32."""
    product = (x_TD.float() @ gate_up_2FD.float().T) * scale_T[:, None]
    return (F.silu(product[:, 0::2]) * product[:, 1::2]).to(x_TD.dtype)


def gated_product(x_TD: Tensor, scale_T: Tensor, gate_up_2FD: Tensor) -> Tensor:
    """silu(s x Gate) * (s x Up), [T, F].

    Args:
        x_TD: states.
        scale_T: s, a number for each row.
        gate_up_2FD: see `interleaved` and `can_gate`.
    """
    size, dim = x_TD.shape
    width = gate_up_2FD.shape[0]
    assert x_TD.is_contiguous(), "the states are not contiguous"
    assert gate_up_2FD.is_contiguous(), "the matrix is not contiguous"
    assert size % ROWS == 0, f"{size} rows are no multiple of {ROWS}"
    assert can_gate(width, dim), f"a matrix of {width} x {dim} is no multiple of {COLUMNS} x {INNER}"
    out = torch.empty(size, width // 2, dtype=x_TD.dtype, device=x_TD.device)
    grid = (size // ROWS * (width // COLUMNS),)
    gated_product_kernel[grid](
        x_TD, scale_T, gate_up_2FD, out, size, width, dim, ROWS, COLUMNS, INNER, BAND, num_warps=8, num_stages=3
    )
    return out


# Kernels


@triton.jit
def row_scale_kernel(x_ptr, out_ptr, run_ptr, eps, x_row, D: tl.constexpr, PADDED: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    x = tl.load(x_ptr + row * x_row + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.rsqrt(tl.sum(x * x, 0) / D + eps))


@triton.jit
def gated_product_kernel(
    x_ptr,
    scale_ptr,
    weight_ptr,
    out_ptr,
    size,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BAND: tl.constexpr,
):
    tile = tl.program_id(0)
    across: tl.constexpr = WIDTH // COLUMNS
    band = tile // (BAND * across)
    height = tl.minimum(size // ROWS - band * BAND, BAND)
    first_row = (band * BAND + tile % (BAND * across) % height) * ROWS
    first_column = tile % (BAND * across) // height * COLUMNS
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    column = first_column + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    x = x_ptr + row[:, None] * D + inner[None, :]
    weight = weight_ptr + column[None, :] * D + inner[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, D, INNER):
        acc = tl.dot(tl.load(x + at), tl.load(weight + at), acc)
    acc = acc * tl.load(scale_ptr + row)[:, None]
    gate, up = tl.split(tl.reshape(acc, [ROWS, COLUMNS // 2, 2]))
    out = gate / (1.0 + tl.exp(-gate)) * up
    half = first_column // 2 + tl.arange(0, COLUMNS // 2)
    tl.store(out_ptr + row[:, None] * (WIDTH // 2) + half[None, :], out.to(out_ptr.dtype.element_ty))
