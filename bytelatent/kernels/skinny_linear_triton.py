"""The Triton side of `skinny_linear`."""

import triton
import triton.language as tl

from bytelatent.kernels.overlap_triton import fetch, wait_for_earlier

FETCHED = tl.constexpr(512)  # numbers of each row that are fetched while the kernel before runs


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
    # Every column loads x anew, from the L1 cache: as the threads lie for the weights, so that none waits for another.
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
def matrix_kernel(
    x_ptr, weight_ptr, scale_ptr, x_scale_ptr, residual_ptr, out_ptr, run_ptr, residual_scale, x_row, residual_row,
    out_row, sums_ptr, arrived_ptr, M, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Loads feed one `tl.dot` and nothing else: else Triton 3.6 refills a buffer that a product still reads."""
    MATRICES: tl.constexpr = 2 if GATED else 1
    ROWS: tl.constexpr = MATRICES * BLOCK_N  # of the matrix; gates and what they gate in turn
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
        tl.debug_barrier()  # all threads have written before one of them says so
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") != SPLITS - 1:
            return
        acc = tl.zeros([ROWS, BLOCK_M], tl.float32)
        for other in tl.static_range(SPLITS):
            acc += tl.load(sums_ptr + (tile * SPLITS + other) * (ROWS * BLOCK_M) + inner, cache_modifier=".cg")
        tl.store(arrived_ptr + tile, 0)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + row)[:, None]
    if x_scale_ptr is not None:
        acc *= tl.load(x_scale_ptr + tl.minimum(m, M - 1))[None, :]
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
    tl.store(out_ptr + wide * out_row + n[:, None], y.to(out_ptr.dtype.element_ty), mask=stored)


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
