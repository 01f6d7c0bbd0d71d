# pyright: reportInvalidTypeForm=false
"""Products of a few rows with a large matrix, for decoding: the time is that of reading the matrix once.

RMSNorm divides each row by one number, so it may be done after the product, and the norm's weights are part of the
matrix (`fold_norm`). For one row the kernel sums the squares of what it reads anyway; for more, the product that wrote
the states has left the sums (`Squares`). The residual is added as the result is written, and a SwiGLU's gate is applied
to it.

For one row there is nothing for tensor cores to do: a program multiplies a few rows of the matrix with it and sums. For
more, rows of the matrix are the product's tall side and the states its narrow one.

A matrix may be a `QuantizedMatrix`: a byte a number is read instead of two.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.kernels.gated_product import gate, gate_array
from bytelatent.kernels.launch import (
    array,
    fetch,
    launch_options,
    power_of_two,
    tensor_like,
    tl,
    triton,
    uses_kernels,
    wait_for_earlier,
    write_back,
)
from bytelatent.kernels.quantized import Matrix, QuantizedMatrix, dense
from bytelatent.kernels.skinny_launch import PROGRAMS, SkinnyLaunch, launch_for

# Shapes: M rows, at most a few hundred, K width of the states, N width of the result, S blocks of columns

LIBRARY_FROM = 64  # rows above which the library's product is faster, though its norm and gate are more kernels
FLOAT32_LIBRARY_FROM = 16  # the same for float32, which tensor cores would round
# The same of a quantized matrix. Written out for the library, nine bytes of it come and go for each one that the kernel
# reads, which it does once for every 32 rows. (Counted, not measured.)
QUANTIZED_LIBRARY_FROM = 128
SMALL = 1 << 18  # multiplications of a product, for which OpenBLAS, NumPy's on most machines, uses one thread
FETCHED = tl.constexpr(512)  # numbers of each row that are fetched while the kernel before runs


@dataclass
class Squares:
    """The squares of states, summed as a product writes them, for the norm of the product that reads them."""

    sums_MS: Tensor | None = None  # float32, of each row's blocks of columns; None: who reads the states sums them


def fold_norm(weight_NK: Tensor, norm_K: Tensor) -> Tensor:
    """The matrix with the weights of the RMSNorm before it, in the matrix's dtype."""
    return (weight_NK.float() * norm_K.float()).to(weight_NK.dtype).contiguous()


def plain_skinny_linear(
    x_MK: Tensor,
    weight_NK: Matrix,
    gated: bool = False,
    eps: float | None = None,
    residual_MN: Tensor | None = None,
    residual_scale: float = 1.0,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """The plain form, whose matrix is multiplied in the precision of x."""
    if run is not None and not bool(run):
        return x_MK.new_zeros(len(x_MK), weight_NK.shape[0] // (1 + gated)) if out is None else out
    y_MN = _plain_product(x_MK, weight_NK, eps)
    if gated:
        y_MN = gate_array(y_MN)
    if residual_MN is not None:
        residual = array(residual_MN)
        y_MN += residual if residual_scale == 1 else residual * residual_scale
    if out is None:
        return tensor_like(x_MK if residual_MN is None else residual_MN, y_MN)
    array(out)[:] = y_MN
    return write_back(out, ..., y_MN)


def _plain_product(x_MK: Tensor, weight_NK: Matrix, eps: float | None) -> np.ndarray:
    """x Weight^T, of the normed x if `eps` is given. NumPy computes small products: it waits for no threads."""
    x = array(x_MK)
    if eps is not None:
        # The dot product is the fastest sum of squares, of a single row.
        squares = np.vdot(x, x) / x.size if len(x) == 1 else np.square(x).mean(1, keepdims=True)
        x = x * (squares + eps) ** -0.5
    if x_MK.dtype == torch.float32 and isinstance(weight_NK, Tensor) and len(x) * weight_NK.numel() <= SMALL:
        return x @ array(weight_NK).T
    return array(F.linear(torch.from_numpy(x).to(x_MK), dense(weight_NK, x_MK.dtype)))


def skinny_linear(
    x_MK: Tensor,
    weight_NK: Matrix,
    *,
    gated: bool = False,
    eps: float | None = None,
    residual_MN: Tensor | None = None,
    residual_scale: float = 1.0,
    out: Tensor | None = None,
    run: Tensor | None = None,
    squares: Squares | None = None,
    launch: SkinnyLaunch | None = None,
) -> Tensor:
    """x Weight^T, of the normed x if `eps` is given, plus a residual; or silu(x Gate^T) * (x Up^T); [M, N].

    A row's result does not depend on other rows, and equal rows have equal results.

    Args:
        x_MK: states; rows need not be adjacent.
        weight_NK: the matrix, contiguous; with `eps` see `fold_norm`. A quantized one is multiplied in x's dtype.
        gated: the matrix is [2N, K], Gate and Up row by row alternately, see `interleaved`; without a residual.
        eps: of the RMSNorm before the product; None for no norm.
        residual_MN: what the product is added to.
        residual_scale: what the residual is multiplied with first; cross-attention adds its input twice.
        out: where the result goes, of any dtype; may be the residual. A new tensor of the residual's dtype, else x's.
        run: one number on the device; where it is 0 nothing is written, or, with many rows, anything may be.
        squares: with `eps` those of x; else the result's are left there.
        launch: see `launch_for`.
    """
    if not uses_kernels(x_MK):
        return plain_skinny_linear(x_MK, weight_NK, gated, eps, residual_MN, residual_scale, out, run)
    left = squares if eps is None else None
    if left is not None:
        left.sums_MS = None  # another result's
    is_quantized = isinstance(weight_NK, QuantizedMatrix)
    weight, scale = (weight_NK.values, weight_NK.scale) if is_quantized else (weight_NK, None)
    most = LIBRARY_FROM if weight.element_size() < 4 else FLOAT32_LIBRARY_FROM
    if len(x_MK) > (QUANTIZED_LIBRARY_FROM if is_quantized else most) and launch is None and x_MK.is_cuda:
        return _by_library(x_MK, dense(weight_NK, x_MK.dtype), gated, eps, residual_MN, residual_scale, out)
    (M, K), N = x_MK.shape, weight.shape[0] // (1 + gated)
    if out is None:
        out = torch.empty(M, N, dtype=(x_MK if residual_MN is None else residual_MN).dtype, device=x_MK.device)
    tensors = x_MK, residual_MN, out
    assert weight.is_contiguous(), "the matrix is not contiguous"
    assert weight.numel() < 2**31, "the kernel counts places in the matrix in 32 bits"
    assert all(part is None or part.stride(1) == 1 for part in tensors), "a row is not contiguous"
    x_row, residual_row, out_row = (0 if part is None else part.stride(0) for part in tensors)
    launch = launch or launch_for(M, N, K, gated, weight.element_size())
    options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch_options()}
    options |= {"N": N, "K": K, "GATED": gated, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k}
    if launch.block_m == 1:
        vector_kernel[-(-N // launch.block_n), M](
            *(x_MK, weight, scale, residual_MN, out, run, eps or 0.0, residual_scale, x_row, residual_row, out_row),
            **(options | {"NORM": eps is not None, "STAGES": launch.num_stages}),
        )
        return out
    grid = (-(-M // launch.block_m), -(-N // launch.block_n), launch.splits)
    sums = arrived = None
    if launch.splits > 1:
        assert math.prod(grid) <= PROGRAMS, f"{math.prod(grid)} programs share widths; at most {PROGRAMS}"
        assert launch.block_m * launch.block_n * (1 + gated) <= 64 * 64, f"blocks of shared widths: {launch}"
        sums, arrived = _scratch(x_MK.device, torch.cuda.current_stream().cuda_stream if x_MK.is_cuda else 0)
    of_x = None if squares is None or eps is None else squares.sums_MS
    assert of_x is None or len(of_x) == M, "squares of other rows"
    if left is not None:
        assert not gated, "a gated product leaves no squares"
        left.sums_MS = torch.empty(M, grid[1], dtype=torch.float32, device=x_MK.device)
    matrix_kernel[grid](
        *(x_MK, weight, scale, of_x, residual_MN, out, None if left is None else left.sums_MS, run),
        *(eps or 0.0, residual_scale, x_row, residual_row, out_row, sums, arrived, M),
        **(options | {"NORM": eps is not None, "BLOCK_M": launch.block_m, "SPLITS": launch.splits}),
        S=0 if of_x is None else of_x.shape[1],
        PADDED_S=1 if of_x is None else power_of_two(of_x.shape[1]),
    )
    return out


@cache
def _scratch(device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """What programs that share the width leave for each other: their sums, and how many are done.

    Launches that follow one another on a stream use the same; the counts are 0 between them.
    """
    return torch.empty(PROGRAMS * 64 * 64, device=device), torch.zeros(PROGRAMS, dtype=torch.int32, device=device)


def _by_library(
    x_MK: Tensor,
    weight_NK: Tensor,
    gated: bool,
    eps: float | None,
    residual_MN: Tensor | None,
    residual_scale: float,
    out: Tensor | None,
) -> Tensor:
    """Many rows: the product is the library's, the norm's scale and the gate are kernels of their own."""
    dtype = (x_MK if residual_MN is None else residual_MN).dtype
    if eps is not None:
        x_MK = F.rms_norm(x_MK, (x_MK.shape[1],), None, eps)
    x_MK, weight_KN = x_MK.to(weight_NK.dtype), weight_NK.T
    if gated:
        return gate(x_MK @ weight_KN, out)
    if residual_MN is not None and out is residual_MN:
        return residual_MN.addmm_(x_MK, weight_KN, beta=residual_scale)  # in place: out of place it would copy first
    is_widened = (dtype if out is None else out.dtype) == torch.float32 != weight_NK.dtype
    y_MN = torch.mm(x_MK, weight_KN, out_dtype=torch.float32) if is_widened else x_MK @ weight_KN
    if residual_MN is not None:
        y_MN = y_MN.add(residual_MN, alpha=residual_scale)
    return y_MN.to(dtype) if out is None else out.copy_(y_MN)


# Kernels


@triton.jit
def finished(y, up, squares, eps, K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr):
    """The norm's scale and the gate; `squares` is broadcast to the shape of `y`."""
    if NORM:
        scale = tl.rsqrt(squares / K + eps)
        y = y * scale
        if GATED:
            up = up * scale
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * up
    return y


@triton.jit
def row_scales(scale_ptr, n, N: tl.constexpr, GATED: tl.constexpr):
    """What the sums of a quantized matrix's rows are multiplied with, and those of a gate's other matrix."""
    scale, scale_up = 1.0, 1.0
    if scale_ptr is not None:
        at = scale_ptr + tl.minimum(n, N - 1) * (2 if GATED else 1)
        scale = tl.load(at)
        if GATED:
            scale_up = tl.load(at + 1)
    return scale, scale_up


@triton.jit
def summed(acc, acc_up, squares, weight, x_at, k, at, K: tl.constexpr, GATED: tl.constexpr):
    """One more part of the width, which begins at `at`."""
    within = (k < K - at)[None, :]
    x = tl.load(x_at + at, mask=within, other=0.0).to(tl.float32)
    acc += tl.load(weight + at, mask=within, other=0.0).to(tl.float32) * x
    if GATED:
        acc_up += tl.load(weight + (K + at), mask=within, other=0.0).to(tl.float32) * x
    return acc, acc_up, squares + x * x


@triton.jit
def vector_kernel(
    x_ptr, weight_ptr, scale_ptr, residual_ptr, out_ptr, run_ptr, eps, residual_scale, x_row, residual_row, out_row,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    MATRICES: tl.constexpr = 2 if GATED else 1
    EARLY: tl.constexpr = OVERLAP and run_ptr is None  # the first weights need not wait, but should not be read in vain
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    # Columns past the end repeat the last one: no mask, and what they are is not stored.
    weight = weight_ptr + tl.minimum(n, N - 1)[:, None] * (MATRICES * K) + k[None, :]
    within = (k < K)[None, :]
    if EARLY:
        w = tl.load(weight, mask=within, other=0.0)
        if GATED:
            w_up = tl.load(weight + K, mask=within, other=0.0)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    if not EARLY:
        w = tl.load(weight, mask=within, other=0.0)
        if GATED:
            w_up = tl.load(weight + K, mask=within, other=0.0)
    scale, scale_up = row_scales(scale_ptr, n, N, GATED)
    # Every column loads x again, from the L1 cache: as the threads lie for the weights, so that none waits for another.
    x_at = x_ptr + m * x_row + tl.zeros([BLOCK_N, 1], tl.int32) + k[None, :]
    x = tl.load(x_at, mask=within, other=0.0).to(tl.float32)
    acc = w.to(tl.float32) * x
    acc_up = acc
    if GATED:
        acc_up = w_up.to(tl.float32) * x
    squares = x * x
    if K <= STAGES * BLOCK_K:
        for at in tl.static_range(BLOCK_K, K, BLOCK_K):
            acc, acc_up, squares = summed(acc, acc_up, squares, weight, x_at, k, at, K, GATED)
    else:
        for at in tl.range(BLOCK_K, K, BLOCK_K, loop_unroll_factor=STAGES):
            acc, acc_up, squares = summed(acc, acc_up, squares, weight, x_at, k, at, K, GATED)
    up = tl.sum(acc_up, 1) * scale_up if GATED else 0.0
    y = finished(tl.sum(acc, 1) * scale, up, tl.sum(squares, 1), eps, K, NORM, GATED)
    stored = n < N
    if residual_ptr is not None:
        y += residual_scale * tl.load(residual_ptr + m * residual_row + n, mask=stored, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * out_row + n, y.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def squares_of(x_at, k, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum of each row's squares."""
    squares = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for at in tl.range(0, K, BLOCK_K):
        x = tl.load(x_at + at, mask=(k < K - at)[:, None], other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares, 0)


@triton.jit
def matrix_kernel(
    x_ptr, weight_ptr, scale_ptr, squares_ptr, residual_ptr, out_ptr, left_ptr, run_ptr, eps, residual_scale, x_row,
    residual_row, out_row, sums_ptr, arrived_ptr, M, N: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PADDED_S: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Loads feed one `tl.dot` and nothing else: else Triton 3.6 refills a buffer that a product still reads.

    So the norm's squares are loaded apart, before the product, behind which the time that this takes is hidden.
    """
    MATRICES: tl.constexpr = 2 if GATED else 1
    ROWS: tl.constexpr = MATRICES * BLOCK_N  # of the matrix; gates and what they gate alternately
    # Programs that share rows of the matrix follow each other.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    # What lies past the end repeats the last row or column: no mask, and what it is is not stored.
    row = tl.minimum(row, MATRICES * N - 1)
    PART: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    begin = tl.program_id(2) * PART
    if OVERLAP and run_ptr is None:  # the first weights need not wait, but should not be read in vain
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth
        early = tl.minimum(begin + tl.arange(0, FETCHED // LINE) * LINE, K - 1)
        fetch(weight_ptr + row[:, None] * K + early[None, :])
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    weight = weight_ptr + row[:, None] * K + k[None, :]
    x_at = x_ptr + tl.minimum(m, M - 1).to(tl.int64)[None, :] * x_row + k[:, None]
    if NORM:
        if squares_ptr is None:
            squares = squares_of(x_at, k, K, BLOCK_M, BLOCK_K)[None, :]
        else:
            block = tl.arange(0, PADDED_S)[:, None]
            squares_at = squares_ptr + tl.minimum(m, M - 1)[None, :] * S + block
            squares = tl.load(squares_at, mask=block < S, other=0.0)
    acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
    for at in tl.range(begin, tl.minimum(begin + PART, K), BLOCK_K):
        if K % BLOCK_K == 0:
            x = tl.load(x_at + at)
            w = tl.load(weight + at)
        else:
            within = k < K - at
            x = tl.load(x_at + at, mask=within[:, None], other=0.0)
            w = tl.load(weight + at, mask=within[None, :], other=0.0)
        if scale_ptr is not None:
            w = w.to(x.dtype)
        acc = tl.dot(w, x.to(w.dtype), acc, input_precision="ieee")
    if SPLITS > 1:
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        inner = tl.arange(0, ROWS)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(sums_ptr + (tile * SPLITS + tl.program_id(2)) * (ROWS * BLOCK_M) + inner, acc)
        tl.debug_barrier()  # all threads have written before the count
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") != SPLITS - 1:
            return
        acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
        for other in tl.static_range(SPLITS):
            acc += tl.load(sums_ptr + (tile * SPLITS + other) * (ROWS * BLOCK_M) + inner, cache_modifier=".cg")
        tl.store(arrived_ptr + tile, 0)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + row)[:, None]
    if NORM:
        acc *= tl.rsqrt(tl.sum(squares, 0) / K + eps)[None, :]
    y = acc
    if GATED:
        y, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_N, 2, BLOCK_M]), (0, 2, 1)))
        y = y / (1.0 + tl.exp(-y)) * up
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    stored = (n < N)[:, None] & (m < M)[None, :]
    wide = m.to(tl.int64)[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + wide * residual_row + n[:, None], mask=stored, other=0.0)
        y += residual_scale * residual.to(tl.float32)
    y = y.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + wide * out_row + n[:, None], y, mask=stored)
    if left_ptr is not None:
        y = tl.where(stored, y.to(tl.float32), 0.0)
        tl.store(left_ptr + m * tl.num_programs(1) + tl.program_id(1), tl.sum(y * y, 0), mask=m < M)
