"""How many bad rows and files are passed over."""

import logging
import re

from bytelatent.errors import UserError
from bytelatent.text.places import BadRow

LOGGER = logging.getLogger(__name__)

MAX_BAD_ROWS = 100  # unless a setting says otherwise
MAX_LINE = 200  # characters of a line about a bad row


class BadRows:
    """Counts and names bad rows and files.

    Args:
        limit: one more is an error; 0 makes each an error.
        name: the setting that holds the limit, for the error.
        of: what they are counted of, for the error; nothing, or ` of '...'`.
        logged: those that were logged before, which are only counted: a text is read in calibration and in every
            epoch. What is logged is added.

    Attributes:
        count: bad rows and files so far.
        unread: files of which nothing could be read, each with the reason.
    """

    def __init__(
        self,
        limit: int,
        name: str = "--max-bad-rows",
        of: str = "",
        logged: set[str] | None = None,
    ):
        self.limit, self.name, self.of = limit, name, of
        self.logged = set() if logged is None else logged
        self.count = 0
        self.unread: dict[str, str] = {}

    def __call__(self, error: BadRow | str) -> None:
        """Pass over one.

        Raises:
            UserError: it is one too many.
        """
        self.count += 1
        line = str(error).rstrip(".")
        if self.count > self.limit:
            before = f"{self.limit} bad rows or files{self.of} were passed over already ({self.name})"
            raise UserError(f"{line}; {before}" if self.limit else line)
        if line not in self.logged:
            self.logged.add(line)
            LOGGER.warning("%s", short(line, f"; passed over ({self.count} of at most {self.limit})"))

    def note(self, line: str) -> None:
        """Log a line that counts as no bad row, once."""
        if line not in self.logged:
            self.logged.add(line)
            LOGGER.warning("%s", short(line))

    def must_have_read(self) -> None:
        """Complain, once all else is done, about files of which nothing could be read.

        Raises:
            UserError: there are some.
        """
        must_have_read(self.unread)


def must_have_read(unread: dict[str, str]) -> None:
    """
    Raises:
        UserError: there are files of which nothing could be read.
    """
    if unread:
        file, why = next(iter(unread.items()))
        num_others = len(unread) - 1
        more = f" (and {num_others:,} more file{'s' if num_others > 1 else ''})" if num_others else ""
        raise UserError(f"data: nothing of '{file}' could be read{more}: {why.removeprefix('data: ')}")


def short(line: str, end: str = "") -> str:
    """A line and its end in at most `MAX_LINE` characters: a long file name loses its beginning, then the line its end.

    Both may hold anything; `UserError` has made it safe to print.
    """
    if len(line) + len(end) > MAX_LINE:
        line = re.sub(r"^([^']*)'([^']{40,})'", lambda found: f"{found[1]}'...{found[2][-37:]}'", line)
    if len(line) + len(end) > MAX_LINE:
        line = f"{line[: MAX_LINE - len(end) - 3]}..."
    return line + end
