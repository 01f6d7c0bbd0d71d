"""Checkpoints: all that the next step depends on.

A checkpoint is a folder: the model in our format (so that it can be used at once), `optimizer.pt`, and `progress.pt`
with the loader's position, the random state and the counts. It appears whole or not at all.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bytelatent.data import Loader
from bytelatent.errors import UserError
from bytelatent.files import newest_whole, whole_folder
from bytelatent.interop import Config, save
from bytelatent.interop.tensors import read_weights
from bytelatent.training.optimizer import Optimizers


@dataclass
class TrainState:
    """What changes from step to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | Optimizers
    loader: Loader
    step: int = 0  # steps done
    bytes_seen: int = 0  # bytes of text predicted
    seconds: float = 0.0  # spent in steps


def save_checkpoint(run: Path, state: TrainState, config: Config, keep: int) -> Path:
    """Write a checkpoint and remove all but the newest `keep`."""
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    progress = {
        "step": state.step,
        "bytes_seen": state.bytes_seen,
        "seconds": state.seconds,
        "loader": _as_tensors(state.loader.state_dict()),
        "torch_random": torch.get_rng_state(),
    }
    with whole_folder(folder) as aside:
        save(aside, state.model, config)
        torch.save(state.optimizer.state_dict(), aside / "optimizer.pt")
        torch.save(progress, aside / "progress.pt")
    # Later ones are torn: this step could not have been done again otherwise. They must not push out whole ones.
    for old in sorted(place for place in folder.parent.glob("step-*") if place <= folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for unfinished in folder.parent.glob(".step-*"):  # left by a process that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def load_checkpoint(run: Path, state: TrainState) -> list[str]:
    """Bring `state` to the newest whole checkpoint of a run, if it has one.

    Returns:
        One line about each later checkpoint that is torn.
    """
    folder, passed_over = newest_whole(run / "checkpoints")
    if folder is None:
        if passed_over:
            raise UserError(f"no checkpoint of '{run}' is whole: {'; '.join(passed_over)}; remove them to start anew")
        return passed_over
    try:
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
        progress = torch.load(folder / "progress.pt", weights_only=True)
        state.model.load_state_dict({name: tensor.load() for name, tensor in read_weights(folder).items()})
        state.optimizer.load_state_dict(optimizer)
        state.loader.load_state_dict(_as_arrays(progress["loader"]))
        torch.set_rng_state(progress["torch_random"])
        state.step, state.bytes_seen = progress["step"], progress["bytes_seen"]
        state.seconds = progress["seconds"]
    except (RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"'{folder}' is no checkpoint of this run: {' '.join(str(error).split())}") from None
    return passed_over


def _as_tensors(value: Any) -> Any:
    """Arrays as tensors, so that the file loads with `weights_only=True`."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _as_tensors(inner) for key, inner in value.items()}
    return [_as_tensors(inner) for inner in value] if isinstance(value, list) else value


def _as_arrays(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _as_arrays(inner) for key, inner in value.items()}
    return [_as_arrays(inner) for inner in value] if isinstance(value, list) else value
