"""Copies of a run's tensors on the CPU, from which a checkpoint is written while steps go on."""

import mmap
import threading
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bytelatent.training.distributed.plan import local_part


class Copies:
    """Memory for copies, kept from one save to the next.

    That of tensors on a GPU is pinned: it is many times as fast to fill, but takes seconds to get. So it is got in the
    background; see `prepare`.
    """

    def __init__(self) -> None:
        self._places: dict[str, Tensor] = {}
        self._pinning: threading.Thread | None = None
        self._pinned: list[int] = []  # where they begin

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Begin to get memory for copies of such tensors."""
        self.close()
        self._places = empty_copies(tensors)
        of_gpu = [name for name, value in tensors.items() if value.is_cuda]
        if of_gpu:
            given = [local_part(self._places[name]) for name in of_gpu], tensors[of_gpu[0]].device.index
            self._pinning = threading.Thread(target=self._pin, args=given, daemon=True)
            self._pinning.start()

    @property
    def are_prepared(self) -> bool:
        return self._pinning is None or not self._pinning.is_alive()

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, good until the next are taken."""
        if not self._fit(tensors):
            self.prepare(tensors)
        self._wait()
        devices = {value.device for value in tensors.values() if value.is_cuda}
        for name, value in tensors.items():
            local_part(self._places[name]).copy_(local_part(value), non_blocking=True)
        for device in devices:
            torch.cuda.synchronize(device)
        return dict(self._places)

    def close(self) -> None:
        """Copies that were taken can be read until the last reference to them is gone."""
        self._wait()
        for begin in self._pinned:
            _cudart().cudaHostUnregister(begin)
        self._places, self._pinned = {}, []

    def _fit(self, tensors: dict[str, Tensor]) -> bool:
        return self._places.keys() == tensors.keys() and all(
            (local_part(place).shape, place.dtype) == (local_part(value).shape, value.dtype)
            for place, value in zip(self._places.values(), (tensors[name] for name in self._places), strict=True)
        )

    def _wait(self) -> None:
        if self._pinning is not None:
            self._pinning.join()
            self._pinning = None

    def _pin(self, places: list[Tensor], gpu: int) -> None:
        """One after the other; a copy must not lie in memory that was pinned at two times. Where it is refused, copying
        is slower."""
        for place in places:
            place.zero_()  # by several threads; pinning would get the pages by one
            with torch.cuda.device(gpu):  # a thread begins on the first GPU, where this would take memory
                if place.nbytes and int(_cudart().cudaHostRegister(place.data_ptr(), place.nbytes, 0)) == 0:
                    self._pinned.append(place.data_ptr())


def empty_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Empty tensors on the CPU, spread as the given ones are, each on pages of its own."""
    sizes = [-(-local_part(value).nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for value in tensors.values()]
    pages = mmap.mmap(-1, max(sum(sizes), 1))
    with suppress(AttributeError, OSError):  # not every system has large pages, which are got faster
        pages.madvise(mmap.MADV_HUGEPAGE)
    places, begin = {}, 0
    for (name, value), size in zip(tensors.items(), sizes, strict=True):
        part, place = local_part(value), torch.empty(0)
        if part.numel():  # each with a storage of its own: of a view, all that lies beside it would be stored, too
            place = torch.frombuffer(pages, dtype=part.dtype, count=part.numel(), offset=begin)
        places[name] = spread_like(value, place.to(part.dtype).view(part.shape))
        begin += size
    return places


def spread_like(value: Tensor, part: Tensor) -> Tensor:
    """A tensor on the CPU, of which this rank holds `part` as it holds its part of `value`."""
    if not hasattr(value, "to_local"):
        return part
    whole: Any = torch.empty_like(value, device="cpu")
    whole._local_tensor = part  # made from parts, it would be moved to the device of its mesh
    return whole


def _cudart() -> Any:
    """CUDA's runtime."""
    return torch.cuda.cudart()
