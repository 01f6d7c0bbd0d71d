"""Lines of a file and values of JSON, of bounded length: one that is longer is left out without being held."""

import codecs
import io
import re
from collections.abc import Iterator
from typing import Any

from bytelatent.text.documents import JSON, Rows, too_long
from bytelatent.text.kinds import TextReader
from bytelatent.text.places import BadRow

SKIP_BYTES = 1 << 20
DEEPEST = 1 << 18  # brackets in one another; more would only take their time
BRACKETS = re.compile(r'[{}\[\]]|"(?:[^"\\]|\\.)*+(?:"|\Z)', re.DOTALL)  # and the texts that may hold some


def next_line(stream: io.BufferedReader, max_bytes: int) -> tuple[bytes | None, int]:
    """The next line, None in place of one of more than `max_bytes` before its end, and the bytes it takes in the file.

    At the end of the file the line is empty.
    """
    line = stream.readline(max_bytes + 2)
    size = len(line)
    if size <= max_bytes or (line.endswith(b"\n") and len(line.rstrip(b"\r\n")) <= max_bytes):
        return line, size
    while not line.endswith(b"\n") and (line := stream.readline(SKIP_BYTES)):
        size += len(line)
    return None, size


def json_values(stream: TextReader, how: Rows) -> Iterator[tuple[Any, int]]:
    """The values of a JSON file that is not JSONL, and about how many bytes each takes: the elements of an array, or
    one object, or several after each other; an error in place of one that is too long or no JSON.

    Raises:
        BadRow: from here on it is not JSON, or a value is so long that its end was not found.
    """
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    text, at, ended, in_array, row = "", 0, False, False, 0
    while True:
        while at < len(text) and (text[at].isspace() or (in_array and text[at] == ",")):
            at += 1
        if at < len(text) and text[at] == ("]" if in_array else "["):
            at, in_array = at + 1, not in_array
            continue
        if at < len(text):
            where = f"'{stream.file}' value {row + 1}"
            try:
                value, end = JSON.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", "it is nested too deeply")
                value, end = BadRow(f"data: {where} is not JSON ({reason}); mend or remove it"), _end_of(text, at)
                if end is None and ended:
                    raise BadRow(f"data: {where} is not JSON ({reason}); it and the rest are not read") from None
                end = len(text) if end is None else end
            if end < len(text) or ended:
                yield (value if end - at <= how.max_row_bytes else too_long(where, how)), end - at
                at, row = end, row + 1
                continue
            if len(text) - at > how.max_row_bytes:
                raise too_long(where, how)
        elif ended:
            if in_array and stream.damage is None:
                raise BadRow(f"data: '{stream.file}' is not whole: its array has no end after {row:,} values")
            return
        more = stream.read(max(SKIP_BYTES, len(text) - at))
        ended = not more
        text, at = text[at:] + decode(more, ended), 0


def _end_of(text: str, at: int) -> int | None:
    """Where the object or array that begins at `at` ends, by its brackets alone; None where that is not in the text, or
    it is nested deeper than any data.
    """
    depth = 0
    for found in BRACKETS.finditer(text, at) if text[at] in "{[" else ():
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(found[0], 0)
        if depth == 0:
            return found.end()
        if depth > DEEPEST:
            return None
    return None
