"""What goes wrong in a long run: hangs, losses that are not finite or leap, too little memory, a lost rank."""

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

from bytelatent.credentials import masked
from bytelatent.errors import Interrupted, UserError
from bytelatent.run_folder import checkpoint_name
from bytelatent.terminal import say
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.distributed.fsdp import local_part
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.optimizer import Optimizers, each
from bytelatent.training.settings import TrainSettings
from bytelatent.training.stopping import StopSignals

RECENT = 100  # steps whose median loss a spike is measured against
ENOUGH = 10  # of them, from which on it is
MOST_SKIPPED = 10  # updates in a row
EXIT_HUNG = 1


class RolledBack(Exception):
    """A step is not to be taken; the run goes back to its last checkpoint. The message says why."""


def trouble_with(step: int, loss: float, norm: float, recent: list[float], spike: float | None) -> str | None:
    """Why an update should not be made; None if it should.

    Args:
        step: its number.
        loss: nats a target, over all ranks.
        norm: of the gradient.
        recent: losses of earlier steps.
        spike: as in the settings.
    """
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"the loss is not finite at step {step} (loss {loss:g}, gradient norm {norm:g})"
    if spike is not None and len(recent) >= ENOUGH and loss > spike * (median := statistics.median(recent)):
        return f"the loss leaps at step {step} (loss {loss:g}, median {median:g}, faults.spike {spike:g})"
    return None


def act_on(trouble: str | None, loss: float, state: TrainState, settings: TrainSettings, ranks: Ranks) -> bool:
    """Whether to make the update.

    Raises:
        UserError: the run is to stop.
        RolledBack: it is to go back.
    """
    if trouble is None:
        state.recent = [*state.recent[1 - RECENT :], loss]
        state.skipped = 0
        return True
    how = settings.faults.on_nan
    state.skipped += 1
    if how == "rollback":
        raise RolledBack(trouble)
    if how == "skip" and state.skipped <= MOST_SKIPPED:
        return False
    times, other = (f", {state.skipped} times in a row", "") if how == "skip" else ("", "; or say faults.on_nan=skip")
    raise ranks.common_error(
        UserError(
            f"{trouble}{times}; no checkpoint holds it: take a lower optimizer.lr "
            f"(now {settings.optimizer.lr:g}) or optimizer.clip, or dtype=float32, and another run=FOLDER{other}"
        )
    )


def not_finite(model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers | None = None) -> str | None:
    """The first weight of which a value is NaN or infinite, or what the optimizer knows of it; None if there is none.

    Of several ranks each looks at what it holds.
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
    """Without a copy as large as the values: the largest of them is not finite if any is not."""
    return values.numel() == 0 or bool(torch.linalg.vector_norm(values, math.inf).isfinite())


def must_be_finite(state: TrainState, settings: TrainSettings, ranks: Ranks) -> None:
    """Complain of weights that training would only spoil further, before the first step.

    Raises:
        UserError: a checkpoint holds such, or the weights were drawn so.
    """
    found = next((name for name in ranks.gather(not_finite(state.model, state.optimizer)) if name is not None), None)
    if found is None:
        return
    if state.step == 0:
        raise ranks.common_error(UserError(f"model: the weights are not finite before the first step ({found})"))
    place = f"{settings.run}/checkpoints/{checkpoint_name(state.step)}"
    raise ranks.common_error(
        UserError(
            f"'{place}' holds values that are not finite ({found}); remove it to go on from the checkpoint before it, "
            "or use another run=FOLDER"
        )
    )


class Watchdog:
    """Ends the process, with every thread's stack, when it has not been told of progress for so many minutes."""

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
        """Something was done; `doing` comes next."""
        self._seen, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        while self.seconds is not None and not self._over.wait(min(self.seconds / 10, 5.0)):
            idle = time.monotonic() - self._seen
            if idle > self.seconds:
                line = f"{self.ranks.name} hangs: {idle / 60:.3g} minutes of {self._doing} (faults.watchdog_minutes)"
                print(f"{line}; the stack of every thread:", file=sys.stderr, flush=True)
                with suppress(OSError, ValueError):  # a standard error that is no file
                    faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_HUNG)


@contextmanager
def who_failed(ranks: Ranks, step: Callable[[], int], stopped: StopSignals) -> Iterator[None]:
    """Name the rank, its host and the step in front of the traceback of an error that nobody foresaw."""
    try:
        yield
    except (UserError, Interrupted, RolledBack):
        raise
    except Exception as error:
        if stopped.quits:
            raise
        text = " ".join(str(error).split())
        line = f"{ranks.name} failed after step {step()}: {type(error).__name__}: {text}"
        say(masked(line), sys.stderr)
        raise


@contextmanager
def memory_named(settings: TrainSettings, ranks: Ranks) -> Iterator[None]:
    """Too little memory is an error that names the settings to lower."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            sign in text for sign in ("can't allocate memory", "out of memory")
        ):
            raise
        raise UserError(
            f"out of memory on {ranks.name}: lower data.batch_bytes (now {settings.data.batch_bytes}; with "
            f"optimizer.accumulation, now {settings.optimizer.accumulation}, as many bytes are a step) or "
            f"data.batch_patches (now {settings.data.batch_patches}), or set parallel.activation_checkpointing (now "
            f"{settings.parallel.activation_checkpointing}) to selective or full; {text[:200]}"
        ) from None


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only operations that give the same bits each time; an operation that cannot is an error."""
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
