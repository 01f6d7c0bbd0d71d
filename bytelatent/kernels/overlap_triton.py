"""The Triton side of `overlap`."""

import triton
import triton.language as tl


@triton.jit
def wait_for_earlier(OVERLAP: tl.constexpr):
    """Nothing that another kernel of the step writes may be read before this, nothing written."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
