"""Whether a kernel of a decoding step may be launched while the one before it still runs.

A step is a chain of kernels of a few microseconds each, so what lies between two kernels counts. Overlapped, a kernel
is set up early and waits, on the device, until all before it have finished; until then it reads nothing but weights.
That is "programmatic dependent launch"; it takes a GPU of compute capability 9.0, and CUDA graphs keep it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    """What the launch of each kernel of a decoding step is given."""
    return {"OVERLAP": True, "launch_pdl": True} if _overlapped else {"OVERLAP": False}
