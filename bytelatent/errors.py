"""Errors that are the user's to mend, and how a command ends on them."""

import difflib
import sys
from collections.abc import Callable
from typing import Any

from bytelatent.credentials import masked
from bytelatent.signals import STOPPED, Interrupted, ignore_interrupts
from bytelatent.terminal import one_line, print_line

__all__ = ["BAD_INPUT", "STOPPED", "Interrupted", "UserError", "guarded", "in_one_line", "nearest"]

BAD_INPUT = 2


class UserError(ValueError):
    """Bad input: a path, a key, a file. The message is one line naming the thing, the value and the way out.

    The command line prints it without a traceback and exits with code 2.

    Attributes:
        message: the line without the key.
        key: the setting or argument that is wrong, in front of the line; empty if there is none.
    """

    def __init__(self, message: str, key: str = "") -> None:
        # A value that a user gave, or the message of a library, may hold line breaks, credentials, or steer a terminal.
        self.message, self.key = in_one_line(message), key
        super().__init__(f"{key}: {self.message}" if key else self.message)

    def with_key(self, key: str) -> "UserError":
        """The same error about the setting that this one was part of or that had another name there."""
        return UserError(self.message, key)


def in_one_line(message: object) -> str:
    """A text, or the message of an error, in one printable line without credentials."""
    return one_line(masked(" ".join(str(message).split())))


def nearest(name: str, known: list[str], within: str = "", cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, with `within` in front; else the empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean '{within}{match[0]}'?" if match else ""


def guarded(call: Callable[[], Any]) -> None:
    """Run a command: bad input ends it with one clear line and exit code 2, a wish to stop with `STOPPED`."""
    try:
        call()
    except UserError as error:
        print_line(f"error: {error}", sys.stderr)
        sys.exit(BAD_INPUT)
    except (Interrupted, KeyboardInterrupt) as stop:
        ignore_interrupts()  # a second press would only be a traceback on the way out
        print_line(f"stopped: {stop}" if str(stop) else "stopped", sys.stderr)
        sys.exit(STOPPED)
