"""Progress of long work, with the time left: a bar in a terminal, elsewhere a line now and then."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TypeVar

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from bytelatent import log

LOGGER = logging.getLogger(__name__)

EVERY = 10.0  # seconds between lines where there is no bar

Item = TypeVar("Item")


class Progress:
    """Shows how much of some work is done, and ends it when its time is up.

        with Progress("measuring", num_bytes, limit=30) as progress:
            for batch in progress.within(batches):
                ...
                progress.advance(batch.num_bytes)

    Args:
        what: the work, in a word or two.
        total: amount of work in `unit`; None if it is not known.
        limit: seconds after which the work ends, whatever is left of it; None never ends it.
        unit: of the amounts.
        bar: False shows lines in a terminal too, because another bar is on it.
        about: the total is an estimate.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        limit: float | None = None,
        unit: str = "bytes",
        bar: bool = True,
        about: bool = False,
    ):
        self.what, self.total, self.limit, self.unit = what, total, limit, unit
        self._of = "of about" if about else "of"
        self.done = 0
        self.is_cut = False  # the limit ended the work
        self._began = self._shown = time.monotonic()
        self._bars: Bars | None = None
        if bar and log.shows_bars():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[status]}"))
            self._bars = Bars(*columns, console=log.console, transient=True)
            self._bars.add_task(what, total=1.0, status="")

    def __enter__(self) -> Self:
        self._began = self._shown = time.monotonic()
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()
        if self.is_cut and kind is None:
            LOGGER.info(f"{self.what}: time is up after {self._amount()}; the rest is left out")

    def within(self, items: Iterable[Item], agreed: Callable[[bool], bool] = bool) -> Iterator[Item]:
        """The items one after another, at least one, until the time is up.

        Args:
            agreed: what several processes make of the answers that each of them has to whether its time is up.
        """
        for number, item in enumerate(items):
            if number and self.limit is not None and agreed(time.monotonic() - self._began >= self.limit):
                self.is_cut = True
                return
            yield item

    def advance(self, amount: int) -> None:
        """Count work that is done, and show it."""
        self.done += amount
        status = f"{self._amount()}{self._left()}"
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=self._share(), status=status)
        elif time.monotonic() - self._shown >= EVERY:
            self._shown = time.monotonic()
            share = f"  {self._share():4.0%}" if self._share() > 0 else ""
            LOGGER.info(f"{self.what}{share}  {status}")

    def _share(self) -> float:
        """How much is over of the work or of its time, whichever is more, from 0 to 1; 0 where that is not known."""
        of_work = self.done / self.total if self.total and self.done <= self.total else 0.0
        of_time = (time.monotonic() - self._began) / self.limit if self.limit else 0.0
        return min(max(of_work, of_time), 1.0)

    def _left(self) -> str:
        share = self._share()
        return f"  {time_left((time.monotonic() - self._began) * (1 - share) / share)}" if share > 0 else ""

    def _amount(self) -> str:
        if self.total is None or self.done > self.total:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,} {self._of} {self.total:,} {self.unit}"


def time_left(seconds: float) -> str:
    """`1:05 left`, or with hours `2:00:07 left`."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} left" if hours else f"{minutes}:{rest:02} left"
