"""Metrics: rows for the trackers, a bar or lines on the terminal, and how fast a run is."""

import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bytelatent import log
from bytelatent.device import peak_memory
from bytelatent.model import ModelSettings
from bytelatent.model.flops import training_flops
from bytelatent.progress import EVERY, time_left
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.trackers import Tracker

LOGGER = logging.getLogger(__name__)


class Metrics:
    """Hands rows to trackers and shows them.

    Args:
        trackers: in order; none where another rank has them, and then nothing is shown either.
        after_step: rows after this step, which a resumed run writes again, are dropped.
        title: in front of the progress bar.
    """

    def __init__(self, trackers: Sequence[Tracker], after_step: int, title: str):
        self._trackers, self._title = trackers, title
        self.forget(after_step)
        self._last_line = -1e9
        self._first: tuple[float, float] | None = None  # when the first row came, and how much was over then
        self._bar: Progress | None = None
        if trackers and log.console.is_terminal and LOGGER.isEnabledFor(logging.INFO):
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} % {task.fields[status]}"),
                TimeRemainingColumn(),
                console=log.console,
            )
            self._bar.add_task(title, total=1.0, status="")

    def __enter__(self) -> "Metrics":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.close()

    def forget(self, after_step: int) -> None:
        """Drop the rows after a step; the next ones follow it."""
        for tracker in self._trackers:
            tracker.resume_after(after_step)

    def write(self, row: dict[str, Any], done: float) -> None:
        """Write a row; it is on disk when this returns, if it can be. `done` is how much of the run is over, 0 to 1."""
        for tracker in self._trackers:
            tracker.write(row)
        if row.get("kind") == "statistics" or not self._trackers:
            return
        status = "  ".join(_shown(row))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, status=status)
        elif time.monotonic() - self._last_line > EVERY or "validation_bits_per_byte" in row:
            self._last_line = time.monotonic()
            LOGGER.info(f"{self._title}  {min(done, 1):4.0%}  step {row['step']}  {status}{self._left(done)}")

    def _left(self, done: float) -> str:
        """The time left at the pace since the first row."""
        if self._first is None:
            self._first = time.monotonic(), done
        began, before = self._first
        if not before < done < 1:
            return ""
        return f"  {time_left((time.monotonic() - began) * (1 - done) / (done - before))}"


def _shown(row: dict[str, Any]) -> list[str]:
    shown = {
        "bits_per_byte": "{:.3f} bits/byte",
        "validation_bits_per_byte": "held out {:.3f} bits/byte",
        "mean_patch_bytes": "{:.2f} bytes/patch",
        "bytes_per_second": "{:,.0f} bytes/s",
    }
    return [form.format(row[key]) for key, form in shown.items() if row.get(key) is not None]


class Totals(NamedTuple):
    """What a run has done so far."""

    num_bytes: int
    num_patches: int
    seconds: float
    waited: float

    @classmethod
    def of(cls, state: TrainState) -> "Totals":
        return cls(state.bytes_seen, state.patches_seen, state.seconds, state.waited)


def speed(
    then: Totals, now: Totals, model: ModelSettings, context: int, peak: float | None, ranks: Ranks
) -> dict[str, Any]:
    """Rates between two moments; None where no time has passed, or they are not known.

    Args:
        context: ids that a document's pieces hold at most.
        peak: FLOP/s of one device.
    """
    seconds = now.seconds - then.seconds
    num_bytes, num_patches = now.num_bytes - then.num_bytes, now.num_patches - then.num_patches
    found: dict[str, Any] = {
        "bytes_per_second": None,
        "patches_per_second": None,
        "model_flops_utilisation": None,
        "data_wait": None,
        "peak_memory_gib": round(max(ranks.gather(peak_memory())) / 2**30, 3),
    }
    waited = max(ranks.gather(now.waited - then.waited))
    if seconds > 0:
        found["bytes_per_second"] = round(num_bytes / seconds)
        found["patches_per_second"] = round(num_patches / seconds) if num_patches else None
        found["data_wait"] = round(min(waited / seconds, 1.0), 4)
        if peak is not None:
            patch_bytes = num_bytes / (num_patches or num_bytes)
            flops = training_flops(model, patch_bytes, context) * num_bytes / seconds
            found["model_flops_utilisation"] = round(flops / (peak * ranks.world_size), 4)
    return found
