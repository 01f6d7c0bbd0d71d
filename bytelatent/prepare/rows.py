"""Rows out of units: lines of JSONL as they stand, Parquet and plain text turned into such lines."""

import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from bytelatent.errors import UserError
from bytelatent.prepare.inputs import InputFile, Unit
from bytelatent.prepare.order import TextKeys
from bytelatent.prepare.runs import Rows
from bytelatent.text.places import import_pyarrow, open_decompressed, open_file, readable
from bytelatent.vocab import to_bytes

READ_BYTES = 1 << 19  # at once; where a torn file ends depends on it
WINDOW_BYTES = 1 << 18  # newlines are looked for in what fits into a core's cache
PARQUET_ROWS = 256
NEWLINE, RETURN, OPEN, CLOSE = b"\n\r{}"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Corrupt:
    """Rows that are left out: counted, the place of each kept.

    Args:
        limit: more than so many are an error.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.places: list[str] = []

    def add(self, place: str) -> None:
        self.places.append(place)
        if len(self.places) > self.limit:
            raise too_many(self.places, self.limit)


def too_many(places: list[str], limit: int) -> UserError:
    return UserError(
        f"{places[0]}: more than {limit} rows are corrupt, this one and {len(places) - 1} others so far; "
        "mend the input or give a higher --max-corrupt"
    )


class RowReader:
    """Reads units.

    Args:
        text_keys: makes keys from texts, which are then parsed out of the rows; None if rows need none.
        max_line: bytes a line may have.
        report: told the bytes read.
    """

    def __init__(
        self,
        files: list[InputFile],
        text_key: str,
        text_keys: TextKeys | None,
        corrupt: Corrupt,
        max_line: int,
        report: Callable[[int], None],
    ) -> None:
        self.files, self.text_key, self.text_keys = files, text_key, text_keys
        self.corrupt, self.max_line, self.report = corrupt, max_line, report

    def read(self, unit: Unit) -> Iterator[Rows]:
        """The rows of a unit, in order.

        A file that is torn or damaged gives the rows before the damage and counts as one corrupt row.

        Raises:
            UserError: a file cannot be read at all, or there are too many corrupt rows.
        """
        readers = {"packed": self._packed, "parquet": self._parquet, "text": self._text}
        for number in unit.files:
            file = self.files[number]
            with readable(file.path):
                if unit.kind == "lines":
                    yield from self._lines(file, unit.begin, unit.end)
                else:
                    yield from readers[unit.kind](file)
                    self.report(file.size)

    def _lines(self, file: InputFile, begin: int, end: int) -> Iterator[Rows]:
        with open_file(file.path) as stream:
            for offset, block in self._whole_lines(file, stream, _next_line(stream, begin), end):
                yield self._kept(file, offset, block)
                self.report(len(block))

    def _packed(self, file: InputFile) -> Iterator[Rows]:
        with open_decompressed(file.path) as stream:
            blocks = self._whole_lines(file, stream, 0, None)
            while (found := self._unless_torn(file, lambda: next(blocks, None))) is not None:
                yield self._kept(file, *found)

    def _whole_lines(
        self, file: InputFile, stream: BinaryIO, begin: int, end: int | None
    ) -> Iterator[tuple[int, bytes]]:
        """Blocks of whole lines, each with its offset: those that begin before `end`; the stream is at `begin`."""
        pieces: list[bytes | memoryview] = []
        position = start = begin
        while end is None or position < end or pieces:
            past = end is not None and position >= end  # only the rest of the last line is wanted
            block = stream.read(READ_BYTES if end is None or past else min(READ_BYTES, end - position))
            if not block:
                break
            cut = (block.find(b"\n") if past else block.rfind(b"\n")) + 1
            position += len(block)
            if cut:
                yield start, block if cut == len(block) and not pieces else b"".join([*pieces, memoryview(block)[:cut]])
                start = position - len(block) + cut
            if cut and past:
                return
            pieces = ([] if cut else pieces) + ([memoryview(block)[cut:]] if cut < len(block) else [])
            if position - start > self.max_line:
                raise UserError(
                    f"--memory: too little for a line of over {self.max_line:,} bytes, in '{file.path}' at byte "
                    f"{start}; give more, or fewer --workers"
                )
        if pieces:
            yield start, b"".join([*pieces, b"\n"])

    def _kept(self, file: InputFile, offset: int, block: bytes) -> Rows:
        """A block's lines, the blank and corrupt ones marked."""
        if offset == 0 and block.startswith(BYTE_ORDER_MARK):
            block = block[len(BYTE_ORDER_MARK) :]
        ends, good = _objects(block)
        for line in np.flatnonzero(~good):
            begin = int(ends[line - 1]) if line else 0
            stripped = block[begin : int(ends[line])].strip()
            good[line] = stripped[:1] == b"{" and stripped[-1:] == b"}"
            if stripped and not good[line]:
                self.corrupt.add(f"'{file.path}' at byte {offset + begin}")
        if self.text_keys is None:
            return Rows(block, ends, np.flatnonzero(good))
        keys = []
        for line in np.flatnonzero(good):
            begin = int(ends[line - 1]) if line else 0
            text = self._text_of(block[begin : int(ends[line])])
            good[line] = text is not None
            if text is None:
                self.corrupt.add(f"'{file.path}' at byte {offset + begin}")
            else:
                keys.append(self.text_keys.key(text))
        return Rows(block, ends, np.flatnonzero(good), keys)

    def _text_of(self, line: bytes) -> bytes | None:
        try:
            row = json.loads(line.decode("utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError):
            return None
        text = row.get(self.text_key) if isinstance(row, dict) else None
        return to_bytes(text) if isinstance(text, str) else None

    def _parquet(self, file: InputFile) -> Iterator[Rows]:
        import_pyarrow(file.path)
        from pyarrow.parquet import ParquetFile

        with open_file(file.path) as stream:
            table = self._unless_torn(file, lambda: ParquetFile(stream, pre_buffer=False))
            if table is None:
                return
            names = table.schema_arrow.names
            if self.text_key not in names:
                raise UserError(f"--text-key: '{file.path}' has no column '{self.text_key}'; it has {', '.join(names)}")
            batches = table.iter_batches(batch_size=PARQUET_ROWS, use_threads=False)
            first = 0
            while (batch := self._unless_torn(file, lambda: next(batches, None))) is not None:
                step = max(1, min(batch.num_rows, READ_BYTES * batch.num_rows // max(batch.nbytes, 1)))
                for row in range(0, batch.num_rows, step):
                    yield self._made(file, first + row, batch.slice(row, step).to_pylist())
                first += batch.num_rows

    def _text(self, file: InputFile) -> Iterator[Rows]:
        with open_decompressed(file.path) as stream:
            text = self._unless_torn(file, lambda: stream.read(self.max_line + 1))
        if text is not None:
            if len(text) > self.max_line:
                raise UserError(f"--memory: too little for '{file.path}'; give more than {8 * file.size / 1e9:.2g} GB")
            yield self._made(file, 0, [{"id": file.id, self.text_key: text}])

    def _made(self, file: InputFile, first: int, values: list[dict[str, Any]]) -> Rows:
        """Rows of another format as lines of JSON."""
        lines, keys = [], []
        for row, value in enumerate(values, first):
            text = value[self.text_key]
            if not isinstance(text, str | bytes):
                self.corrupt.add(f"'{file.path}' row {row}")
                continue
            lines.append(as_line(value))
            if self.text_keys is not None:
                keys.append(self.text_keys.key(to_bytes(text)))
        ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        return Rows(b"".join(lines), ends, np.arange(len(lines)), keys if self.text_keys is not None else None)

    def _unless_torn(self, file: InputFile, read: Callable[[], Any]) -> Any:
        """What `read` returns; None, and a corrupt row more, where the file is torn or damaged."""
        try:
            return read()
        except UserError:
            raise
        except (EOFError, zlib.error) as error:
            why = error
        except Exception as error:
            # A damaged gzip or zstd stream is an OSError without a number: one with it is the system's.
            if error.errno if isinstance(error, OSError) else not type(error).__module__.startswith("pyarrow"):
                raise
            why = error
        self.corrupt.add(f"'{file.path}' is torn or damaged ({' '.join(str(why).split())[:100]})")
        return None


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


def _next_line(stream: BinaryIO, begin: int) -> int:
    """Go to where the first line at or after `begin` begins, and return that place."""
    if begin == 0:
        return 0
    stream.seek(begin - 1)
    position = begin - 1
    while piece := stream.readline(READ_BYTES):
        position += len(piece)
        if piece.endswith(b"\n"):
            break
    return position


def _objects(block: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where the lines of a block end, int64 [lines], and which go from `{` to `}` with nothing around, bool [lines]."""
    array = np.frombuffer(block, dtype=np.uint8)
    windows = range(0, len(array), WINDOW_BYTES)
    ends = np.concatenate([np.flatnonzero(array[w : w + WINDOW_BYTES] == NEWLINE) + (w + 1) for w in windows])
    starts = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])
    last = np.maximum(ends - 2, 0)
    last = np.where(array[last] == RETURN, np.maximum(last - 1, 0), last)  # files written on Windows
    good = (array[starts] == OPEN) & (array[last] == CLOSE) & (last > starts)
    return ends, good
