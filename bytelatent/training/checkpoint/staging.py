"""Copies of a run's tensors on the CPU, from which a checkpoint is written while training continues."""

import mmap
import threading
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bytelatent.training.distributed.fsdp import local_part


class CpuCopies:
    """Memory for copies, reused from one save to the next.

    Memory for copies of GPU tensors is pinned: copying is many times faster, but pinning takes seconds. So it happens
    in the background; see `prepare`.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._pinning: threading.Thread | None = None
        self._pinned: list[int] = []  # addresses

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Begin to allocate memory for copies of such tensors."""
        self.close()
        self._copies = empty_copies(tensors)
        on_gpu = [name for name, value in tensors.items() if value.is_cuda]
        if on_gpu:
            given = [local_part(self._copies[name]) for name in on_gpu], tensors[on_gpu[0]].device.index
            self._pinning = threading.Thread(target=self._pin, args=given, daemon=True)
            self._pinning.start()

    @property
    def are_prepared(self) -> bool:
        return self._pinning is None or not self._pinning.is_alive()

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, valid until the next call."""
        if not self._fit(tensors):
            self.prepare(tensors)
        self._wait()
        devices = {value.device for value in tensors.values() if value.is_cuda}
        for name, value in tensors.items():
            local_part(self._copies[name]).copy_(local_part(value), non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        return dict(self._copies)

    def close(self) -> None:
        """Unpin the memory. Copies that were taken stay readable until the last reference to them is gone."""
        self._wait()
        for address in self._pinned:
            _cudart().cudaHostUnregister(address)
        self._copies, self._pinned = {}, []

    def _fit(self, tensors: dict[str, Tensor]) -> bool:
        return self._copies.keys() == tensors.keys() and all(
            (local_part(copy).shape, copy.dtype) == (local_part(tensors[name]).shape, tensors[name].dtype)
            for name, copy in self._copies.items()
        )

    def _wait(self) -> None:
        if self._pinning is not None:
            self._pinning.join()
            self._pinning = None

    def _pin(self, copies: list[Tensor], gpu: int) -> None:
        """Pin each copy by itself: one must not lie in memory that was pinned in two calls. If CUDA refuses, copying is
        slower.
        """
        for copy in copies:
            copy.zero_()  # allocates the pages with several threads; pinning would do so with one
            with torch.cuda.device(gpu):  # a new thread is on the first GPU, where this would take memory
                if copy.nbytes and int(_cudart().cudaHostRegister(copy.data_ptr(), copy.nbytes, 0)) == 0:
                    self._pinned.append(copy.data_ptr())


def empty_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Empty tensors on the CPU, spread over ranks as the given ones are, each on memory pages of its own."""
    sizes = [-(-local_part(value).nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for value in tensors.values()]
    pages = mmap.mmap(-1, max(sum(sizes), 1))
    with suppress(AttributeError, OSError):  # huge pages, which not every system has, are faster to allocate
        pages.madvise(mmap.MADV_HUGEPAGE)
    copies, begin = {}, 0
    for (name, value), size in zip(tensors.items(), sizes, strict=True):
        part, copy = local_part(value), torch.empty(0)
        if part.numel():  # each with a storage of its own: with a view, the whole storage would be saved
            copy = torch.frombuffer(pages, dtype=part.dtype, count=part.numel(), offset=begin)
        copies[name] = _spread_like(value, copy.to(part.dtype).view(part.shape))
        begin += size
    return copies


def _spread_like(value: Tensor, part: Tensor) -> Tensor:
    """A tensor on the CPU, of which this rank holds `part` as it holds its part of `value`."""
    if not isinstance(value, DTensor):
        return part
    whole: Any = torch.empty_like(value, device="cpu")
    whole._local_tensor = part  # DTensor.from_local would move it to the device of the mesh
    return whole


def _cudart() -> Any:
    """CUDA's runtime."""
    return torch.cuda.cudart()
