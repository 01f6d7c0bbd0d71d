"""What a terminal is sent: text of models, files and their names shows there, and steers nothing.

An escape sequence clears the screen, renames the window or answers on standard input; a backspace or a right-to-left
override shows another text than there is.
"""

import json
import math
import os
import sys
import unicodedata
from typing import IO, Any

KEPT = "\n\t\u200c\u200d"  # and the two joiners, which letters and emoji need
STEERS = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, bidi and other formats, halves of characters, line separators


def safe(text: str) -> str:
    """The text with all that would steer a terminal as escapes: `\\x1b`, `\\u202e`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in STEERS and c not in KEPT else c for c in text)


def one_line(text: str) -> str:
    """The text with all that is no printable character as escapes, line breaks too: for messages that are one line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def print_line(line: str, file: IO[str] | None = None, end: str = "\n") -> None:
    """Print a line, to standard output unless another file is given: safely to a terminal, elsewhere as it is."""
    place = file or sys.stdout
    print(safe(line) if place.isatty() else line, end=end, file=place, flush=True)


def open_closed_streams() -> None:
    """Let standard streams that the process was started without, as by `>&-`, lead nowhere.

    Python has None for them, and the next file that is opened would take the place of the stream.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False))


def flush_output() -> None:
    """Write what is buffered, and drop what nobody reads any more, on which Python would fail as it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def print_json(values: Any) -> None:
    """Print values as JSON; a number that JSON cannot hold (NaN, infinity) is printed as null."""
    print_line(json.dumps(_without_nan(values), allow_nan=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return value


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
