"""The first pass: each task reads some units and writes their lines as sorted runs.

Lines of JSONL stay as they are; other JSON, Parquet and plain text are turned into such lines. What a file is, and how
it is opened, `bytelatent.text` decides; JSONL is only divided here without parsing it, which is several times as fast.

A task collects lines until its memory is full, sorts them by key, and appends them as a *run* to its one data file.
Beside it are files of each line's key and length, and for every run a table of where each *bin* (the keys with the same
highest bits) begins. So the documents of a range of bins are one part of each run, and all parts are known without
reading the data.
"""

# Shapes: L lines of a block, N of them kept; R runs of a task, B bins

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.files import own_file, write_whole_json
from bytelatent.prepare.plan import InputFile, TaskFiles, Unit, WorkFolder, too_many_bad_rows, writing
from bytelatent.prepare.shuffle import INDEX_BYTES, TextKeys, bin_edges, gathered, position_keys, scratch, sorted_order
from bytelatent.text import BadRow, ReadOptions
from bytelatent.text.documents import NoDocument, RowTooLong, from_json
from bytelatent.text.formats import TEXT, open_blocks, readable_kind
from bytelatent.text.streams import TextReader, readable

READ_BYTES = 1 << 19  # at once
WINDOW_BYTES = 1 << 18  # newlines are looked for in what fits into a core's cache
MAX_LINE_BYTES = 2**31 - 2**24  # Arrow's offsets are of 31 bits
NEWLINE, RETURN, OPEN, CLOSE = b"\n\r{}"


def scatter_rows(work: WorkFolder, task: int, report: Callable[[int], None]) -> None:
    """Do one task of the first pass, unless an earlier call has finished it.

    Args:
        report: receives the bytes read.

    Raises:
        UserError: the input cannot be read, there are too many bad rows, or the disk is full.
    """
    plan = work.plan
    files = work.task_files(task)
    if files.marker() is not None:
        return
    text_keys = TextKeys(plan.request["seed"]) if plan.request["dedup"] else None
    corrupt = BadRowRecord(plan.request["max_bad_rows"])
    max_line = min(plan.run_bytes // 2, MAX_LINE_BYTES)
    options = ReadOptions(plan.request["text_key"], stored=False, max_row_bytes=plan.request["max_row_bytes"])
    reader = LineReader(plan.files, options, text_keys, corrupt, max_line, report)
    with writing(work.out):
        runs = RunWriter(files, plan.bits, plan.run_bytes, with_low=text_keys is not None)
        try:
            for number in range(*plan.tasks[task]):
                draw = position_keys(plan.request["seed"], number)
                for block in reader.read(plan.units[number]):
                    if block.keys is None:
                        runs.add(block, draw(len(block.kept)), None)
                    else:
                        both = np.frombuffer(b"".join(block.keys), dtype=">u8").astype(np.uint64).reshape(-1, 2)
                        runs.add(block, *np.ascontiguousarray(both.T))
            runs.finish(corrupt.plain())
        finally:
            runs.close()


@dataclass
class LineBlock:
    """Lines of JSON, each with its newline, in one buffer; some of them (blank or corrupt ones) are to be left out."""

    data: bytes
    ends: np.ndarray  # int64 [L], after the newline
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
        self.places.append(error.line)
        self.bad_files.setdefault(number, error.line)
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
                    is_jsonl = file.kind in ("lines", "packed")
                    for block in self._jsonl(file, unit) if is_jsonl else self._other_rows(file):
                        if len(block.kept):
                            self.corrupt.good_files.add(self._number)
                        yield block
            except BadRow as error:
                self._bad(error)
            if unit.kind != "lines":
                self.report(file.size)

    def _bad(self, error: BadRow) -> None:
        self.corrupt.add(self._number, error)

    def _jsonl(self, file: InputFile, unit: Unit) -> Iterator[LineBlock]:
        with TextReader(file.path, file.compression) as stream:
            begin = _next_line(stream, unit.begin) if unit.begin else stream.skip_byte_order_mark()
            divided = unit.kind == "lines"
            for offset, data in self._whole_lines(file, stream, begin, unit.end if divided else None):
                yield self._kept(file, offset, data)
                if divided:
                    self.report(len(data))
            if stream.unread is not None:
                self._bad(BadRow(file.path, stream.unread))

    def _whole_lines(
        self, file: InputFile, stream: TextReader, begin: int, end: int | None
    ) -> Iterator[tuple[int, bytes]]:
        """Whole lines that begin before `end`, some at a time, with their offset; the stream is at `begin`."""
        pieces: list[bytes | memoryview] = []
        position = start = begin
        skips = False  # the rest of a line that is too long
        while end is None or position < end or pieces or skips:
            past = end is not None and position >= end  # only the rest of the last line is wanted
            data = stream.read(READ_BYTES if end is None or past else min(READ_BYTES, end - position))
            if not data:
                break
            position += len(data)
            if skips:
                line_end = data.find(b"\n") + 1
                if line_end and past:
                    return
                skips, data = not line_end, data[line_end:] if line_end else b""
                start = position - len(data)
            cut = (data.find(b"\n") if past else data.rfind(b"\n")) + 1
            if cut:
                yield start, data if cut == len(data) and not pieces else b"".join([*pieces, memoryview(data)[:cut]])
                start = position - len(data) + cut
            if cut and past:
                return
            pieces = ([] if cut else pieces) + ([memoryview(data)[cut:]] if cut < len(data) else [])
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

    def _kept(self, file: InputFile, offset: int, data: bytes) -> LineBlock:
        """A block's lines, the blank and bad ones marked."""
        begins, ends, lengths, good = _objects(data)
        good &= lengths <= self.options.max_row_bytes
        for line in np.flatnonzero(~good):
            where = f"at byte {offset + begins[line]}"
            if lengths[line] > self.options.max_row_bytes:
                self._bad(RowTooLong(file.path, self.options.too_long, where))
                continue
            stripped = data[begins[line] : ends[line]].strip()
            good[line] = stripped[:1] == b"{" and stripped[-1:] == b"}"
            if stripped and not good[line]:
                self._bad(BadRow(file.path, "is not a JSON object", where))
        if self.text_keys is None:
            return LineBlock(data, ends, np.flatnonzero(good))
        keys = []
        for line in np.flatnonzero(good):
            text = self._text_of(file, data[begins[line] : ends[line]], f"at byte {offset + begins[line]}")
            good[line] = text is not None
            if text is not None:
                keys.append(self.text_keys.key(text))
        return LineBlock(data, ends, np.flatnonzero(good), keys)

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
        lines: list[bytes] = []
        keys: list[bytes] = []
        size = 0
        for row in open_blocks(file.path, options).rows():
            if isinstance(row, RowTooLong) and options != self.options:
                raise UserError(f"--memory: too little for '{file.path}'; give more than {8 * file.size / 1e9:.2g} GB")
            if isinstance(row, BadRow):
                self._bad(row)
                continue
            if self.text_keys is not None:
                keys.append(self.text_keys.key(row[options.text_key]))
            lines.append(as_line({"id": file.id, **row} if is_text else row))
            size += len(lines[-1])
            if size > READ_BYTES:
                yield self._collected(lines, keys)
                lines, keys, size = [], [], 0
        yield self._collected(lines, keys)

    def _collected(self, lines: list[bytes], keys: list[bytes]) -> LineBlock:
        ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        return LineBlock(b"".join(lines), ends, np.arange(len(lines)), None if self.text_keys is None else keys)


def as_line(row: dict[str, Any]) -> bytes:
    r"""A row as a line of JSON. Bytes that are no UTF-8 become `\udcXX`, which `vocab.to_bytes` turns back."""
    row = {key: _plain(value) if isinstance(value, bytes) else value for key, value in row.items()}
    try:
        return (json.dumps(row, ensure_ascii=False, default=_plain) + "\n").encode()
    except UnicodeEncodeError:  # JSON has no way to write such a byte as it is
        return (json.dumps(row, default=_plain) + "\n").encode()


def _plain(value: Any) -> str:
    """Bytes, dates and decimals, which JSON does not know."""
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


def _objects(block: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where the lines of a block begin and end, their bytes before the end, int64 [L] each, and which go from `{` to
    `}` with nothing around, bool [L].
    """
    array = np.frombuffer(block, dtype=np.uint8)
    windows = range(0, len(array), WINDOW_BYTES)
    ends = np.concatenate([np.flatnonzero(array[w : w + WINDOW_BYTES] == NEWLINE) + (w + 1) for w in windows])
    begins = np.concatenate([np.zeros(1, ends.dtype), ends[:-1]])
    last = np.maximum(ends - 2, 0)
    last = np.where(array[last] == RETURN, np.maximum(last - 1, 0), last)  # files written on Windows
    good = (array[begins] == OPEN) & (array[last] == CLOSE) & (last > begins)
    return begins, ends, last + 1 - begins, good


class RunWriter:
    """Collects lines, and writes them as sorted runs.

    Args:
        bits: number of a key's bits that name its bin.
        run_bytes: memory for a run, lines and index together.
        with_low: keys have 128 bits.
    """

    def __init__(self, files: TaskFiles, bits: int, run_bytes: int, with_low: bool) -> None:
        self.files, self.bits, self.run_bytes = files, bits, run_bytes
        kinds = ["data", "lengths", "table", "high"] + (["low"] if with_low else [])
        files.path("marker").unlink(missing_ok=True)
        self._open = {kind: open(files.path(kind), "wb", opener=own_file) for kind in kinds}  # noqa: SIM115
        self._buffer = scratch(run_bytes)
        self._documents = self._bytes = self._runs = 0
        self._clear()

    def add(self, block: LineBlock, high: np.ndarray, low: np.ndarray | None) -> None:
        """Add lines, with the keys (uint64 [N]) of the kept ones.

        Raises:
            UserError: they do not fit into the memory for a run.
        """
        size, lines = len(block.data), len(block.ends)
        if self._used + size + INDEX_BYTES * (self._lines + lines) > self.run_bytes:
            self.flush()
            if size + INDEX_BYTES * lines > self.run_bytes:
                raise UserError(
                    f"--memory: too little for a line of about {size:,} bytes; give more, or fewer --workers"
                )
        self._buffer[self._used : self._used + size] = np.frombuffer(block.data, dtype=np.uint8)
        self._ends.append((block.ends + self._used).astype(np.int32))
        self._kept.append(block.kept + self._lines)
        self._high.append(high)
        self._low.append(low)
        self._used += size
        self._lines += lines

    def flush(self) -> None:
        """Write what was collected as one run: lines, lengths and keys in order, and the row of the table."""
        if sum(len(kept) for kept in self._kept):
            import pyarrow

            ends = np.concatenate([np.zeros(1, np.int32), *self._ends])
            keys = {"high": np.concatenate(self._high)}
            if "low" in self._open:
                keys["low"] = np.concatenate(self._low)  # type: ignore[arg-type]
            order = sorted_order(**keys)
            lines = np.concatenate(self._kept)[order]
            lengths = (ends[1:] - ends[:-1])[lines].astype(np.uint32)
            self._write_index({kind: values[order] for kind, values in keys.items()}, lengths)
            buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(self._buffer[: self._used])]
            array = pyarrow.Array.from_buffers(pyarrow.binary(), len(ends) - 1, buffers)
            for data in gathered(array, lines, lengths):
                self._open["data"].write(data)
        self._clear()

    def finish(self, bad_rows: dict[str, Any]) -> None:
        """Write the last run, and the marker, with the task's bad rows."""
        self.flush()
        self.close()
        sizes = {kind: self.files.path(kind).stat().st_size for kind in self._open}
        counts = {"documents": self._documents, "bytes": self._bytes, "runs": self._runs}
        write_whole_json(self.files.path("marker"), {**counts, **bad_rows, "sizes": sizes})

    def close(self) -> None:
        for file in self._open.values():
            file.close()

    def _clear(self) -> None:
        self._used = self._lines = 0
        self._ends: list[np.ndarray] = []
        self._kept: list[np.ndarray] = []
        self._high: list[np.ndarray] = []
        self._low: list[np.ndarray | None] = []

    def _write_index(self, keys: dict[str, np.ndarray], lengths: np.ndarray) -> None:
        """Add a run's keys and lengths, and documents and bytes before each bin to the table, [R, 2, B + 1]."""
        before = bin_edges(keys["high"], self.bits)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        table = np.stack([before + self._documents, ends[before] + self._bytes])
        for kind, values in {"table": table, "lengths": lengths, **keys}.items():
            self._open[kind].write(values.data)
        self._documents += len(lengths)
        self._bytes += int(ends[-1])
        self._runs += 1
