"""Metrics: rows for the trackers, and a live line on the terminal."""

import time
from collections.abc import Sequence
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bytelatent.log import Console
from bytelatent.progress import EVERY, time_left
from bytelatent.training.trackers import Tracker


class Metrics:
    """Hands rows to trackers and shows them.

    Args:
        trackers: in order.
        after_step: rows after this step, which a resumed run will write again, are dropped.
        title: in front of the progress bar.
    """

    def __init__(self, trackers: Sequence[Tracker], after_step: int, title: str, console: Console):
        self._trackers = trackers
        self.forget(after_step)
        self._console = console
        self._last_line = -1e9
        self._first: tuple[float, float] | None = None  # when the first row came, and how much was over then
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} % {task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._title = title
        self._task = self._progress.add_task(title, total=1.0, status="")

    def __enter__(self) -> "Metrics":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for tracker in self._trackers:
            tracker.close()

    def forget(self, after_step: int) -> None:
        """Drop the rows after a step, and go on from there."""
        for tracker in self._trackers:
            tracker.go_on_after(after_step)

    def write(self, row: dict[str, Any], done: float) -> None:
        """Write a row; it is on disk when this returns, if it can be. `done` is how much of the run is over, 0 to 1."""
        for tracker in self._trackers:
            tracker.write(row)
        if row.get("kind") == "statistics":
            return
        status = "  ".join(text for _, text in _shown(row))
        self._progress.update(self._task, completed=done, status=status)
        if not self._console.is_terminal and (
            time.monotonic() - self._last_line > EVERY or "validation_bits_per_byte" in row
        ):
            self._last_line = time.monotonic()
            line = f"{self._title}  {min(done, 1):4.0%}  step {row['step']}  {status}{self._left(done)}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _left(self, done: float) -> str:
        """The time left, as fast as it went since the first row."""
        if self._first is None:
            self._first = time.monotonic(), done
        began, before = self._first
        if not before < done < 1:
            return ""
        return f"  {time_left((time.monotonic() - began) * (1 - done) / (done - before))}"


def _shown(row: dict[str, Any]) -> list[tuple[str, str]]:
    shown = {
        "bits_per_byte": "{:.3f} bits/byte",
        "validation_bits_per_byte": "held out {:.3f} bits/byte",
        "mean_patch_bytes": "{:.2f} bytes/patch",
        "bytes_per_second": "{:,.0f} bytes/s",
    }
    return [(key, form.format(row[key])) for key, form in shown.items() if row.get(key) is not None]
