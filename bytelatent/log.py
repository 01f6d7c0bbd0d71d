"""Log messages and progress on the terminal: Python's `logging` on one console of rich, on standard error.

Modules log by `logging.getLogger(__name__)`. A command calls `configure`; as a library nothing but warnings is shown.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from bytelatent.credentials import masked
from bytelatent.terminal import safe

LOGGER = logging.getLogger("bytelatent")


class Console(rich.console.Console):
    """A rich console that sends the terminal only its own colours and movements, and nothing raw of what it shows.

    rich itself removes five control characters and keeps ESC.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else safe(segment.text)
            yield segment if text is segment.text else Segment(text, segment.style)


class _LogConsole(Console):
    """Standard error. It is quiet once nobody reads it, as a closed pipe or terminal: work goes on without its log."""

    def __exit__(self, *error: Any) -> None:  # where rich writes
        try:
            super().__exit__(*error)
        except OSError:
            self.quiet = True

    def on_broken_pipe(self) -> None:  # where rich would end the process
        self.quiet = True


console = _LogConsole(stderr=True)  # shared, so that log lines and progress bars do not overwrite each other


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        try:
            console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


def configure(level: int = logging.INFO) -> None:
    """Show messages of this level and above on standard error, without credentials.

    Of several processes that torchrun started, the first shows them; the others show warnings, with their rank.
    """
    rank = os.environ.get("RANK", "0")
    handler = _ConsoleHandler()
    handler.setFormatter(_Formatter("%(message)s" if rank == "0" else f"rank {rank}: %(message)s"))
    for old in [old for old in LOGGER.handlers if isinstance(old, _ConsoleHandler)]:
        LOGGER.removeHandler(old)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level if rank == "0" else max(level, logging.WARNING))


def shows_bars() -> bool:
    """Whether progress bars are shown: on a terminal, unless the command is quiet."""
    return console.is_terminal and LOGGER.isEnabledFor(logging.INFO)


class _FileHandler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 the name is logging's
        if not isinstance(sys.exc_info()[1], OSError):  # as on a full disk: work goes on without its log
            super().handleError(record)


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append messages to a file as well, with their times."""
    handler = _FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        with suppress(OSError):
            handler.close()
