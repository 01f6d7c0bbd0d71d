"""Weights and the optimizer's state on disk, by torch.distributed.checkpoint: each rank writes the parts that it holds.

A tensor is stored as `model.NAME`, or as `optimizer.NAME.KEY` for the optimizer's state of a weight. It can be read
into any other plan, or whole by a single process.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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

from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.optimizer import Optimizers, each
from bytelatent.weights import Config, StoredModel, StoredTensor

CONFIG = "config.json"


class StorageError(RuntimeError):
    """torch.distributed.checkpoint failed.

    Attributes:
        failures: the error of each rank that had one.
    """

    def __init__(self, failures: dict[int, BaseException]):
        self.failures = failures
        super().__init__("; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, e in sorted(failures.items())))


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers) -> dict[str, Tensor]:
    """All tensors that a checkpoint stores, as they are in memory."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found[f"model.{name}"] = parameter.detach()
        states = [one.state[parameter] for one in each(optimizer) if parameter in one.state]
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
        StorageError, OSError: writing failed.
    """
    with _unwrapped_errors():
        writer = FileSystemWriter(folder)
        save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.world_size == 1)


def read_tensors(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers, ranks: Ranks) -> None:
    """Read this rank's parts into a model and its optimizer.

    Raises:
        StorageError, RuntimeError, ValueError, KeyError, OSError: the files belong to another model, or reading failed.
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
    for one in each(optimizer):
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
    """An empty tensor for the optimizer's state of a weight: spread over ranks like the weight, if it has its shape."""
    if about.size == parameter.shape:
        return torch.empty_like(parameter, dtype=about.properties.dtype).detach()
    return torch.empty(about.size, dtype=about.properties.dtype, device=parameter.device)


@contextmanager
def _unwrapped_errors() -> Iterator[None]:
    """Hide the library's warning about a single process, and raise errors of types that callers catch."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        for failure in failures.values():
            if isinstance(failure, OSError):
                raise failure from None
        raise StorageError(failures) from None
