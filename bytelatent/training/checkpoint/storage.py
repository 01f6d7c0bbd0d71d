"""Weights and the optimizer's state on disk, by torch.distributed.checkpoint: each rank writes the parts that it holds.

A tensor is stored as `model.NAME`, or as `optimizer.NAME.KEY` for the optimizer's state of a weight. It can be read
into any other plan, or whole by a single process. `CpuCopies` holds copies, from which a checkpoint is written while
training continues.
"""

import json
import mmap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from bytelatent.training.distributed.parallelize import local_part
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.distributed.sharded_tables import is_row_sharded, zero_per_row
from bytelatent.training.optimizer import Optimizers, single_optimizers
from bytelatent.weights import Config, StoredModel, StoredTensor

CONFIG = "config.json"


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers) -> dict[str, Tensor]:
    """All tensors that a checkpoint stores, as they are in memory."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"model.{name}"] = parameter.detach()
        states = [one.state[parameter] for one in single_optimizers(optimizer) if parameter in one.state]
        for key, value in (item for state in states for item in state.items()):
            assert isinstance(value, Tensor), f"{type(optimizer).__name__} has no tensor for {key} of {name}"
            found[f"optimizer.{name}.{key}"] = value
    return found


def begin_folder(folder: Path, config: Config) -> None:
    """Make the folder for the tensors of a model; one rank calls it before all of them write."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config.shown(), indent=1), encoding="utf-8")


def write_tensors(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Write this rank's parts. All ranks call it at the same time; an error of one is raised on all.

    Raises:
        RuntimeError, OSError: writing failed.
    """
    with _unwrapped_errors():
        writer = FileSystemWriter(folder)
        save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.world_size == 1)


def read_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers, ranks: Ranks) -> None:
    """Read this rank's parts into a model and its optimizer.

    Raises:
        RuntimeError, ValueError, KeyError, OSError: the files belong to another model, or reading failed.
    """
    stored = _shapes(folder)
    parameters = dict(model.named_parameters())
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    states: dict[str, dict[str, Tensor]] = {}
    for name, shape in stored.items():
        if name.startswith("optimizer."):
            of, _, key = name.removeprefix("optimizer.").rpartition(".")
            states.setdefault(of, {})[key] = tensors[name] = _empty_state(shape, parameters[of])
    with _unwrapped_errors():
        reader = FileSystemReader(folder)
        load(tensors, storage_reader=reader, process_group=ranks.group, no_dist=ranks.world_size == 1)
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    for one in single_optimizers(optimizer):
        numbered = one.state_dict()
        for group, numbers in zip(one.param_groups, numbered["param_groups"], strict=True):
            for parameter, number in zip(group["params"], numbers["params"], strict=True):
                if (state := states.get(name_of[id(parameter)])) is not None:
                    numbered["state"][number] = state
        one.load_state_dict(numbered)


def open_stored(folder: Path) -> StoredModel:
    """The model in `folder`, whose weights are read when they are asked for; one process is enough."""
    config = Config.parse(json.loads((folder / CONFIG).read_text(encoding="utf-8-sig")), where=str(folder / CONFIG))
    tensors = {
        name.removeprefix("model."): ShardedTensorFile(about.properties.dtype, tuple(about.size), (), folder, name)
        for name, about in _shapes(folder).items()
        if name.startswith("model.")
    }
    return StoredModel(config, tensors, None, "checkpoint of a run", str(folder))


@dataclass(frozen=True)
class ShardedTensorFile(StoredTensor):
    """A tensor in the parts of several ranks; reading joins them."""

    folder: Path = Path()
    name: str = ""

    def chunks(self) -> Iterator[Any]:
        yield from StoredTensor.of(self.load()).chunks()

    def load(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        with _unwrapped_errors():
            load({self.name: out}, storage_reader=FileSystemReader(self.folder), no_dist=True)
        return out


def _shapes(folder: Path) -> dict[str, TensorStorageMetadata]:
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: about for name, about in found.items() if isinstance(about, TensorStorageMetadata)}


def _empty_state(about: TensorStorageMetadata, parameter: nn.Parameter) -> Tensor:
    """An empty tensor for the optimizer's state of a weight.

    It is spread over ranks like the weight, if it has its shape, and like a table's rows, if it has a number for each.
    """
    if about.size == parameter.shape:
        return torch.empty_like(parameter, dtype=about.properties.dtype).detach()
    if is_row_sharded(parameter) and about.size == parameter.shape[:1]:
        return zero_per_row(parameter.detach()).to(about.properties.dtype)
    return torch.empty(about.size, dtype=about.properties.dtype, device=parameter.device)


@contextmanager
def _unwrapped_errors() -> Iterator[None]:
    """Hide the library's warning about a single process, and raise errors of types that callers catch."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in sorted(error.failures.items())}
        for failure in failures.values():
            if isinstance(failure, OSError):
                raise failure from None
        lines = (f"rank {rank}: {type(failure).__name__}: {failure}" for rank, failure in failures.items())
        raise RuntimeError("; ".join(lines)) from None


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
