"""Blocks: a file's documents in parts that can be read on their own.

A block of JSONL is the lines that begin in so many bytes (of the decompressed file); one of other JSON is values of so
many bytes; one of Parquet is a run of rows of a row group; any other file is one document and one block. So several
processes divide a file among them, and a reader goes on in the middle of one.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from bytelatent.text.bad_rows import BadRows
from bytelatent.text.documents import MAX_ROW_BYTES, Block, Document, Rows, from_json, from_value, too_long
from bytelatent.text.kinds import FileKind, TextReader, must_be_read
from bytelatent.text.lines import json_values, next_line
from bytelatent.text.parquet import ParquetBlocks
from bytelatent.text.places import BadRow, is_remote, open_file, readable, size_of
from bytelatent.text.stored import Stored

BLOCK_BYTES = 1 << 20


class BlockReader(Protocol):
    """Reads blocks of one file; quick where they follow each other."""

    def count(self) -> int | None:
        """How many blocks there are; None where only reading the file would tell."""
        ...

    def read(self, index: int) -> Block | None:
        """A block; None past the last one. What cannot be read of it is among its damaged rows.

        Raises:
            BadRow: the file cannot be read at all.
        """
        ...


def open_blocks(
    file: str, text_key: str = "text", stored: bool = True, max_row_bytes: int = MAX_ROW_BYTES
) -> BlockReader:
    """A reader of a file's blocks. Every command reads text through it, `blt prepare` through what is below it.

    Args:
        text_key: the key or column that holds the text.
        stored: whether entropies and starts beside the text are wanted.
        max_row_bytes: a longer row is a bad one.

    Raises:
        BadRow: the file cannot be opened, or is not read as text.
    """
    how = Rows(text_key, stored, max_row_bytes)
    found = must_be_read(file)
    if found.kind == "parquet":
        return ParquetBlocks(file, how)
    return {"lines": LineBlocks, "json": JsonBlocks, "text": PlainText}[str(found.kind)](file, found, how)


def read_documents(
    file: str,
    text_key: str = "text",
    check: Callable[[Stored, str], None] = lambda stored, file: None,
    damaged: BadRows | None = None,
    stored: bool = True,
    max_row_bytes: int = MAX_ROW_BYTES,
    on_block: Callable[[float | None], None] = lambda share: None,
) -> Iterator[tuple[int, Document]]:
    """The documents of a file with their rows, empty ones left out.

    Args:
        text_key, stored, max_row_bytes: as for `open_blocks`.
        check: complains about what the file says of stored entropies or starts.
        damaged: receives each bad row, and a file that cannot be read; None to raise the first.
        on_block: receives the share of the file that is read with the documents that follow; None where it is unknown.

    Raises:
        UserError: the file cannot be read or a row holds no text; the file and row are named.
    """
    is_read, first = False, None
    for row, found in _rows_of(file, Rows(text_key, stored, max_row_bytes), check, on_block):
        if not isinstance(found, BadRow):
            is_read = True
            yield row, found
        elif damaged is None:
            raise found
        else:
            first = first or found
            damaged(found)
    if damaged is not None and first is not None and not is_read:
        damaged.unread[file] = str(first)


def _rows_of(
    file: str, how: Rows, check: Callable[[Stored, str], None], on_block: Callable[[float | None], None]
) -> Iterator[tuple[int, Document | BadRow]]:
    try:
        reader = open_blocks(file, how.text_key, how.stored, how.max_row_bytes)
        count = reader.count()
        for index in itertools.count():
            block = reader.read(index)
            if block is None:
                return
            if block.stored is not None:
                check(block.stored, file)
            on_block((index + 1) / count if count else None)
            yield from block.rows()
    except BadRow as error:
        yield error.row, error


class PlainText:
    def __init__(self, file: str, kind: FileKind, how: Rows):
        self.file, self.kind, self.how = file, kind, how

    def count(self) -> int:
        return 1

    def read(self, index: int) -> Block | None:
        if index > 0:
            return None
        block = Block()
        with readable(self.file), TextReader(self.file, self.kind.compression) as stream:
            stream.skip_byte_order_mark()
            text = stream.read(self.how.max_row_bytes + 1)
            if len(text) > self.how.max_row_bytes:
                block.add(0, too_long(f"'{self.file}'", self.how))
                return block
            block.add(0, Document(text))
            _add_damage(block, stream, 1)
        return block


class JsonBlocks:
    """JSON that is not JSONL: its values."""

    def __init__(self, file: str, kind: FileKind, how: Rows):
        self.file, self.kind, self.how = file, kind, how
        self._blocks: Iterator[Block] = iter(())
        self._next: int | None = None  # the block that comes next

    def count(self) -> None:
        return None

    def read(self, index: int) -> Block | None:
        if self._next is None or index < self._next:
            self._blocks, self._next = self._all(), 0
        block = None
        with readable(self.file):
            while self._next <= index:
                self._next += 1
                if (block := next(self._blocks, None)) is None:
                    return None
        return block

    def _all(self) -> Iterator[Block]:
        block, size, row = Block(), 0, 0
        with TextReader(self.file, self.kind.compression) as stream:
            stream.skip_byte_order_mark()
            values = json_values(stream, self.how)
            while True:
                try:
                    value, more = next(values)
                    document: Document | BadRow = from_value(value, self.how, f"'{self.file}' value {row + 1}")
                except StopIteration:
                    break
                except BadRow as error:
                    document, more = error, 0
                block.add(row, document)
                size, row = size + more, row + 1
                if size >= BLOCK_BYTES:
                    yield block
                    block, size = Block(), 0
            _add_damage(block, stream, row)
        yield block


class LineBlocks:
    """JSONL, plain or compressed."""

    def __init__(self, file: str, kind: FileKind, how: Rows):
        self.file, self.kind, self.how = file, kind, how
        self._stream: TextReader | None = None
        self._next = 0  # the block that stands next
        self._at = 0  # bytes before the next line
        self._row: int | None = 0  # lines before it; None after a jump

    def count(self) -> int | None:
        if self.kind.compression is not None:
            return None
        with readable(self.file):
            return -(-size_of(self.file) // BLOCK_BYTES)

    def read(self, index: int) -> Block | None:
        begin, end = index * BLOCK_BYTES, (index + 1) * BLOCK_BYTES
        with readable(self.file):
            stream = self._go_to(index)
            if self._at <= begin and not stream.peek(1) and not (index == 0 and stream.damage):
                return None
            lines, first, at = [], self._row, self._at
            while self._at < end:
                line, size = next_line(stream, self.how.max_row_bytes)
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
            self._stream = TextReader(self.file, self.kind.compression)
            self._at, self._row, self._next = self._stream.skip_byte_order_mark(), 0, 0
        if index > self._next and self.kind.compression is None:
            self._stream.seek(begin - 1)
            self._at = begin - 1 + self._pass_line()
            self._row = None
        while self._at < begin and (size := self._pass_line()):
            self._at += size
            if self._row is not None:
                self._row += 1
        self._next = index
        return self._stream

    def _pass_line(self) -> int:
        assert self._stream is not None
        return next_line(self._stream, self.how.max_row_bytes)[1]

    def _parsed(self, lines: list[bytes | None], first: int | None, at: int, stream: TextReader) -> Block:
        block = Block()
        damage = None if stream.peek(1) else stream.damage
        for number, line in enumerate(lines):
            if line is not None and not line.strip():
                continue
            row = number if first is None else first + number
            where = f"'{self.file}' line {row + 1}"
            try:
                if line is None:
                    raise too_long(where, self.how)
                block.add(row, from_json(line, self.how, where))
            except BadRow as error:
                if damage is not None and line is not None and not line.endswith(b"\n"):
                    continue  # it is a part of what was lost
                if first is None:  # only now is it worth counting
                    before = self._lines_before(at)
                    where = f"line {before + row + 1}" if before is not None else f"{row} lines after byte {at}"
                    error = BadRow(str(error).replace(f"line {row + 1}", where, 1))
                block.add(row, error)
        if damage is not None and (lines or at == 0):
            _add_damage(block, stream, (first or 0) + len(lines))
        return block

    def _lines_before(self, at: int) -> int | None:
        if is_remote(self.file):
            return None
        with open_file(self.file) as stream:
            pieces = iter(lambda: stream.read(min(BLOCK_BYTES, at - stream.tell())), b"")
            return sum(piece.count(b"\n") for piece in pieces)


def _add_damage(block: Block, stream: Any, row: int) -> None:
    """Add what of a file was not read, after the rows that were."""
    if stream.damage is not None:
        block.add(row, BadRow(f"data: '{stream.file}' {stream.damage}"))
