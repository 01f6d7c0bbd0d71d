"""The Triton side of `row_sums`."""

import triton
import triton.language as tl

FEW: tl.constexpr = tl.constexpr(4)  # lookups of a row that are added at once: most rows have no more,
MANY: tl.constexpr = tl.constexpr(16)  # and what is over of those that have


@triton.jit
def row_sums_kernel(rows_ptr, order_ptr, end_ptr, grads_ptr, out_ptr, N, D: tl.constexpr, BLOCK: tl.constexpr):
    """The program of a row's first lookup adds the gradients of all; each lookup's number is state * N + table."""
    begin = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + begin)
    if tl.load(rows_ptr + begin - 1, mask=begin > 0, other=-1) == row:
        return
    end = tl.load(end_ptr + begin)
    x = add_lookups(begin, end, order_ptr, grads_ptr, d, N, D, FEW)
    for first in range(begin + FEW, end, MANY):
        x += add_lookups(first, end, order_ptr, grads_ptr, d, N, D, MANY)
    tl.store(out_ptr + row * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def add_lookups(first, end, order_ptr, grads_ptr, d, N, D: tl.constexpr, COUNT: tl.constexpr):
    """The sum of `COUNT` lookups from `first` on, or of those there are before `end`, float32."""
    place = first + tl.arange(0, COUNT)
    state = tl.load(order_ptr + place, mask=place < end, other=0) // N
    inside = (place < end)[:, None] & (d < D)[None, :]
    grads = tl.load(grads_ptr + state[:, None] * D + d[None, :], mask=inside, other=0.0)
    return tl.sum(grads.to(tl.float32), 0)
