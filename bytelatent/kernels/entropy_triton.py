"""The Triton side of `entropy`."""

import triton
import triton.language as tl

from bytelatent.kernels.overlap_triton import wait_for_earlier


@triton.jit
def entropy_kernel(logits_ptr, out_ptr, run_ptr, row, V: tl.constexpr, PADDED: tl.constexpr, OVERLAP: tl.constexpr):
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    m = tl.program_id(0)
    v = tl.arange(0, PADDED)
    logits = tl.load(logits_ptr + m.to(tl.int64) * row + v, mask=v < V, other=-float("inf")).to(tl.float32)
    above = logits - tl.max(logits, 0)
    weight = tl.exp(above)
    total = tl.sum(weight, 0)
    # H = log Z - sum p x, and a weight of 0 adds nothing, though its logit may be lowest.
    mean = tl.sum(tl.where(weight > 0, weight * above, 0.0), 0) / total
    tl.store(out_ptr + m, tl.log(total) - mean)
