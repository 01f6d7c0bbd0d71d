"""The Triton side of `row_adamw`."""

import triton
import triton.language as tl


@triton.jit
def row_adamw_kernel(
    weight_ptr, mean_ptr, square_ptr, rows_ptr, grads_ptr, step_ptr, root_ptr,
    rest1, beta2, rest2, eps, keep, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    place = tl.load(rows_ptr + u) * D + d
    grad = tl.load(grads_ptr + u.to(tl.int64) * D + d, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + place, mask=inside, other=0.0)
    square = tl.load(square_ptr + place, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0)
    mean += (grad - mean) * rest1
    square = square * beta2 + grad * grad * rest2
    # Rounded as plain PyTorch rounds: the quick root and quotient of a GPU differ in the last digits.
    spread = tl.div_rn(tl.sqrt_rn(square), tl.load(root_ptr + u)) + eps
    weight = weight * keep - tl.div_rn(tl.load(step_ptr + u) * mean, spread)
    tl.store(mean_ptr + place, mean, mask=inside)
    tl.store(square_ptr + place, square, mask=inside)
    tl.store(weight_ptr + place, weight, mask=inside)
