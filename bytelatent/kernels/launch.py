# pyright: reportInvalidTypeForm=false
"""What all kernels share: Triton where it is installed, how they are launched, and small device functions.

The kernels of a decoding step take a few microseconds each, so the gaps between two of them count. With overlapped
launches a kernel is set up early and waits, on the device, until all kernels before it have finished; until then it
reads nothing but weights. This is "programmatic dependent launch": it takes a GPU of compute capability 9.0, and CUDA
graphs keep it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from bytelatent.errors import UserError

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:  # an optional dependency: only launching a kernel needs it

    class _MissingTriton:
        """Takes the place of `triton` and `triton.language` while modules of kernels are imported."""

        class constexpr:  # noqa: N801 named as Triton's
            def __init__(self, value: Any):
                self.value = value

        def jit(self, function: Any) -> "_MissingKernel":
            return _MissingKernel(function.__name__)

    class _MissingKernel:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            raise UserError(f"the kernel '{self.name}' needs Triton, which is not installed; run: pip install triton")

    triton = tl = _MissingTriton()

LOG2_E = 1.4426950408889634
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on a CPU, for tests

_overlapped = False


@contextmanager
def overlapped(enabled: bool = True) -> Iterator[None]:
    """Overlap the kernels that are launched, or captured, inside."""
    global _overlapped
    before, _overlapped = _overlapped, enabled
    try:
        yield
    finally:
        _overlapped = before


def launch_options() -> dict[str, Any]:
    """Keyword arguments for the launch of each kernel of a decoding step."""
    return {"OVERLAP": True, "launch_pdl": True} if _overlapped else {"OVERLAP": False}


def uses_kernels(x: Tensor) -> bool:
    """Whether an operation on `x` runs a Triton kernel; otherwise its plain form."""
    return x.is_cuda or INTERPRETED


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def check_contiguous(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        assert tensor is None or tensor.is_contiguous(), f"{name}: not contiguous"


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    assert heads % kv_heads == 0, f"{kv_heads} key/value heads do not divide {heads} query heads"
    assert head_dim & (head_dim - 1) == 0, f"a head size of {head_dim} is not a power of two"


@triton.jit
def fetch(at):
    """Prefetch 128 bytes at each of these addresses, multiples of 128, into the L2 cache."""
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_earlier(OVERLAP: tl.constexpr):
    """A kernel reads nothing that another kernel of the step writes, and writes nothing, before this."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
