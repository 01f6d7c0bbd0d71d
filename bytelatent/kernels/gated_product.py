# pyright: reportInvalidTypeForm=false
"""The first half of a SwiGLU feed-forward: both products, the gate and the norm's scale in one kernel, or apart.

RMSNorm divides each row by one number, so it may be done after the product: the kernel reads the states themselves and
the norm's weights are part of the matrix.
"""

import numpy as np
import torch
from torch import Tensor

from bytelatent.kernels.launch import array, launch_options, power_of_two, tl, triton, uses_kernels, wait_for_earlier

# Shapes: T rows, D width, F feed-forward width

ROWS, COLUMNS, INNER = 128, 256, 64  # of a program's tile, both matrices' columns together
BAND = 8  # tiles of rows that are worked on together, so that the matrix stays in the cache


def interleaved(gate_FD: Tensor, up_FD: Tensor) -> Tensor:
    """Both matrices as one, row by row alternately, [2F, D]."""
    return torch.stack([gate_FD, up_FD], dim=1).flatten(0, 1).contiguous()


def plain_row_scale(x_TD: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x_TD.float().pow(2).mean(dim=-1) + eps)


def row_scale(x_TD: Tensor, eps: float) -> Tensor:
    """The factor of RMSNorm for each row, float32 [T]."""
    if not uses_kernels(x_TD):
        return plain_row_scale(x_TD, eps)
    size, dim = x_TD.shape
    scale_T = torch.empty(size, dtype=torch.float32, device=x_TD.device)
    row_scale_kernel[(size,)](x_TD, scale_T, eps, x_TD.stride(0), dim, power_of_two(dim), num_warps=2)
    return scale_T


def gate_array(gate_up_T2F: np.ndarray) -> np.ndarray:
    gate, up = gate_up_T2F[:, 0::2], gate_up_T2F[:, 1::2]
    out_TF = np.exp(np.minimum(-gate, 88))  # float32 overflows beyond
    out_TF += 1
    np.divide(gate, out_TF, out=out_TF)
    out_TF *= up
    return out_TF


def plain_gate(gate_up_T2F: Tensor) -> Tensor:
    return torch.from_numpy(gate_array(array(gate_up_T2F))).to(gate_up_T2F)


def gate(gate_up_T2F: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up of columns that are gate and up alternately, contiguous, [T, F]."""
    if not uses_kernels(gate_up_T2F):
        out_TF = plain_gate(gate_up_T2F)
        return out_TF if out is None else out.copy_(out_TF)
    size, width, block = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2, 512
    out_TF = gate_up_T2F.new_empty(size, width) if out is None else out
    gate_kernel[(size, -(-width // block))](gate_up_T2F, out_TF, N=width, BLOCK=block, num_warps=4, **launch_options())
    return out_TF


def can_gate(width: int, dim: int) -> bool:
    """Whether `gated_product` takes a matrix [width, dim]; the number of states must be a multiple of `ROWS` too."""
    return width % COLUMNS == 0 and dim % INNER == 0


def plain_gated_product(x_TD: Tensor, scale_T: Tensor, gate_up_2FD: Tensor) -> Tensor:
    return plain_gate((x_TD.float() @ gate_up_2FD.float().T) * scale_T[:, None]).to(x_TD.dtype)


def gated_product(x_TD: Tensor, scale_T: Tensor, gate_up_2FD: Tensor) -> Tensor:
    """silu(s x Gate) * (s x Up), [T, F].

    Args:
        x_TD: states, contiguous.
        scale_T: s, a number for each row.
        gate_up_2FD: see `interleaved` and `can_gate`; contiguous.
    """
    if not uses_kernels(x_TD):
        return plain_gated_product(x_TD, scale_T, gate_up_2FD)
    (size, dim), width = x_TD.shape, gate_up_2FD.shape[0]
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
def row_scale_kernel(x_ptr, out_ptr, eps, x_row, D: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    x = tl.load(x_ptr + row * x_row + at, mask=at < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.rsqrt(tl.sum(x * x, 0) / D + eps))


@triton.jit
def gate_kernel(gate_up_ptr, out_ptr, N: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_earlier(OVERLAP)
    gate_up = tl.load(gate_up_ptr + m * (2 * N) + pair, mask=pair < 2 * N, other=0.0).to(tl.float32)
    gate, up = tl.split(tl.reshape(gate_up, [BLOCK, 2]))
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + m * N + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def gated_product_kernel(
    x_ptr, scale_ptr, weight_ptr, out_ptr, size, WIDTH: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
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
