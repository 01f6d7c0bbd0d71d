"""Faults of a run: losses that are not finite or spike, too little memory, an unexpected error of a rank."""

import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from bytelatent.device import is_out_of_memory
from bytelatent.errors import Interrupted, UserError, in_one_line
from bytelatent.run_folder import checkpoint_name
from bytelatent.signals import StopSignals
from bytelatent.terminal import print_line
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.distributed.parallelize import local_part
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.optimizer import Optimizers, single_optimizers
from bytelatent.training.settings import FaultSettings

RECENT_STEPS = 100  # a spike is measured against their median loss
MIN_RECENT = 10  # steps, before which no loss is a spike
MAX_SKIPPED = 10  # updates in a row


class RolledBack(Exception):
    """An update must not be made; the run returns to its last checkpoint. The message gives the reason."""


def loss_problem(step: int, loss: float, norm: float, recent: list[float], spike: float | None) -> str | None:
    """Why the update of a step must not be made; None if it may. `recent` are losses of earlier steps, as `loss`."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"the loss is not finite at step {step} (loss {loss:g}, gradient norm {norm:g})"
    if spike is not None and len(recent) >= MIN_RECENT and loss > spike * (median := statistics.median(recent)):
        return f"the loss spikes at step {step} (loss {loss:g}, median {median:g}, faults.spike {spike:g})"
    return None


def reason_to_skip(
    loss: float, norm: float, state: TrainState, settings: FaultSettings, lr: float, ranks: Ranks
) -> str | None:
    """Why the update of the next step is skipped; None if it may be made.

    Args:
        loss: nats per target, over all ranks.
        lr: the peak of the learning rate, for the message.

    Raises:
        UserError: the run has to stop.
        RolledBack: the run has to return to its last checkpoint.
    """
    problem = loss_problem(state.step + 1, loss, norm, state.recent, settings.spike)
    if problem is None:
        state.recent = [*state.recent[1 - RECENT_STEPS :], loss]
        state.skipped = 0
        return None
    state.skipped += 1
    if settings.on_nan == "rollback":
        raise RolledBack(problem)
    if settings.on_nan == "skip" and state.skipped <= MAX_SKIPPED:
        return problem
    times, other = "", "; or set faults.on_nan=skip"
    if settings.on_nan == "skip":
        times, other = f", {state.skipped} times in a row", ""
    raise ranks.common_error(
        UserError(
            f"{problem}{times}; no checkpoint holds it: take a lower optimizer.lr (now {lr:g}) or optimizer.clip, or "
            f"dtype=float32, and another run=FOLDER{other}"
        )
    )


def find_not_finite(model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers) -> str | None:
    """The first weight, or optimizer state of a weight, with a NaN or infinite value; None if all are finite.

    Each rank checks the parts that it holds.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(local_part(parameter.detach())):
            return name
        for one in single_optimizers(optimizer):
            for key, value in one.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and not _is_finite(local_part(value)):
                    return f"{key} of {name}"
    return None


def _is_finite(values: Tensor) -> bool:
    """Computed without a copy: the largest value is not finite if any is not."""
    return values.numel() == 0 or bool(torch.linalg.vector_norm(values, math.inf).isfinite())


def must_be_finite(state: TrainState, run: Path, ranks: Ranks) -> None:
    """Check weights and optimizer state before the first step.

    Raises:
        UserError: those of the checkpoint, or the initial ones, are not finite.
    """
    names = ranks.gather(find_not_finite(state.model, state.optimizer))
    found = next((name for name in names if name is not None), None)
    if found is None:
        return
    if state.step == 0:
        raise ranks.common_error(UserError(f"model: the weights are not finite before the first step ({found})"))
    raise ranks.common_error(
        UserError(
            f"'{run / 'checkpoints' / checkpoint_name(state.step)}' holds values that are not finite ({found}); remove "
            "it to resume from the checkpoint before it, or use another run=FOLDER"
        )
    )


@contextmanager
def who_failed(ranks: Ranks, step: Callable[[], int], stopped: StopSignals) -> Iterator[None]:
    """Print the rank, its host and the step before the traceback of an unexpected error."""
    try:
        yield
    except (UserError, Interrupted, RolledBack):
        raise
    except Exception as error:
        if stopped.quits:
            raise
        print_line(f"{ranks.name} failed after step {step()}: {type(error).__name__}: {in_one_line(error)}", sys.stderr)
        raise


@contextmanager
def memory_named(ranks: Ranks, way_out: str) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the settings to lower."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory on {ranks.name}: {way_out}; {in_one_line(error)[:200]}") from None


@contextmanager
def deterministic() -> Iterator[None]:
    """Allow only operations whose results are the same bits each time; others raise an error."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
