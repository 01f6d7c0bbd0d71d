"""The Triton side of `gated_product`."""

import triton
import triton.language as tl

from bytelatent.kernels.overlap_triton import wait_for_earlier


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
