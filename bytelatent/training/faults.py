"""Faults of a long run: hangs, losses that are not finite or spike, too little memory, a failed rank."""

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

import torch
from torch import Tensor, nn

from bytelatent.device import is_out_of_memory
from bytelatent.errors import Interrupted, UserError, in_one_line
from bytelatent.run_folder import checkpoint_name
from bytelatent.signals import StopSignals
from bytelatent.terminal import print_line
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.distributed.fsdp import local_part
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.optimizer import Optimizers, each
from bytelatent.training.settings import TrainSettings

RECENT_STEPS = 100  # a spike is measured against their median loss
MIN_RECENT = 10  # steps, before which no loss is a spike
MAX_SKIPPED = 10  # updates in a row
EXIT_HUNG = 1


class RolledBack(Exception):
    """An update must not be made; the run returns to its last checkpoint. The message says why."""


def trouble_with(step: int, loss: float, norm: float, recent: list[float], spike: float | None) -> str | None:
    """Why an update must not be made; None if it may.

    Args:
        step: number of the step.
        loss: nats per target, over all ranks.
        norm: of the gradient.
        recent: losses of earlier steps.
        spike: as in the settings.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"the loss is not finite at step {step} (loss {loss:g}, gradient norm {norm:g})"
    if spike is not None and len(recent) >= MIN_RECENT and loss > spike * (median := statistics.median(recent)):
        return f"the loss spikes at step {step} (loss {loss:g}, median {median:g}, faults.spike {spike:g})"
    return None


def act_on(fault: str | None, loss: float, state: TrainState, settings: TrainSettings, ranks: Ranks) -> bool:
    """Whether to make the update, after what `trouble_with` found; otherwise it is skipped.

    Raises:
        UserError: the run has to stop.
        RolledBack: the run has to return to its last checkpoint.
    """
    if fault is None:
        state.recent = [*state.recent[1 - RECENT_STEPS :], loss]
        state.skipped = 0
        return True
    action = settings.faults.on_nan
    state.skipped += 1
    if action == "rollback":
        raise RolledBack(fault)
    if action == "skip" and state.skipped <= MAX_SKIPPED:
        return False
    times, other = "", "; or set faults.on_nan=skip"
    if action == "skip":
        times, other = f", {state.skipped} times in a row", ""
    raise ranks.common_error(
        UserError(
            f"{fault}{times}; no checkpoint holds it: take a lower optimizer.lr "
            f"(now {settings.optimizer.lr:g}) or optimizer.clip, or dtype=float32, and another run=FOLDER{other}"
        )
    )


def find_not_finite(model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers | None = None) -> str | None:
    """The first weight, or optimizer state of a weight, with a NaN or infinite value; None if all are finite.

    Each rank checks the parts that it holds.
    """
    for name, parameter in model.named_parameters():
        if not _is_finite(local_part(parameter.detach())):
            return name
        for one in [] if optimizer is None else each(optimizer):
            for key, value in one.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and not _is_finite(local_part(value)):
                    return f"{key} of {name}"
    return None


def _is_finite(values: Tensor) -> bool:
    """Computed without a copy: the largest value is not finite if any is not."""
    return values.numel() == 0 or bool(torch.linalg.vector_norm(values, math.inf).isfinite())


def must_be_finite(state: TrainState, settings: TrainSettings, ranks: Ranks) -> None:
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
    folder = f"{settings.run}/checkpoints/{checkpoint_name(state.step)}"
    raise ranks.common_error(
        UserError(
            f"'{folder}' holds values that are not finite ({found}); remove it to resume from the checkpoint before "
            "it, or use another run=FOLDER"
        )
    )


class Watchdog:
    """Ends the process, and prints the stack of every thread, after this many minutes without progress."""

    def __init__(self, minutes: float | None, ranks: Ranks):
        self.seconds = None if minutes is None else 60 * minutes
        self.ranks = ranks
        self._seen, self._doing = time.monotonic(), "starting"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def progress(self, doing: str) -> None:
        """Report progress; `doing` comes next."""
        self._seen, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        while self.seconds is not None and not self._over.wait(min(self.seconds / 10, 5.0)):
            idle = time.monotonic() - self._seen
            if idle > self.seconds:
                line = f"{self.ranks.name} hangs: {idle / 60:.3g} minutes of {self._doing} (faults.watchdog_minutes)"
                # Printed, because the thread that hangs may hold a lock of the log.
                print(f"{line}; the stack of every thread:", file=sys.stderr, flush=True)
                with suppress(OSError, ValueError):  # standard error may not be a file
                    faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_HUNG)


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
def memory_named(settings: TrainSettings, ranks: Ranks) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the settings to lower."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory on {ranks.name}: lower data.batch_bytes (now {settings.data.batch_bytes}; raise "
            f"optimizer.accumulation, now {settings.optimizer.accumulation}, to keep the bytes of a step) or "
            f"data.batch_patches (now {settings.data.batch_patches}), or set parallel.activation_checkpointing (now "
            f"{settings.parallel.activation_checkpointing}) to selective or full; {in_one_line(error)[:200]}"
        ) from None


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Allow only operations whose results are the same bits each time; others raise an error."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
