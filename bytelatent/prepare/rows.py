"""Rows out of units: lines of JSONL as they are, other JSON, Parquet and plain text turned into such lines.

What a file is, and how it is opened, `bytelatent.text` decides; JSONL is only divided here without parsing it, which is
several times as fast.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.prepare.inputs import InputFile, Unit
from bytelatent.prepare.order import TextKeys
from bytelatent.prepare.runs import Rows
from bytelatent.terminal import one_line
from bytelatent.text.documents import Rows as HowToRead
from bytelatent.text.documents import bytes_of, from_json, from_value, too_long
from bytelatent.text.kinds import TextReader, must_be_read
from bytelatent.text.lines import json_values
from bytelatent.text.parquet import ParquetTable
from bytelatent.text.places import BadRow, readable
from bytelatent.vocab import to_bytes

READ_BYTES = 1 << 19  # at once
WINDOW_BYTES = 1 << 18  # newlines are looked for in what fits into a core's cache
PARQUET_ROWS = 256
NEWLINE, RETURN, OPEN, CLOSE = b"\n\r{}"


class Corrupt:
    """Bad rows, which are left out: counted, each with its place and what is wrong with it.

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

    def add(self, number: int, place: str) -> None:
        place = one_line(" ".join(place.split())).removeprefix("data: ")
        self.places.append(place)
        self.bad_files.setdefault(number, place)
        if len(self.places) > self.limit:
            raise too_many(self.places, self.limit)

    def plain(self) -> dict[str, Any]:
        """For the marker of a task."""
        bad = [[number, place] for number, place in self.bad_files.items()]
        return {"corrupt": self.places, "bad_files": bad, "good_files": sorted(self.good_files)}


def too_many(places: list[str], limit: int) -> UserError:
    return UserError(
        f"{places[0]}: more than {limit} rows are bad, this one and {len(places) - 1} others so far; "
        "mend the input or give a higher --max-bad-rows"
    )


class RowReader:
    """Reads units.

    Args:
        how: where a row's text is and how long a row may be.
        text_keys: makes keys from texts, which are then parsed out of the rows; None if rows need none.
        max_line: bytes of a line that the memory allows.
        report: told the bytes read.
    """

    def __init__(
        self,
        files: list[InputFile],
        how: HowToRead,
        text_keys: TextKeys | None,
        corrupt: Corrupt,
        max_line: int,
        report: Callable[[int], None],
    ) -> None:
        self.files, self.how, self.text_keys = files, how, text_keys
        self.corrupt, self.max_line, self.report = corrupt, max_line, report
        self._number = 0  # of the file that is read

    def read(self, unit: Unit) -> Iterator[Rows]:
        """The rows of a unit, in order.

        A file that is damaged gives the rows before the damage and counts as one bad row.

        Raises:
            UserError: the memory is too small, or there are too many bad rows.
        """
        readers = {
            "packed": self._packed,
            "json": self._json,
            "parquet": self._parquet,
            "text": self._text,
            "none": self._text,
        }
        for self._number in unit.files:
            file = self.files[self._number]
            try:
                with readable(file.path):
                    if file.kind == "none":
                        must_be_read(file.path)
                    if unit.kind == "lines":
                        found = self._lines(file, unit.begin, unit.end)
                    else:
                        found = readers[file.kind](file)
                    for rows in found:
                        if len(rows.kept):
                            self.corrupt.good_files.add(self._number)
                        yield rows
            except BadRow as error:
                self._bad(str(error))
            if unit.kind != "lines":
                self.report(file.size)

    def _bad(self, what: str) -> None:
        self.corrupt.add(self._number, what)

    def _lines(self, file: InputFile, begin: int, end: int) -> Iterator[Rows]:
        with TextReader(file.path, None) as stream:
            begin = _next_line(stream, begin) if begin else stream.skip_byte_order_mark()
            for offset, block in self._whole_lines(file, stream, begin, end):
                yield self._kept(file, offset, block)
                self.report(len(block))

    def _packed(self, file: InputFile) -> Iterator[Rows]:
        with TextReader(file.path, file.compression) as stream:
            for offset, block in self._whole_lines(file, stream, stream.skip_byte_order_mark(), None):
                yield self._kept(file, offset, block)
            self._add_damage(stream)

    def _add_damage(self, stream: TextReader) -> None:
        if stream.damage is not None:
            self._bad(f"'{stream.file}' {stream.damage}")

    def _whole_lines(
        self, file: InputFile, stream: TextReader, begin: int, end: int | None
    ) -> Iterator[tuple[int, bytes]]:
        """Blocks of whole lines, each with its offset: those that begin before `end`; the stream is at `begin`."""
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
            if position - start > self.how.max_row_bytes + 1:  # one may be the first half of a line's end
                self._bad(str(too_long(f"'{file.path}' at byte {start}", self.how)))
                skips, pieces, start = True, [], position
            elif position - start > self.max_line:
                raise UserError(
                    f"--memory: too little for a line of over {self.max_line:,} bytes, in '{file.path}' at byte "
                    f"{start}; give more, or fewer --workers"
                )
        last = b"".join(pieces)
        if last and (stream.damage is None or self._text_of(last) is not None):
            yield start, last + b"\n"

    def _kept(self, file: InputFile, offset: int, block: bytes) -> Rows:
        """A block's lines, the blank and bad ones marked."""
        ends, lengths, good = _objects(block)
        good &= lengths <= self.how.max_row_bytes
        for line in np.flatnonzero(~good):
            begin = int(ends[line - 1]) if line else 0
            where = f"'{file.path}' at byte {offset + begin}"
            if lengths[line] > self.how.max_row_bytes:
                self._bad(str(too_long(where, self.how)))
                continue
            stripped = block[begin : int(ends[line])].strip()
            good[line] = stripped[:1] == b"{" and stripped[-1:] == b"}"
            if stripped and not good[line]:
                self._bad(f"{where} is not a JSON object")
        if self.text_keys is None:
            return Rows(block, ends, np.flatnonzero(good))
        keys = []
        for line in np.flatnonzero(good):
            begin = int(ends[line - 1]) if line else 0
            text = self._text_of(block[begin : int(ends[line])], f"'{file.path}' at byte {offset + begin}")
            good[line] = text is not None
            if text is not None:
                keys.append(self.text_keys.key(text))
        return Rows(block, ends, np.flatnonzero(good), keys)

    def _text_of(self, line: bytes, where: str | None = None) -> bytes | None:
        """The text of a line; None, and a bad row more where its place is given, if it has none."""
        try:
            return from_json(line, self.how, where or "").text
        except BadRow as error:
            if where is not None:
                self._bad(str(error))
            return None

    def _json(self, file: InputFile) -> Iterator[Rows]:
        made: list[dict[str, Any]] = []
        with TextReader(file.path, file.compression) as stream:
            stream.skip_byte_order_mark()
            values, row, size, ended = json_values(stream, self.how), 0, 0, False
            while not ended:
                row += 1
                try:
                    value, more = next(values)
                    text = from_value(value, self.how, f"'{file.path}' value {row}").text
                    made.append({**value, self.how.text_key: text})
                    size += more
                except StopIteration:
                    ended = True
                except BadRow as error:
                    self._bad(str(error))
                if size > READ_BYTES or ended:
                    yield self._made(made)
                    made, size = [], 0
            self._add_damage(stream)

    def _parquet(self, file: InputFile) -> Iterator[Rows]:
        table = ParquetTable(file.path, self.how.text_key, PARQUET_ROWS)
        text_alone = ParquetTable(file.path, self.how.text_key, PARQUET_ROWS)
        text_alone.columns = [self.how.text_key]
        for index in range(len(table)):
            try:
                try:
                    rows = table.rows(index)
                except BadRow:  # of a column that nobody needs, perhaps
                    rows = text_alone.rows(index)
            except BadRow as error:
                self._bad(str(error))
                continue
            step = max(1, min(len(rows), READ_BYTES * len(rows) // max(rows.nbytes, 1)))
            for begin in range(0, len(rows), step):
                yield self._rows_of(file, table.first_rows[index] + begin, rows.slice(begin, step))

    def _rows_of(self, file: InputFile, first: int, table: Any) -> Rows:
        columns = [
            bytes_of(table.column(at)) if name == self.how.text_key else plain_values(table.column(at))
            for at, name in enumerate(table.column_names)
        ]
        made = []
        for row, values in enumerate(zip(*columns, strict=True), first):
            value = dict(zip(table.column_names, values, strict=True))
            text = value[self.how.text_key]
            if text is None:
                self._bad(f"'{file.path}' row {row} has no text under '{self.how.text_key}'")
            elif len(text) > self.how.max_row_bytes:
                self._bad(str(too_long(f"'{file.path}' row {row}", self.how)))
            else:
                made.append(value)
        return self._made(made)

    def _text(self, file: InputFile) -> Iterator[Rows]:
        limit = min(self.how.max_row_bytes, self.max_line)
        with TextReader(file.path, file.compression) as stream:
            stream.skip_byte_order_mark()
            text = stream.read(limit + 1)
            if len(text) > self.how.max_row_bytes:
                raise too_long(f"'{file.path}'", self.how)
            if len(text) > limit:
                raise UserError(f"--memory: too little for '{file.path}'; give more than {8 * file.size / 1e9:.2g} GB")
            yield self._made([{"id": file.id, self.how.text_key: text}] if text or not stream.damage else [])
            self._add_damage(stream)

    def _made(self, values: list[dict[str, Any]]) -> Rows:
        """Rows of another format as lines of JSON."""
        lines = [as_line(value) for value in values]
        keys = None
        if self.text_keys is not None:
            keys = [self.text_keys.key(to_bytes(value[self.how.text_key])) for value in values]
        ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        return Rows(b"".join(lines), ends, np.arange(len(lines)), keys)


def plain_values(column: Any) -> list[Any]:
    """A column as Python values; as strings or numbers where Python has no such values, else as nothing."""
    import pyarrow as pa

    def as_bytes() -> list[Any]:  # strings may be no UTF-8
        return bytes_of(column) if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) else []

    def as_type(kind: Any) -> list[Any]:
        return column.cast(kind).to_pylist()

    for convert in (column.to_pylist, as_bytes, lambda: as_type(pa.string()), lambda: as_type(pa.int64())):
        try:
            if len(values := convert()) == len(column):
                return values
        except Exception:  # of any class: times of nanoseconds, time zones nobody knows, ...
            continue
    return [None] * len(column)


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
    """Go to where the first line at or after `begin` begins, and return that place."""
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
