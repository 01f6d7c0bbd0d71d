"""Rows and files that cannot be read: what they are, and how many of them are passed over."""

import logging
import re
from typing import Any

from bytelatent.errors import UserError

LOGGER = logging.getLogger(__name__)

MAX_BAD_ROWS = 100  # unless a setting says otherwise
MAX_LINE = 200  # characters of a log line about a bad row


class TextError(UserError):
    """Text cannot be found or read.

    Attributes:
        line: the message without the prefix `data: `, in one line that any terminal can print.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.line: str = self.args[0]

    def __str__(self) -> str:
        return f"data: {self.line}"


class BadRow(TextError):
    """A row, or a file from some point on, that cannot be read, though others may be.

    Attributes:
        file: its name.
        reason: what is wrong with it.
        where: which part of the file; empty for all or the rest of it.
        row: the number of the row from 0; 0 for a whole file.
    """

    def __init__(self, file: str, reason: str, where: str = "", row: int = 0) -> None:
        self.file, self.reason, self.where, self.row = file, reason, where, row
        super().__init__(f"'{file}' {where} {reason}")

    def __reduce__(self) -> Any:  # processes that read ahead send them
        return type(self), (self.file, self.reason, self.where, self.row)


class RowTooLong(BadRow):
    """A row of more bytes than may be read at once."""


class NoDocument(ValueError):
    """A row holds no document; the message is the reason of a `BadRow`."""


class BadRows:
    """Counts bad rows and files, and logs each of them once.

    Args:
        limit: one more is an error; 0 makes each an error.
        name: the setting that holds the limit, for the error.
        of: what they are counted of, for the error: empty, or ` of '...'`.

    Attributes:
        count: bad rows and files so far.
        unread: files of which nothing could be read, each with the reason.
    """

    def __init__(self, limit: int, name: str = "--max-bad-rows", of: str = ""):
        self.limit, self.name, self.of = limit, name, of
        self.count = 0
        self.unread: dict[str, str] = {}

    def __call__(self, error: BadRow) -> None:
        """Pass over one.

        Raises:
            UserError: there are more than the limit.
        """
        self.count += 1
        line = str(error).rstrip(".")
        if self.count > self.limit:
            before = f"{self.limit} bad rows or files{self.of} were passed over already ({self.name})"
            raise UserError(f"{line}; {before}" if self.limit else line)
        warn_once(line, f"; passed over ({self.count} of at most {self.limit})")

    def must_have_read(self) -> None:
        """
        Raises:
            UserError: there are files of which nothing could be read.
        """
        must_have_read(self.unread)


def must_have_read(unread: dict[str, str]) -> None:
    """Complain, once all else is done, about files of which nothing could be read.

    Args:
        unread: the lines of the first bad row of each.

    Raises:
        UserError: there are some.
    """
    if unread:
        file, line = next(iter(unread.items()))
        num_others = len(unread) - 1
        more = f" (and {num_others:,} more file{'s' if num_others > 1 else ''})" if num_others else ""
        raise UserError(f"data: nothing of '{file}' could be read{more}: {line}")


_logged: set[str] = set()


def warn_once(line: str, end: str = "") -> None:
    """Log a line and its end, shortened, unless the same line was logged before: text is read in every epoch."""
    if line not in _logged:
        _logged.add(line)
        LOGGER.warning("%s", short(line, end))


def forget_logged() -> None:
    """Let another run of this process log the same lines again."""
    _logged.clear()


def logged_lines() -> set[str]:
    """The lines that were logged since `forget_logged`."""
    return set(_logged)


def mark_logged(lines: set[str]) -> None:
    """Do not log lines that another process has logged."""
    _logged.update(lines)


def short(line: str, end: str = "") -> str:
    """A line and its end in at most `MAX_LINE` characters: a long file name loses its beginning, then the line its end.

    Both may hold anything; `UserError` has made it safe to print.
    """
    if len(line) + len(end) > MAX_LINE:
        line = re.sub(r"^([^']*)'([^']{40,})'", lambda found: f"{found[1]}'...{found[2][-37:]}'", line)
    if len(line) + len(end) > MAX_LINE:
        line = f"{line[: MAX_LINE - len(end) - 3]}..."
    return line + end
