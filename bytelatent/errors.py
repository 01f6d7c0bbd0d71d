"""Errors that are the user's to mend, and how a command ends on them."""

import difflib
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from bytelatent.credentials import masked
from bytelatent.terminal import one_line, say

BAD_INPUT = 2
# The exit code of work that stopped because it was asked to: it is not done, and the same command goes on with it.
# Batch scripts of a cluster put a job that ends so back into the queue.
STOPPED = 130


class UserError(ValueError):
    """Bad input: a path, a key, a file. The message is one line naming the thing, the value and the way out.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        # A value that a user gave, or the message of a library, may hold line breaks, credentials, or steer a terminal.
        super().__init__(in_one_line(message))


def in_one_line(message: object) -> str:
    """A text, or the message of an error, in one printable line without credentials."""
    return one_line(masked(" ".join(str(message).split())))


def nearest(name: str, known: list[str], within: str = "", cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, with `within` in front; else the empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean '{within}{match[0]}'?" if match else ""


class Interrupted(Exception):
    """Work was asked to stop and did so in good order. The message says how to go on."""


def guarded(call: Callable[[], Any]) -> None:
    """Run a command: bad input ends it with one clear line and exit code 2, a wish to stop with `STOPPED`."""
    try:
        call()
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        sys.exit(BAD_INPUT)
    except (Interrupted, KeyboardInterrupt) as stop:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second press would only be a traceback on the way out
        say(f"stopped: {stop}" if str(stop) else "stopped", sys.stderr)
        sys.exit(STOPPED)
