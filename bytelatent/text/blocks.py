"""Blocks: a file's documents in parts that can be read on their own.

A block of JSONL is the lines that begin in so many bytes (of the decompressed file); one of Parquet is a run of rows of
a row group; any other file is one document and one block. So several processes divide a file among them, and a reader
goes on in the middle of one.
"""

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from bytelatent.errors import UserError
from bytelatent.text.documents import Document, from_json, from_table
from bytelatent.text.places import (
    GZIP,
    ZSTD,
    Damaged,
    import_pyarrow,
    is_remote,
    open_decompressed,
    open_file,
    readable,
    size_of,
)
from bytelatent.text.stored import Stored, stored_in

JSONL = (".jsonl", ".ndjson", ".jsonl.zst", ".jsonl.gz", ".ndjson.zst", ".ndjson.gz", ".json.gz", ".json.zst")
PARQUET = (".parquet",)
BLOCK_BYTES = 1 << 20
BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Block:
    """Documents with their rows in the file, empty ones left out, and one error for each row that holds none."""

    documents: list[tuple[int, Document]] = field(default_factory=list)
    damaged: list[Damaged] = field(default_factory=list)
    stored: Stored | None = None  # what the file says of the entropies or starts in it

    def rows(self) -> list[tuple[int, Document | Damaged]]:
        """Documents and damaged rows in the file's order."""
        rows: list[tuple[int, Document | Damaged]] = [*self.documents, *((error.row, error) for error in self.damaged)]
        return sorted(rows, key=lambda found: found[0]) if self.damaged else rows


class BlockReader(Protocol):
    """Reads blocks of one file; quick where they follow each other."""

    def count(self) -> int | None:
        """How many blocks there are; None where only reading the file would tell."""
        ...

    def read(self, index: int) -> Block | None:
        """A block; None past the last one.

        Raises:
            Damaged: the file cannot be read, or not from here on.
            UserError: the file is not of the kind that the settings say.
        """
        ...


def open_blocks(file: str, text_key: str = "text") -> BlockReader:
    """A reader of a file's blocks.

    Args:
        text_key: the key or column that holds the text.
    """
    if file.endswith(PARQUET):
        return ParquetBlocks(file, text_key)
    return LineBlocks(file, text_key) if file.endswith(JSONL) else PlainText(file)


def read_documents(
    file: str,
    text_key: str = "text",
    check: Callable[[Stored, str], None] = lambda stored, file: None,
    damaged: Callable[[Damaged], None] | None = None,
) -> Iterator[tuple[int, Document]]:
    """The documents of a file with their rows, empty ones left out.

    Args:
        text_key: the key or column that holds the text.
        check: complains about what the file says of stored entropies or starts.
        damaged: is told of each row without text, and of a file that cannot be read on; None to raise the first.

    Raises:
        UserError: the file cannot be read or a row holds no text; the file and row are named.
    """
    reader = open_blocks(file, text_key)
    for index in itertools.count():
        try:
            block = reader.read(index)
        except Damaged as error:
            if damaged is None:
                raise
            damaged(error)
            return
        if block is None:
            return
        if block.stored is not None:
            check(block.stored, file)
        for row, found in block.rows():
            if not isinstance(found, Damaged):
                yield row, found
            elif damaged is None:
                raise found
            else:
                damaged(found)


class PlainText:
    def __init__(self, file: str):
        self.file = file

    def count(self) -> int:
        return 1

    def read(self, index: int) -> Block | None:
        if index > 0:
            return None
        with readable(self.file), open_file(self.file) as stream:
            text = stream.read()
        return Block([(0, Document(text))] if text else [])


class LineBlocks:
    """JSONL, plain or compressed."""

    def __init__(self, file: str, text_key: str):
        self.file = file
        self.text_key = text_key
        self.compressed = file.endswith((GZIP, ZSTD))
        self._stream: io.BufferedReader | None = None
        self._next = 0  # the block that stands next
        self._at = 0  # bytes before the next line
        self._row: int | None = 0  # lines before it; None after a jump

    def count(self) -> int | None:
        if self.compressed:
            return None
        with readable(self.file):
            return -(-size_of(self.file) // BLOCK_BYTES)

    def read(self, index: int) -> Block | None:
        begin, end = index * BLOCK_BYTES, (index + 1) * BLOCK_BYTES
        with readable(self.file):
            stream = self._go_to(index)
            if self._at <= begin and not stream.peek(1):
                return None
            lines, first, at = [], self._row, self._at
            while self._at < end and (line := stream.readline()):
                lines.append(line)
                self._at += len(line)
            if self._row is not None:
                self._row += len(lines)
            self._next = index + 1
        return self._parsed(lines, first, at)

    def _go_to(self, index: int) -> io.BufferedReader:
        """The file, standing at the first line that begins in the block or after it."""
        begin = index * BLOCK_BYTES
        if self._stream is None or index < self._next:
            self._stream = open_decompressed(self.file)
            self._at, self._row, self._next = 0, 0, 0
        if index > self._next and not self.compressed:
            self._stream.seek(begin - 1)
            self._at = begin - 1 + len(self._stream.readline())
            self._row = None
        while self._at < begin and (line := self._stream.readline()):
            self._at += len(line)
            if self._row is not None:
                self._row += 1
        self._next = index
        return self._stream

    def _parsed(self, lines: list[bytes], first: int | None, at: int) -> Block:
        block = Block()
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            row = number if first is None else first + number
            try:
                document = from_json(line, self.text_key, f"'{self.file}' line {row + 1}")
            except Damaged as error:
                if first is None:  # only now is it worth counting
                    before = self._lines_before(at)
                    where = f"line {before + row + 1}" if before is not None else f"{row} lines after byte {at}"
                    error = Damaged(str(error).replace(f"line {row + 1}", where, 1))
                error.row = row
                block.damaged.append(error)
                continue
            if document.text:
                block.documents.append((row, document))
        return block

    def _lines_before(self, at: int) -> int | None:
        if is_remote(self.file):
            return None
        with open(self.file, "rb") as stream:
            pieces = iter(lambda: stream.read(min(BLOCK_BYTES, at - stream.tell())), b"")
            return sum(piece.count(b"\n") for piece in pieces)


class ParquetBlocks:
    def __init__(self, file: str, text_key: str):
        self.file = file
        self.text_key = text_key
        self._table: Any = None
        self._first_rows: list[int] = []  # of each block, and one past the last row
        self._groups: list[int] = []  # the row group of each block
        self._batches: Iterator[Any] = iter(())
        self._rest: Any = None  # rows read with a block that belong to the next ones
        self._group = -1  # the row group that `_batches` reads
        self._next = 0  # the block that stands next in it

    def count(self) -> int:
        self._open()
        return len(self._groups)

    def read(self, index: int) -> Block | None:
        self._open()
        if index >= len(self._groups):
            return None
        with readable(self.file):
            table = self._rows_of(index)
        first = self._first_rows[index]
        wheres = [f"'{self.file}' row {first + number}" for number in range(len(table))]
        block = Block(stored=self.stored)
        for row, document in enumerate(from_table(table, self.text_key, wheres), start=first):
            if isinstance(document, Damaged):
                document.row = row
                block.damaged.append(document)
            elif document.text:
                block.documents.append((row, document))
        return block

    def _open(self) -> None:
        if self._table is not None:
            return
        import_pyarrow(self.file)
        from pyarrow.parquet import ParquetFile

        with readable(self.file):
            table = ParquetFile(open_file(self.file) if is_remote(self.file) else self.file)
        schema = table.schema_arrow
        if self.text_key not in schema.names:
            raise UserError(
                f"data: '{self.file}' has no column '{self.text_key}'; its columns: {', '.join(schema.names)}"
            )
        kind = schema.field(self.text_key).type
        if str(kind).removeprefix("large_") not in ("string", "binary", "string_view", "binary_view"):
            raise UserError(f"data: '{self.file}' holds no text in column '{self.text_key}' but {kind}")
        self.stored = stored_in(schema.metadata, self.file)
        self._columns = [name for name in (self.text_key, "id", *self._stored_columns(schema)) if name in schema.names]
        first = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            begins = range(0, rows, BLOCK_ROWS)
            self._first_rows += [first + begin for begin in begins]
            self._groups += [group] * len(begins)
            first += rows
        self._first_rows.append(first)
        self._table = table

    def _stored_columns(self, schema: Any) -> list[str]:
        """What is stored beside the text: entropies of anyone's making, starts only of ours.

        Raises:
            UserError: a column of entropies holds something else.
        """
        from pyarrow.types import is_floating, is_large_list, is_list

        if self.stored is not None and self.stored.rule is not None:
            return ["starts"]
        if "entropies" not in schema.names:
            return []
        kind = schema.field("entropies").type
        if not (is_list(kind) or is_large_list(kind)) or not is_floating(kind.value_type):
            raise UserError(f"data: '{self.file}' holds in column 'entropies' no lists of floats but {kind}")
        return ["entropies"]

    def _rows_of(self, index: int) -> Any:
        """The rows of a block, as an Arrow table."""
        import pyarrow

        group = self._groups[index]
        if group != self._group or index < self._next:
            self._batches = self._table.iter_batches(
                batch_size=BLOCK_ROWS, row_groups=[group], columns=self._columns, use_threads=False
            )
            self._rest = None
            self._group, self._next = group, self._groups.index(group)
        while True:
            size = self._first_rows[self._next + 1] - self._first_rows[self._next]
            parts = [] if self._rest is None else [self._rest]
            while sum(map(len, parts)) < size:
                parts.append(pyarrow.Table.from_batches([next(self._batches)]))
            table = pyarrow.concat_tables(parts)
            self._rest = table.slice(size) if len(table) > size else None
            self._next += 1
            if self._next > index:
                return table.slice(0, size)
