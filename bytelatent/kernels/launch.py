# pyright: reportInvalidTypeForm=false
"""What all operations share: Triton where it is installed, launches, small device functions, and views for NumPy.

The kernels of a decode step take a few microseconds each, so the gaps between them count. With overlapped launches a
kernel is set up early and waits, on the device, until all kernels before it have finished; until then it reads nothing
but weights. This is "programmatic dependent launch": it takes a GPU of compute capability 9.0, and CUDA graphs keep it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
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
LOWEST = tl.constexpr(-1e30)  # below every score; an infinity makes NaN of its differences
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
    """Keyword arguments for the launch of each kernel of a decode step."""
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


# A decode step has many operations on few numbers. On a CPU NumPy takes a third of PyTorch's time for these, and waits
# for no threads, which takes milliseconds where another program has the core.


def array(tensor: Tensor, at: Any = None) -> np.ndarray:
    """A tensor, or the part `at` of it, for NumPy, float32; over the same memory where it is that on a CPU."""
    if tensor.dtype == torch.float32 and not tensor.is_cuda:
        return tensor.numpy() if at is None else tensor.numpy()[at]
    return (tensor if at is None else tensor[at]).float().cpu().numpy()


def write_back(tensor: Tensor, at: Any, values: np.ndarray) -> Tensor:
    """Write what was changed in `array(tensor, at)` to the tensor, unless it is over the same memory."""
    if tensor.dtype != torch.float32 or tensor.is_cuda:
        tensor[at] = torch.from_numpy(values)
    return tensor


def tensor_like(tensor: Tensor, values: np.ndarray) -> Tensor:
    """A tensor of the same dtype and on the same device; over the values' memory where it is float32 on a CPU."""
    made = torch.from_numpy(values)
    return made if tensor.dtype == torch.float32 and not tensor.is_cuda else made.to(tensor)


def attend_array(
    q_JGE: np.ndarray, k_RJE: np.ndarray, v_RJE: np.ndarray, bias_R: np.ndarray | None = None
) -> np.ndarray:
    """Softmax attention of G queries of each of J heads to R keys, [..., J, G, E]; `bias_R` is added to the scores."""
    scores_JGR = (q_JGE * q_JGE.shape[-1] ** -0.5) @ k_RJE.swapaxes(-3, -2).swapaxes(-2, -1)
    if bias_R is not None:
        scores_JGR += bias_R
    scores_JGR -= scores_JGR.max(-1, keepdims=True)
    weight_JGR = np.exp(scores_JGR, out=scores_JGR)
    weight_JGR /= weight_JGR.sum(-1, keepdims=True)
    return weight_JGR @ v_RJE.swapaxes(-3, -2)


class Arrays:
    """The tensors of a dataclass as arrays over the same memory, to read and to write."""

    def __init__(self, tensors: Any):
        self._tensors = tensors

    def __getattr__(self, name: str) -> np.ndarray:
        return _view(getattr(self._tensors, name))


@lru_cache(maxsize=1024)  # to make a view takes as long as the operation that it saves
def _view(tensor: Tensor) -> np.ndarray:
    return tensor.numpy()


# Device functions


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
