"""The Triton side of `overlap`."""

import triton
import triton.language as tl


@triton.jit
def fetch(at):
    """Have what lies at these addresses brought to the L2 cache, 128 bytes from each multiple of as many."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_earlier(OVERLAP: tl.constexpr):
    """Nothing that another kernel of the step writes may be read before this, nothing written."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
