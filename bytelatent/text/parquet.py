"""Parquet: rows in blocks, of the columns that are wanted and no others."""

from collections.abc import Iterator
from typing import Any

from bytelatent.text.documents import Block, Rows, from_table, some
from bytelatent.text.places import BadRow, import_pyarrow, is_remote, open_file, readable
from bytelatent.text.stored import Stored, stored_in

BLOCK_ROWS = 1024


class ParquetTable:
    """The rows of a file in blocks, which do not cross its row groups.

    Attributes:
        schema: of all columns.
        columns: those that are read; None for all.
    """

    def __init__(self, file: str, text_key: str, block_rows: int):
        """
        Raises:
            BadRow: it is no whole Parquet file, or has no such column, or two, or one that holds no text.
        """
        import_pyarrow(file)
        self.file = file
        with readable(file):
            self._table = _open(file)
            self.schema = self._table.schema_arrow
            _check_text(self.schema, file, text_key)
            self.first_rows: list[int] = []  # of each block, and one past the last row
            self._groups: list[int] = []  # the row group of each block
            first = 0
            for group in range(self._table.num_row_groups):
                rows = self._table.metadata.row_group(group).num_rows
                begins = range(0, rows, block_rows)
                self.first_rows += [first + begin for begin in begins]
                self._groups += [group] * len(begins)
                first += rows
            self.first_rows.append(first)
        self.columns: list[str] | None = None
        self._block_rows = block_rows
        self._batches: Iterator[Any] = iter(())
        self._rest: Any = None  # rows read with a block that belong to the next ones
        self._group = -1  # the row group that `_batches` reads
        self._next = 0  # the block that comes next in it

    def __len__(self) -> int:
        return len(self._groups)

    def rows(self, index: int) -> Any:
        """A block as an Arrow table.

        Raises:
            BadRow: the block cannot be read; others may be.
        """
        try:
            with readable(self.file):
                return self._rows(index)
        except BadRow as error:
            self._group = -1
            first, end = self.first_rows[index] + 1, self.first_rows[index + 1]
            raise BadRow(f"{error}: rows {first:,} to {end:,} of {self.first_rows[-1]:,} are not read") from None

    def _rows(self, index: int) -> Any:
        import pyarrow

        group = self._groups[index]
        if group != self._group or index < self._next:
            self._batches = self._table.iter_batches(
                batch_size=self._block_rows, row_groups=[group], columns=self.columns, use_threads=False
            )
            self._rest = None
            self._group, self._next = group, self._groups.index(group)
        while True:
            size = self.first_rows[self._next + 1] - self.first_rows[self._next]
            parts = [] if self._rest is None else [self._rest]
            while sum(map(len, parts)) < size:
                batch = next(self._batches, None)
                if batch is None:
                    raise EOFError("it has fewer rows than it says")
                parts.append(pyarrow.Table.from_batches([batch]))
            table = pyarrow.concat_tables(parts)
            self._rest = table.slice(size) if len(table) > size else None
            self._next += 1
            if self._next > index:
                return table.slice(0, size)


class ParquetBlocks:
    """A reader of blocks; see `blocks.BlockReader`."""

    def __init__(self, file: str, how: Rows):
        self.file, self.how = file, how
        self._table: ParquetTable | None = None
        self._stored: Stored | None = None

    def count(self) -> int:
        return len(self._open())

    def read(self, index: int) -> Block | None:
        table = self._open()
        if index >= len(table):
            return None
        block = Block(stored=self._stored)
        first, end = table.first_rows[index : index + 2]
        wheres = [f"'{self.file}' row {row}" for row in range(first, end)]
        try:
            with readable(self.file):
                found = list(from_table(table.rows(index), self.how, wheres))
        except BadRow as error:
            found = [error]
        for row, document in enumerate(found, start=first):
            block.add(row, document)
        return block

    def _open(self) -> ParquetTable:
        if self._table is None:
            table = ParquetTable(self.file, self.how.text_key, BLOCK_ROWS)
            names = table.schema.names
            wanted = [self.how.text_key, *(["id"] if names.count("id") == 1 else [])]
            if self.how.stored:
                self._stored = stored_in(table.schema.metadata, self.file)
                wanted += _stored_columns(table.schema, self._stored, self.file)
            table.columns = list(dict.fromkeys(wanted))
            self._table = table
        return self._table


def _open(file: str) -> Any:
    from pyarrow.parquet import ParquetFile

    if is_remote(file) or not file.isprintable():
        return ParquetFile(open_file(file))  # Arrow opens no file whose name is no UTF-8
    return ParquetFile(file)


def _check_text(schema: Any, file: str, text_key: str) -> None:
    from pyarrow import BaseExtensionType, types

    number = schema.names.count(text_key)
    if number == 0:
        raise BadRow(
            f"data: '{file}' has no column '{text_key}'; its columns: {some(schema.names)}; name the text's: --text-key"
        )
    if number > 1:
        raise BadRow(
            f"data: '{file}' has {number} columns '{text_key}', and which is the text is not clear; rename one"
        )
    kind = schema.field(text_key).type
    kind = kind.storage_type if isinstance(kind, BaseExtensionType) else kind
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if str(kind).removeprefix("large_").partition("[")[0] not in (
        *("string", "binary", "string_view", "binary_view", "fixed_size_binary", "null"),
    ):
        raise BadRow(f"data: '{file}' holds no text in column '{text_key}' but {kind}; name the text's: --text-key")


def _stored_columns(schema: Any, stored: Stored | None, file: str) -> list[str]:
    """What is stored beside the text: entropies of anyone's making, starts only of ours.

    Raises:
        BadRow: a column of entropies holds something else, or there are two.
    """
    from pyarrow.types import is_floating, is_large_list, is_list

    if stored is not None and stored.rule is not None:
        return ["starts"]
    if "entropies" not in schema.names:
        return []
    if (number := schema.names.count("entropies")) > 1:
        raise BadRow(f"data: '{file}' has {number} columns 'entropies', and which counts is not clear; rename one")
    kind = schema.field("entropies").type
    if not (is_list(kind) or is_large_list(kind)) or not is_floating(kind.value_type):
        raise BadRow(f"data: '{file}' holds in column 'entropies' no lists of floats but {kind}")
    return ["entropies"]
