"""How a file is read, in blocks; and the readers of text formats, which may be compressed: JSONL, JSON, plain text.

Lines and values have a bounded length: one that is longer is left out without being held in memory.
"""

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bytelatent.text.documents import (
    JSON,
    BadRow,
    Document,
    NoDocument,
    ReadOptions,
    RowTooLong,
    from_json,
    from_value,
)
from bytelatent.text.stored import Stored
from bytelatent.text.streams import TextReader, is_remote, open_file, readable, size_of

BLOCK_BYTES = 1 << 20  # of JSONL or JSON, decompressed
SKIP_BYTES = 1 << 20
DEEPEST = 1 << 18  # brackets in one another; more would only take their time
BRACKETS = re.compile(r'[{}\[\]]|"(?:[^"\\]|\\.)*+(?:"|\Z)', re.DOTALL)  # and the strings that may hold some


@dataclass(frozen=True)
class DocumentBlock:
    """Documents with their rows in the file, without empty ones, and one error for each row that holds none."""

    documents: list[tuple[int, Document]] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    stored: Stored | None = None  # what the file says of the entropies or starts in it
    empty_rows: list[int] = field(default_factory=list)

    def add(self, row: int, found: Document | BadRow) -> None:
        if isinstance(found, BadRow):
            found.row = row
            self.bad_rows.append(found)
        elif found.text:
            self.documents.append((row, found))
        else:
            self.empty_rows.append(row)

    def rows(self) -> list[tuple[int, Document | BadRow]]:
        """Documents and bad rows in the file's order."""
        rows: list[tuple[int, Document | BadRow]] = [*self.documents, *((error.row, error) for error in self.bad_rows)]
        return sorted(rows, key=lambda found: found[0]) if self.bad_rows else rows


class BlockReader:
    """Reads one file in blocks, so that several processes divide it, and a reader resumes in the middle of one.

    Args:
        file: its name.
        compression: how it is compressed; None where it is not.
        options: how its rows are read.
    """

    def __init__(self, file: str, compression: str | None, options: ReadOptions) -> None:
        self.file, self.compression, self.options = file, compression, options

    def count(self) -> int | None:
        """The number of blocks; None where only reading the file would tell."""
        raise NotImplementedError

    def read(self, index: int) -> DocumentBlock | None:
        """A block, fast where blocks follow each other; None past the last one.

        Raises:
            BadRow: the file cannot be read at all.
        """
        raise NotImplementedError

    def rows(self) -> Iterator[dict[str, Any] | BadRow]:
        """All rows in order, each with all of its keys or columns, the text in bytes: for `blt prepare`, which takes
        JSONL as it is.

        Raises:
            BadRow: the file cannot be read from here on.
        """
        raise NotImplementedError


class PlainTextReader(BlockReader):
    """A file that is one document."""

    def count(self) -> int:
        return 1

    def read(self, index: int) -> DocumentBlock | None:
        if index > 0:
            return None
        if self.options.chat is not None:
            raise BadRow(self.file, "is plain text, which holds no conversations (format: chat); write them as JSONL")
        block = DocumentBlock()
        for row, found in enumerate(self.rows()):
            block.add(row, found if isinstance(found, BadRow) else Document(found[self.options.text_key]))
        return block

    def rows(self) -> Iterator[dict[str, Any] | BadRow]:
        with readable(self.file), TextReader(self.file, self.compression) as stream:
            stream.skip_byte_order_mark()
            text = stream.read(self.options.max_row_bytes + 1)
            if len(text) > self.options.max_row_bytes:
                yield RowTooLong(self.file, self.options.too_long)
                return
            if text or stream.unread is None:
                yield {self.options.text_key: text}
            if stream.unread is not None:
                yield BadRow(self.file, stream.unread)


class JsonReader(BlockReader):
    """JSON that is not JSONL: the elements of an array, one object, or several after each other."""

    def __init__(self, file: str, compression: str | None, options: ReadOptions) -> None:
        super().__init__(file, compression, options)
        self._blocks: Iterator[DocumentBlock] = iter(())
        self._next: int | None = None  # the block that comes next

    def count(self) -> None:
        return None

    def read(self, index: int) -> DocumentBlock | None:
        if self._next is None or index < self._next:
            self._blocks, self._next = self._all(), 0
        block = None
        while self._next <= index:
            self._next += 1
            if (block := next(self._blocks, None)) is None:
                return None
        return block

    def rows(self) -> Iterator[dict[str, Any] | BadRow]:
        for found, value, _ in self._rows():
            yield found if isinstance(found, BadRow) else {**value, self.options.text_key: found.text}

    def _all(self) -> Iterator[DocumentBlock]:
        block, size = DocumentBlock(), 0
        for row, (found, _, num_bytes) in enumerate(self._rows()):
            block.add(row, found)
            size += num_bytes
            if size >= BLOCK_BYTES:
                yield block
                block, size = DocumentBlock(), 0
        yield block

    def _rows(self) -> Iterator[tuple[Document | BadRow, Any, int]]:
        """Each document with its object, and about how many bytes it takes; and what was not read."""
        with readable(self.file), TextReader(self.file, self.compression) as stream:
            stream.skip_byte_order_mark()
            try:
                for row, (value, num_bytes) in enumerate(json_values(stream, self.options)):
                    if isinstance(value, BadRow):
                        yield value, None, 0
                        continue
                    try:
                        found = from_value(value, self.options)
                    except NoDocument as error:
                        found, num_bytes = BadRow(self.file, str(error), f"value {row + 1}"), 0
                    yield found, value, num_bytes
            except BadRow as error:
                yield error, None, 0
            if stream.unread is not None:
                yield BadRow(self.file, stream.unread), None, 0


class JsonlReader(BlockReader):
    """JSONL. A block is the lines that begin in a stretch of `BLOCK_BYTES` of the decompressed file."""

    def __init__(self, file: str, compression: str | None, options: ReadOptions) -> None:
        super().__init__(file, compression, options)
        self._stream: TextReader | None = None
        self._next = 0  # the block that comes next
        self._at = 0  # bytes before the next line
        self._row: int | None = 0  # lines before it; None after a jump

    def count(self) -> int | None:
        if self.compression is not None:
            return None
        with readable(self.file):
            return -(-size_of(self.file) // BLOCK_BYTES)

    def read(self, index: int) -> DocumentBlock | None:
        begin, end = index * BLOCK_BYTES, (index + 1) * BLOCK_BYTES
        with readable(self.file):
            stream = self._go_to(index)
            if self._at <= begin and not stream.peek(1) and not (index == 0 and stream.unread):
                return None
            lines, first, at = [], self._row, self._at
            while self._at < end:
                line, size = next_line(stream, self.options.max_row_bytes)
                if not size:
                    break
                lines.append(line)
                self._at += size
            if self._row is not None:
                self._row += len(lines)
            self._next = index + 1
            return self._parsed(lines, first, at, stream)

    def _go_to(self, index: int) -> TextReader:
        """The file, at the first line that begins in the block or after it."""
        begin = index * BLOCK_BYTES
        if self._stream is None or index < self._next:
            self._stream = TextReader(self.file, self.compression)
            self._at, self._row, self._next = self._stream.skip_byte_order_mark(), 0, 0
        if index > self._next and self.compression is None:
            self._stream.seek(begin - 1)
            self._at = begin - 1 + self._skip_line(self._stream)
            self._row = None
        while self._at < begin and (size := self._skip_line(self._stream)):
            self._at += size
            if self._row is not None:
                self._row += 1
        self._next = index
        return self._stream

    def _skip_line(self, stream: TextReader) -> int:
        return next_line(stream, self.options.max_row_bytes)[1]

    def _parsed(self, lines: list[bytes | None], first: int | None, at: int, stream: TextReader) -> DocumentBlock:
        """A block of lines; None in place of one that is too long. The first has this number, if it is known, and is
        at this byte.
        """
        block = DocumentBlock()
        is_cut = not stream.peek(1) and stream.unread is not None
        for number, line in enumerate(lines):
            row = number + (first or 0)
            if line is None:
                block.add(row, RowTooLong(self.file, self.options.too_long, self._where(row, first, at)))
            elif line.strip():
                try:
                    block.add(row, from_json(line, self.options))
                except NoDocument as error:
                    if not is_cut or line.endswith(b"\n"):  # else it is a part of what was not read
                        block.add(row, BadRow(self.file, str(error), self._where(row, first, at)))
        if is_cut and (lines or at == 0):
            block.add((first or 0) + len(lines), BadRow(self.file, str(stream.unread)))
        return block

    def _where(self, row: int, first: int | None, at: int) -> str:
        """A line's place in the file, for a message; lines before a jump are only now worth counting."""
        if first is not None:
            return f"line {row + 1}"
        if is_remote(self.file):
            return f"{row} lines after byte {at}"
        with open_file(self.file) as stream:
            sizes = [min(BLOCK_BYTES, at - begin) for begin in range(0, at, BLOCK_BYTES)]
            before = sum(stream.read(size).count(b"\n") for size in sizes)
        return f"line {before + row + 1}"


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


def json_values(stream: TextReader, options: ReadOptions) -> Iterator[tuple[Any, int]]:
    """The values of a JSON file that is not JSONL, and about how many bytes each takes; an error in place of one that
    is too long or not JSON.

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
            where = f"value {row + 1}"
            try:
                value, end = JSON.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                reason = f"is not JSON ({getattr(error, 'msg', 'it is nested too deeply')})"
                value, end = BadRow(stream.file, f"{reason}; mend or remove it", where), _end_of(text, at)
                if end is None and ended:
                    raise BadRow(stream.file, f"{reason}; it and the rest are not read", where) from None
                end = len(text) if end is None else end
            if end < len(text) or ended:
                is_short = end - at <= options.max_row_bytes
                yield (value if is_short else RowTooLong(stream.file, options.too_long, where)), end - at
                at, row = end, row + 1
                continue
            if len(text) - at > options.max_row_bytes:
                raise RowTooLong(stream.file, options.too_long, where)
        elif ended:
            if in_array and stream.unread is None:
                raise BadRow(stream.file, f"is not whole: its array has no end after {row:,} values")
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
