"""LineBlock out of units: lines of JSONL as they are, other JSON, Parquet and plain text turned into such lines.

What a file is, and how it is opened, `bytelatent.text` decides; JSONL is only divided here without parsing it, which is
several times as fast.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.prepare.plan import InputFile, Unit, too_many_bad_rows
from bytelatent.prepare.shuffle import TextKeys
from bytelatent.text import BadRow, ReadOptions
from bytelatent.text.bad_rows import NoDocument, RowTooLong
from bytelatent.text.documents import from_json
from bytelatent.text.formats import TEXT, open_rows, readable_kind
from bytelatent.text.streams import TextReader, readable

READ_BYTES = 1 << 19  # at once
WINDOW_BYTES = 1 << 18  # newlines are looked for in what fits into a core's cache
NEWLINE, RETURN, OPEN, CLOSE = b"\n\r{}"


@dataclass
class LineBlock:
    """Lines of JSON, each with its newline, in one buffer; some of them (blank or corrupt ones) are to be left out."""

    data: bytes | bytearray | memoryview
    ends: np.ndarray  # int64 [lines], after the newline
    kept: np.ndarray  # int64 [N], which lines
    keys: list[bytes] | None = None  # [N] of 16 bytes, where duplicates are to be removed


class BadRowRecord:
    """Bad rows, which are left out: counted, each with its location and the reason.

    Args:
        limit: one more is an error.

    Attributes:
        bad_files, good_files: numbers of the inputs with bad rows, and of those with others.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.places: list[str] = []
        self.bad_files: dict[int, str] = {}
        self.good_files: set[int] = set()

    def add(self, number: int, error: BadRow) -> None:
        place = error.line
        self.places.append(place)
        self.bad_files.setdefault(number, place)
        if len(self.places) > self.limit:
            raise too_many_bad_rows(self.places, self.limit)

    def plain(self) -> dict[str, Any]:
        """For the marker of a task."""
        bad = [[number, place] for number, place in self.bad_files.items()]
        return {"corrupt": self.places, "bad_files": bad, "good_files": sorted(self.good_files)}


class LineReader:
    """Reads units.

    Args:
        options: where a row's text is and how long a row may be.
        text_keys: makes keys from the rows' texts; None leaves the rows unparsed.
        max_line: bytes of a line that the memory allows.
        report: receives the bytes read.
    """

    def __init__(
        self,
        files: list[InputFile],
        options: ReadOptions,
        text_keys: TextKeys | None,
        corrupt: BadRowRecord,
        max_line: int,
        report: Callable[[int], None],
    ) -> None:
        self.files, self.options, self.text_keys = files, options, text_keys
        self.corrupt, self.max_line, self.report = corrupt, max_line, report
        self._number = 0  # of the file that is read

    def read(self, unit: Unit) -> Iterator[LineBlock]:
        """The rows of a unit, in order.

        A file that is cut short gives the rows before its end and counts as one bad row.

        Raises:
            UserError: the memory is too small, or there are too many bad rows.
        """
        for self._number in unit.files:
            file = self.files[self._number]
            try:
                with readable(file.path):
                    if file.kind == "none":
                        readable_kind(file.path)
                    if unit.kind == "lines":
                        found = self._lines(file, unit.begin, unit.end)
                    elif file.kind == "packed":
                        found = self._packed(file)
                    else:
                        found = self._other_rows(file)
                    for rows in found:
                        if len(rows.kept):
                            self.corrupt.good_files.add(self._number)
                        yield rows
            except BadRow as error:
                self._bad(error)
            if unit.kind != "lines":
                self.report(file.size)

    def _bad(self, error: BadRow) -> None:
        self.corrupt.add(self._number, error)

    def _lines(self, file: InputFile, begin: int, end: int) -> Iterator[LineBlock]:
        with TextReader(file.path, None) as stream:
            begin = _next_line(stream, begin) if begin else stream.skip_byte_order_mark()
            for offset, block in self._whole_lines(file, stream, begin, end):
                yield self._kept(file, offset, block)
                self.report(len(block))

    def _packed(self, file: InputFile) -> Iterator[LineBlock]:
        with TextReader(file.path, file.compression) as stream:
            for offset, block in self._whole_lines(file, stream, stream.skip_byte_order_mark(), None):
                yield self._kept(file, offset, block)
            if stream.unread is not None:
                self._bad(BadRow(file.path, stream.unread))

    def _whole_lines(
        self, file: InputFile, stream: TextReader, begin: int, end: int | None
    ) -> Iterator[tuple[int, bytes]]:
        """Blocks of whole lines that begin before `end`, each with its offset; the stream is at `begin`."""
        pieces: list[bytes | memoryview] = []
        position = start = begin
        skips = False  # the rest of a line that is too long
        while end is None or position < end or pieces or skips:
            past = end is not None and position >= end  # only the rest of the last line is wanted
            block = stream.read(READ_BYTES if end is None or past else min(READ_BYTES, end - position))
            if not block:
                break
            position += len(block)
            if skips:
                line_end = block.find(b"\n") + 1
                if line_end and past:
                    return
                skips, block = not line_end, block[line_end:] if line_end else b""
                start = position - len(block)
            cut = (block.find(b"\n") if past else block.rfind(b"\n")) + 1
            if cut:
                yield start, block if cut == len(block) and not pieces else b"".join([*pieces, memoryview(block)[:cut]])
                start = position - len(block) + cut
            if cut and past:
                return
            pieces = ([] if cut else pieces) + ([memoryview(block)[cut:]] if cut < len(block) else [])
            if position - start > self.options.max_row_bytes + 1:  # one may be the first half of a line's end
                self._bad(RowTooLong(file.path, self.options.too_long, f"at byte {start}"))
                skips, pieces, start = True, [], position
            elif position - start > self.max_line:
                raise UserError(
                    f"--memory: too little for a line of over {self.max_line:,} bytes, in '{file.path}' at byte "
                    f"{start}; give more, or fewer --workers"
                )
        last = b"".join(pieces)
        if last and (stream.unread is None or self._text_of(file, last) is not None):
            yield start, last + b"\n"

    def _kept(self, file: InputFile, offset: int, block: bytes) -> LineBlock:
        """A block's lines, the blank and bad ones marked."""
        ends, lengths, good = _objects(block)
        good &= lengths <= self.options.max_row_bytes
        for line in np.flatnonzero(~good):
            begin = int(ends[line - 1]) if line else 0
            where = f"at byte {offset + begin}"
            if lengths[line] > self.options.max_row_bytes:
                self._bad(RowTooLong(file.path, self.options.too_long, where))
                continue
            stripped = block[begin : int(ends[line])].strip()
            good[line] = stripped[:1] == b"{" and stripped[-1:] == b"}"
            if stripped and not good[line]:
                self._bad(BadRow(file.path, "is not a JSON object", where))
        if self.text_keys is None:
            return LineBlock(block, ends, np.flatnonzero(good))
        keys = []
        for line in np.flatnonzero(good):
            begin = int(ends[line - 1]) if line else 0
            text = self._text_of(file, block[begin : int(ends[line])], f"at byte {offset + begin}")
            good[line] = text is not None
            if text is not None:
                keys.append(self.text_keys.key(text))
        return LineBlock(block, ends, np.flatnonzero(good), keys)

    def _text_of(self, file: InputFile, line: bytes, where: str = "") -> bytes | None:
        """The text of a line; None, and a bad row more where its place is given, if it has none."""
        try:
            return from_json(line, self.options).text
        except NoDocument as error:
            if where:
                self._bad(BadRow(file.path, str(error), where))
            return None

    def _other_rows(self, file: InputFile) -> Iterator[LineBlock]:
        """The rows of a file that is not JSONL, as lines of JSON, some at a time."""
        options, is_text = self.options, file.kind == TEXT.name
        if is_text:  # all of it is one line
            options = replace(options, max_row_bytes=min(options.max_row_bytes, self.max_line))
        made = LineCollector(self.text_keys is not None)
        for row in open_rows(file.path, options):
            if isinstance(row, RowTooLong) and options != self.options:
                raise UserError(f"--memory: too little for '{file.path}'; give more than {8 * file.size / 1e9:.2g} GB")
            if isinstance(row, BadRow):
                self._bad(row)
                continue
            key = None if self.text_keys is None else self.text_keys.key(row[options.text_key])
            made.add(as_line({"id": file.id, **row} if is_text else row), key)
            if made.size > READ_BYTES:
                yield made.rows()
                made = LineCollector(self.text_keys is not None)
        yield made.rows()


class LineCollector:
    """Lines of JSON with their keys, collected."""

    def __init__(self, has_keys: bool) -> None:
        self.lines: list[bytes] = []
        self.keys: list[bytes] | None = [] if has_keys else None
        self.size = 0  # bytes

    def add(self, line: bytes, key: bytes | None) -> None:
        self.lines.append(line)
        self.size += len(line)
        if key is not None and self.keys is not None:
            self.keys.append(key)

    def rows(self) -> LineBlock:
        ends = np.cumsum([len(line) for line in self.lines], dtype=np.int64)
        return LineBlock(b"".join(self.lines), ends, np.arange(len(self.lines)), self.keys)


def as_line(row: dict[str, Any]) -> bytes:
    r"""A row as a line of JSON. Bytes that are no UTF-8 become `\udcXX`, which `vocab.to_bytes` turns back."""
    row = {
        key: value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
        for key, value in row.items()
    }
    try:
        return (json.dumps(row, ensure_ascii=False, default=_plain) + "\n").encode()
    except UnicodeEncodeError:  # JSON has no way to write such a byte as it is
        return (json.dumps(row, default=_plain) + "\n").encode()


def _plain(value: Any) -> str:
    """Dates, decimals and nested bytes, which JSON does not know."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _next_line(stream: TextReader, begin: int) -> int:
    """Go to where the first line at or after `begin` begins, and return that offset."""
    stream.seek(begin - 1)
    position = begin - 1
    while piece := stream.readline(READ_BYTES):
        position += len(piece)
        if piece.endswith(b"\n"):
            break
    return position


def _objects(block: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the lines of a block end, int64 [lines], their bytes before the end, int64 [lines], and which go from `{`
    to `}` with nothing around, bool [lines].
    """
    array = np.frombuffer(block, dtype=np.uint8)
    windows = range(0, len(array), WINDOW_BYTES)
    ends = np.concatenate([np.flatnonzero(array[w : w + WINDOW_BYTES] == NEWLINE) + (w + 1) for w in windows])
    starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])
    last = np.maximum(ends - 2, 0)
    last = np.where(array[last] == RETURN, np.maximum(last - 1, 0), last)  # files written on Windows
    good = (array[starts] == OPEN) & (array[last] == CLOSE) & (last > starts)
    return ends, last + 1 - starts, good
