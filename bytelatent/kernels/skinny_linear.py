"""Products of a few rows with a large matrix, for decoding: the time is that of reading the matrix once.

RMSNorm divides each row by one number, so it may be done after the product: for one row the kernel sums the squares of
what it reads anyway, and the norm's weights are part of the matrix (`fold_norm`). The residual is added as the result
is written, and a SwiGLU's gate is applied to it.

For one row there is nothing for tensor cores to do: a program multiplies a few rows of the matrix with it and sums. For
more, rows of the matrix are the product's tall side and the states its narrow one.

A matrix may be a `QuantizedMatrix`: a byte a number is read instead of two.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.kernels.gated_product import fast_row_scale, row_scale
from bytelatent.kernels.overlap import launch_options
from bytelatent.kernels.quantized import Matrix, QuantizedMatrix, dense

# Shapes: M rows, at most a few hundred, K width of the states, N width of the result

LIBRARY_FROM = 64  # rows above which the library's product is faster, though its norm and gate are more kernels
FLOAT32_LIBRARY_FROM = 16  # the same for float32, which tensor cores would round
# The same of a quantized matrix. Written out for the library, nine bytes of it come and go for each one that the kernel
# reads, which it does once for every 32 rows. (Counted, not measured.)
QUANTIZED_LIBRARY_FROM = 128
PROGRAMS = 132  # that run at once on the GPU that the launches are chosen for


@dataclass(frozen=True)
class SkinnyLaunch:
    """How a product is cut into programs.

    Attributes:
        block_m: rows a program; 1: multiply and sum, else tensor cores and a power of two from 16 on.
        block_n: columns of the result a program, a power of two; from 16 on with tensor cores.
        block_k: how much of the width is looked at at once, a power of two; from 16 on with tensor cores.
        num_stages: how many such parts of the width are on their way at once.
        splits: programs that share the width; only with tensor cores. The last of them to finish adds up what they
            found, always in the same order.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


def launch_for(M: int, N: int, K: int, gated: bool = False, itemsize: int = 2) -> SkinnyLaunch:
    """The launch for M rows, N columns of the result and a width of K, of a matrix of `itemsize` bytes a number."""
    if M == 1:
        if gated or (K >= 2048 and N <= 2048):
            block_n = 4 if not gated and N * K > 2**23 else 2
            return SkinnyLaunch(1, block_n, min(_power_of_two(K), 1024), num_warps=4, num_stages=8)
        block_n = next((size for size in (8, 4) if size * PROGRAMS <= N), 2)
        # At 256 a warp has its own rows of the matrix, and no warp waits for another.
        return SkinnyLaunch(1, block_n, min(_power_of_two(K), 256), num_warps=min(block_n, 4), num_stages=8)
    # 64 rows of the matrix are what Hopper's tensor cores take from shared memory at once.
    block_m, block_n, block_k = (min(max(_power_of_two(size), 16), 64) for size in (M, N, K))
    if gated and N <= 64 * PROGRAMS // 2:
        block_n = min(block_n, 32)  # of either matrix
    tiles, splits = -(-M // block_m) * -(-N // block_n), 1
    while not gated and splits < 4 and tiles * splits * 2 <= PROGRAMS and splits * 2 * 512 <= K:
        splits *= 2
    if splits > 1:
        block_k = 128
    num_stages = 2 if itemsize >= 4 else 4 if splits > 1 else 5 if gated else 8
    return SkinnyLaunch(block_m, block_n, block_k, num_warps=4, num_stages=num_stages, splits=splits)


def fold_norm(weight_NK: Tensor, norm_K: Tensor) -> Tensor:
    """The matrix with the weights of the RMSNorm before it, in the matrix's dtype."""
    return (weight_NK.float() * norm_K.float()).to(weight_NK.dtype).contiguous()


def plain_skinny_linear(
    x_MK: Tensor,
    weight_NK: Matrix,
    *,
    eps: float | None = None,
    residual_MN: Tensor | None = None,
    residual_scale: float = 1.0,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """What `skinny_linear` computes, in float32."""
    y_MN = _scaled_product(x_MK, weight_NK, eps)
    if residual_MN is not None:
        y_MN = y_MN + residual_scale * residual_MN.float()
    dtype = x_MK.dtype if residual_MN is None else residual_MN.dtype
    return _written(y_MN, dtype, out, run)


def plain_skinny_gated(
    x_MK: Tensor,
    gate_up_2NK: Matrix,
    *,
    eps: float | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """What `skinny_gated` computes, in float32."""
    y_M2N = _scaled_product(x_MK, gate_up_2NK, eps)
    return _written(F.silu(y_M2N[:, 0::2]) * y_M2N[:, 1::2], x_MK.dtype, out, run)


def skinny_linear(
    x_MK: Tensor,
    weight_NK: Matrix,
    *,
    eps: float | None = None,
    residual_MN: Tensor | None = None,
    residual_scale: float = 1.0,
    out: Tensor | None = None,
    run: Tensor | None = None,
    launch: SkinnyLaunch | None = None,
) -> Tensor:
    """x Weight^T, of the normed x if `eps` is given, plus a residual, [M, N].

    A row's result does not depend on other rows, and equal rows have equal results.

    Args:
        x_MK: states; rows may lie apart.
        weight_NK: the matrix, contiguous; with `eps` see `fold_norm`. A quantized one is multiplied in x's dtype.
        eps: of the RMSNorm before the product; None for none.
        residual_MN: what the product is added to.
        residual_scale: what the residual is multiplied with first; cross-attention adds its input twice.
        out: where the result goes, of any dtype; may be the residual. A new tensor of the residual's dtype, else x's.
        run: one number on the device; where it is 0 nothing is written, or, with many rows, anything may be.
        launch: see `launch_for`.
    """
    dtype = x_MK.dtype if residual_MN is None else residual_MN.dtype
    return _launched(x_MK, weight_NK, False, eps, residual_MN, residual_scale, dtype, out, run, launch)


def skinny_gated(
    x_MK: Tensor,
    gate_up_2NK: Matrix,
    *,
    eps: float | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
    launch: SkinnyLaunch | None = None,
) -> Tensor:
    """silu(x Gate^T) * (x Up^T), of the normed x if `eps` is given, [M, N].

    Args:
        gate_up_2NK: both matrices, row by row in turn; see `interleaved` and `fold_norm`.

    The others are those of `skinny_linear`.
    """
    return _launched(x_MK, gate_up_2NK, True, eps, None, 1.0, x_MK.dtype, out, run, launch)


def _launched(
    x: Tensor,
    matrix: Matrix,
    gated: bool,
    eps: float | None,
    residual: Tensor | None,
    residual_scale: float,
    dtype: torch.dtype,
    out: Tensor | None,
    run: Tensor | None,
    launch: SkinnyLaunch | None,
) -> Tensor:
    from bytelatent.kernels import skinny_linear_triton

    kernels: Any = skinny_linear_triton
    weight, scale = (matrix.values, matrix.scale) if isinstance(matrix, QuantizedMatrix) else (matrix, None)
    M, K = x.shape
    N = weight.shape[0] // (2 if gated else 1)
    assert weight.shape[1] == K, f"states of width {K}, a matrix for {weight.shape[1]}"
    assert weight.is_contiguous(), "the matrix is not contiguous"
    assert weight.numel() < 2**31, "the kernel counts places in the matrix in 32 bits"
    out = torch.empty(M, N, dtype=dtype, device=x.device) if out is None else out
    for name, tensor, width in (("x", x, K), ("residual", residual, N), ("out", out, N)):
        if tensor is not None:
            assert tensor.shape == (M, width), f"{name}: {tuple(tensor.shape)}, not {(M, width)}"
            assert tensor.stride(1) == 1, f"{name}: a row is not contiguous"
    most = LIBRARY_FROM if weight.element_size() < 4 else FLOAT32_LIBRARY_FROM
    most = most if scale is None else QUANTIZED_LIBRARY_FROM
    if len(x) > most and launch is None and x.is_cuda:
        return _by_library(x, dense(matrix, x.dtype), gated, eps, residual, residual_scale, dtype, out)
    launch = launch or launch_for(M, N, K, gated, weight.element_size())
    x_row, residual_row, out_row = (0 if tensor is None else tensor.stride(0) for tensor in (x, residual, out))
    options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **launch_options()}
    shape = {"N": N, "K": K, "GATED": gated, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k}
    if launch.block_m == 1:
        kernels.vector_kernel[-(-N // launch.block_n), M](
            *(x, weight, scale, residual, out, run, eps or 0.0, residual_scale, x_row, residual_row, out_row),
            **shape,
            NORM=eps is not None,
            STAGES=launch.num_stages,
            **options,
        )
        return out
    grid = (-(-M // launch.block_m), -(-N // launch.block_n), launch.splits)
    sums = arrived = None
    if launch.splits > 1:
        assert math.prod(grid) <= PROGRAMS, f"{math.prod(grid)} programs share widths; at most {PROGRAMS}"
        assert launch.block_m * launch.block_n * (1 + gated) <= 64 * 64, f"blocks of shared widths: {launch}"
        sums, arrived = _scratch(x.device, torch.cuda.current_stream().cuda_stream if x.is_cuda else 0)
    x_scale = None if eps is None else fast_row_scale(x, eps, run)
    kernels.matrix_kernel[grid](
        *(x, weight, scale, x_scale, residual, out, run, residual_scale, x_row, residual_row, out_row),
        *(sums, arrived, M),
        **shape,
        BLOCK_M=launch.block_m,
        SPLITS=launch.splits,
        **options,
    )
    return out


@cache
def _scratch(device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """What programs that share the width leave for each other: their sums, and how many are done.

    Launches that follow one another on a stream use the same; the counts are 0 between them.
    """
    return torch.empty(PROGRAMS * 64 * 64, device=device), torch.zeros(PROGRAMS, dtype=torch.int32, device=device)


def plain_gate(gate_up_M2N: Tensor) -> Tensor:
    """What `gate` computes."""
    return (F.silu(gate_up_M2N[:, 0::2].float()) * gate_up_M2N[:, 1::2]).to(gate_up_M2N.dtype)


def gate(gate_up_M2N: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up of columns that are gate and up in turn, [M, N]."""
    from bytelatent.kernels import skinny_linear_triton

    kernels: Any = skinny_linear_triton
    rows, columns, block = gate_up_M2N.shape[0], gate_up_M2N.shape[1] // 2, 512
    if out is None:
        out = torch.empty(rows, columns, dtype=gate_up_M2N.dtype, device=gate_up_M2N.device)
    assert gate_up_M2N.is_contiguous(), "the columns are not contiguous"
    kernels.gate_kernel[(rows, -(-columns // block))](
        gate_up_M2N, out, N=columns, BLOCK=block, num_warps=4, **launch_options()
    )
    return out


def _by_library(
    x: Tensor,
    weight: Tensor,
    gated: bool,
    eps: float | None,
    residual: Tensor | None,
    residual_scale: float,
    dtype: torch.dtype,
    out: Tensor | None,
) -> Tensor:
    """Many rows: the product is the library's, the norm's scale and the gate are kernels of their own."""
    if eps is not None:
        x = F.rms_norm(x, (x.shape[1],), None, eps)
    x = x.to(weight.dtype)
    if gated:
        return gate(x @ weight.T, out)
    if residual is not None and out is residual:
        return residual.addmm_(x, weight.T, beta=residual_scale)  # in place: out of place it would copy first
    wanted = dtype if out is None else out.dtype
    y = torch.mm(x, weight.T, out_dtype=wanted) if wanted == torch.float32 != weight.dtype else x @ weight.T
    if residual is not None:
        y = y.add(residual, alpha=residual_scale)
    return y.to(dtype) if out is None else out.copy_(y)


def _scaled_product(x: Tensor, weight: Matrix, eps: float | None) -> Tensor:
    product = x.float() @ dense(weight, torch.float32).float().T
    return product if eps is None else product * row_scale(x, eps)[:, None]


def _written(y: Tensor, dtype: torch.dtype, out: Tensor | None, run: Tensor | None) -> Tensor:
    """Put `y` where it belongs, unless `run` is 0."""
    out = y.new_zeros(y.shape, dtype=dtype) if out is None else out
    if run is None or bool(run):
        out.copy_(y)
    return out


def _power_of_two(size: int) -> int:
    """The next one."""
    return 1 << (size - 1).bit_length()
