"""Readers of columnar formats: rows in blocks, of the columns that are wanted and no others.

A format is a `TableFile`, which opens it and reads record batches; all else is the same for each.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import numpy as np

from bytelatent.text.conversations import COMPLETION, MESSAGES, PROMPT, TEXT_KEY
from bytelatent.text.documents import (
    ONE_EACH,
    BadRow,
    Document,
    NoDocument,
    ReadOptions,
    RowTooLong,
    chat_document,
    checked,
    field_of,
    id_of,
    some,
)
from bytelatent.text.readers import BlockReader, DocumentBlock
from bytelatent.text.stored import Stored, stored_in, unpack_starts
from bytelatent.text.streams import import_pyarrow, is_remote, open_file, readable

BLOCK_ROWS = 1024
WHOLE_ROWS = 256  # of a block, where all columns are read
SLICE_BYTES = 1 << 19  # of a table that becomes Python values at once
BYTES_TYPES = ("string", "binary", "string_view", "binary_view", "fixed_size_binary", "null")


class TableFile:
    """A file of record batches in groups of rows, such as Parquet's row groups. A subclass opens one.

    Attributes:
        title: the format's name, for messages.
        schema: of all columns; `columns`: those that are read, None for all.
        first_rows: of each block, and one past the last row; a block lies in one group.
    """

    title: ClassVar[str]

    def __init__(self, file: str, text_key: str | None, block_rows: int):
        """
        Args:
            text_key: the column that should hold text; None where any columns will do.

        Raises:
            BadRow: the file is not whole, has no such column, or two, or one that does not hold text.
        """
        import_pyarrow(file)
        self.file = file
        self.columns: list[str] | None = None
        with readable(file, self.title):
            self.schema, group_rows = self.open()
            if text_key is not None:
                _check_text(self.schema, file, text_key)
            self.first_rows: list[int] = []
            self._groups: list[int] = []  # the group of each block
            first = 0
            for group, rows in enumerate(group_rows):
                begins = range(0, rows, block_rows)
                self.first_rows += [first + begin for begin in begins]
                self._groups += [group] * len(begins)
                first += rows
            self.first_rows.append(first)
        self._block_rows = block_rows
        self._blocks: Iterator[Any] = iter(())
        self._group = -1  # the group that `_blocks` reads
        self._next = 0  # the block that comes next in it

    def open(self) -> tuple[Any, list[int]]:
        """Open the file: its Arrow schema, and the rows of each group."""
        raise NotImplementedError

    def batches(self, group: int, block_rows: int) -> Iterator[Any]:
        """The record batches of a group, with the columns `self.columns`, of at most about `block_rows` rows."""
        raise NotImplementedError

    def rows(self, index: int) -> Any:
        """A block as an Arrow table.

        Raises:
            BadRow: the block cannot be read; others may be.
        """
        try:
            with readable(self.file, self.title):
                return self._rows(index)
        except BadRow as error:
            self._group = -1
            first, end = self.first_rows[index] + 1, self.first_rows[index + 1]
            lost = f"rows {first:,} to {end:,} of {self.first_rows[-1]:,} are not read"
            raise BadRow(self.file, f"{error.reason}: {lost}") from None

    def _rows(self, index: int) -> Any:
        group, size = self._groups[index], self.first_rows[index + 1] - self.first_rows[index]
        if group != self._group or index < self._next:
            self._blocks, self._group, self._next = self._blocks_of(group), group, self._groups.index(group)
        skipped, self._next = index - self._next, index + 1
        table = next(itertools.islice(self._blocks, skipped, None), None)
        if table is None or len(table) != size:
            raise EOFError("it has fewer rows than it says")
        return table

    def _blocks_of(self, group: int) -> Iterator[Any]:
        """A group's rows as Arrow tables of `block_rows` rows; the last one may be smaller."""
        import pyarrow

        rows: Any = []
        for batch in self.batches(group, self._block_rows):
            table = pyarrow.Table.from_batches([batch])
            rows = pyarrow.concat_tables([rows, table]) if len(rows) else table
            while len(rows) >= self._block_rows:
                yield rows.slice(0, self._block_rows)
                rows = rows.slice(self._block_rows)
        if len(rows):
            yield rows


class ParquetTable(TableFile):
    title = "Parquet"

    def open(self) -> tuple[Any, list[int]]:
        from pyarrow.parquet import ParquetFile

        # Arrow opens no file whose name is not UTF-8.
        by_name = not is_remote(self.file) and self.file.isprintable()
        self._parquet = ParquetFile(self.file if by_name else open_file(self.file))
        groups = range(self._parquet.num_row_groups)
        return self._parquet.schema_arrow, [self._parquet.metadata.row_group(group).num_rows for group in groups]

    def batches(self, group: int, block_rows: int) -> Iterator[Any]:
        return self._parquet.iter_batches(
            batch_size=block_rows, row_groups=[group], columns=self.columns, use_threads=False
        )


class TableReader(BlockReader):
    """Blocks of documents, and whole rows, of a columnar file."""

    table: ClassVar[type[TableFile]]

    def __init__(self, file: str, compression: str | None, options: ReadOptions):
        super().__init__(file, compression, options)
        self._table: TableFile | None = None
        self._stored: Stored | None = None

    def count(self) -> int:
        return len(self._open().first_rows) - 1

    def read(self, index: int) -> DocumentBlock | None:
        if index >= self.count():
            return None
        table = self._open()
        block = DocumentBlock(stored=self._stored)
        first = table.first_rows[index]
        try:
            with readable(self.file, table.title):
                found = list(self._documents(table.rows(index), first))
        except BadRow as error:
            found = [error]
        for row, document in enumerate(found, start=first):
            block.add(row, document)
        return block

    def rows(self) -> Iterator[dict[str, Any] | BadRow]:
        key = self.options.text_key
        table = self.table(self.file, key, WHOLE_ROWS)
        text_alone = self.table(self.file, key, WHOLE_ROWS)
        text_alone.columns = [key]
        for index, first in enumerate(table.first_rows[:-1]):
            try:
                try:
                    found = table.rows(index)
                except BadRow:  # perhaps of a column that nobody needs
                    found = text_alone.rows(index)
            except BadRow as error:
                yield error
                continue
            step = max(1, min(len(found), SLICE_BYTES * len(found) // max(found.nbytes, 1)))
            for begin in range(0, len(found), step):
                yield from self._whole_rows(found.slice(begin, step), first + begin)

    def _open(self) -> TableFile:
        if self._table is None:
            is_chat, key = self.options.chat is not None, self.options.text_key
            table = self.table(self.file, None if is_chat else key, BLOCK_ROWS)
            names = table.schema.names
            field = self.options.field_key
            others = ("id", field if field is None or field in names else field.partition(".")[0])
            if is_chat:
                of_chat = dict.fromkeys((key if key != TEXT_KEY else MESSAGES, PROMPT, COMPLETION))
                if not of_chat.keys() & set(names):
                    columns = f"{' or '.join(map(repr, of_chat))}; its columns: {some(names)}"
                    raise BadRow(self.file, f"holds no conversations (format: chat): it has no column {columns}")
                others = (*others, *of_chat)
            wanted = [*([] if is_chat else [key]), *(name for name in others if names.count(name) == 1)]
            if self.options.stored:
                self._stored = stored_in(table.schema.metadata, self.file)
                wanted += _stored_columns(table.schema, self._stored, self.file)
            table.columns = list(dict.fromkeys(wanted))
            self._table = table
        return self._table

    def _documents(self, table: Any, first: int) -> Iterator[Document | BadRow]:
        """The documents of an Arrow table whose first row has this number."""
        if self.options.chat is not None:
            yield from self._conversations(table, first)
            return
        key = self.options.text_key
        texts = bytes_of(table.column(key))
        none, names = [None] * len(texts), table.column_names
        fields = none if self.options.field_key is None else _fields(table, self.options.field_key)
        ids = _ids(table.column("id")) if "id" in names and key != "id" else none
        entropies = _lists(table.column("entropies")) if "entropies" in names else none
        starts = bytes_of(table.column("starts")) if "starts" in names else none
        values = zip(texts, ids, entropies, starts, fields, strict=True)
        for row, (text, id_, floats, bits, field) in enumerate(values, start=first):
            try:
                text = self._checked_text(text, row, names)
                unpacked = None if bits is None else unpack_starts(bits, len(text))
                yield checked(Document(text, id_, floats, unpacked, field))
            except BadRow as error:
                yield error
            except NoDocument as error:
                yield BadRow(self.file, str(error), f"row {row}")
            except ValueError as error:
                yield BadRow(self.file, f"has {error}; {ONE_EACH}", f"row {row}")

    def _conversations(self, table: Any, first: int) -> Iterator[Document | BadRow]:
        columns = [plain_values(table[at]) for at in range(table.num_columns)]
        for row, values in enumerate(zip(*columns, strict=True), start=first):
            try:
                found = chat_document(dict(zip(table.column_names, values, strict=True)), self.options)
                is_long = len(found.text) > self.options.max_row_bytes
                yield RowTooLong(self.file, self.options.too_long, f"row {row}") if is_long else found
            except NoDocument as error:
                yield BadRow(self.file, str(error), f"row {row}")

    def _whole_rows(self, table: Any, first: int) -> Iterator[dict[str, Any] | BadRow]:
        key, names = self.options.text_key, table.column_names
        columns = [bytes_of(table[at]) if name == key else plain_values(table[at]) for at, name in enumerate(names)]
        for row, values in enumerate(zip(*columns, strict=True), start=first):
            value = dict(zip(names, values, strict=True))
            try:
                self._checked_text(value[key], row, names)
                yield value
            except BadRow as error:
                yield error

    def _checked_text(self, text: bytes | None, row: int, names: list[str]) -> bytes:
        if text is None:
            reason = f"has no text under '{self.options.text_key}'; its columns: {some(names)}"
            raise BadRow(self.file, reason, f"row {row}")
        if len(text) > self.options.max_row_bytes:
            raise RowTooLong(self.file, self.options.too_long, f"row {row}")
        return text


class ParquetReader(TableReader):
    table = ParquetTable


def bytes_of(column: Any) -> list[bytes | None]:
    """A column of strings or bytes; strings are not decoded, so that bytes that are not UTF-8 survive."""
    import pyarrow as pa

    if isinstance(column.type, pa.BaseExtensionType):
        column = column.cast(column.type.storage_type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_binary()).to_pylist()


def plain_values(column: Any) -> list[Any]:
    """A column as Python values; as strings or numbers where Python has no such values, else as None."""
    import pyarrow as pa

    conversions: list[Callable[[], list[Any]]] = [
        column.to_pylist,
        lambda: column.cast(pa.string()).to_pylist(),
        lambda: column.cast(pa.int64()).to_pylist(),
    ]
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        conversions.insert(1, lambda: bytes_of(column))  # strings may not be UTF-8
    for convert in conversions:
        with suppress(Exception):  # of any class: times of nanoseconds, time zones nobody knows, ...
            return convert()
    return [None] * len(column)


def _ids(column: Any) -> list[str | None]:
    """A column of ids; None where they are of a type that names nothing."""
    import pyarrow as pa

    for convert in (lambda: bytes_of(column), lambda: column.cast(pa.string()).to_pylist()):
        with suppress(Exception):
            ids = [id_.decode("utf-8", "surrogateescape") if isinstance(id_, bytes) else id_ for id_ in convert()]
            return [None if id_ is None else id_of(id_) for id_ in ids]
    return [None] * len(column)


def _fields(table: Any, key: str) -> Sequence[Any]:
    """The values of a column, or of a key in a column of structs."""
    import pyarrow as pa

    name = key if key in table.column_names else key.partition(".")[0]
    if name not in table.column_names:
        return [None] * len(table)
    column = table.column(name)
    if name == key and not pa.types.is_nested(column.type):
        return _ids(column)
    return [field_of({name: value}, key) for value in plain_values(column)]


def _lists(column: Any) -> list[np.ndarray | None]:
    """A column of lists of numbers, as float32 arrays."""
    arrays: list[np.ndarray | None] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False).astype(np.float32)
        ends = chunk.offsets.to_numpy()
        for row, missing in enumerate(chunk.is_null().to_pylist()):
            arrays.append(None if missing else values[ends[row] : ends[row + 1]])
    return arrays


def _check_text(schema: Any, file: str, text_key: str) -> None:
    from pyarrow import BaseExtensionType, types

    number = schema.names.count(text_key)
    if number == 0:
        columns = some(schema.names)
        raise BadRow(file, f"has no column '{text_key}'; its columns: {columns}; name the text's: --text-key")
    if number > 1:
        raise BadRow(file, f"has {number} columns '{text_key}', and which is the text is not clear; rename one")
    kind = schema.field(text_key).type
    kind = kind.storage_type if isinstance(kind, BaseExtensionType) else kind
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if str(kind).removeprefix("large_").partition("[")[0] not in BYTES_TYPES:
        raise BadRow(file, f"holds no text in column '{text_key}' but {kind}; name the text's: --text-key")


def _stored_columns(schema: Any, stored: Stored | None, file: str) -> list[str]:
    """What is stored beside the text: entropies of any origin, starts only where this package wrote them."""
    from pyarrow.types import is_floating, is_large_list, is_list

    if stored is not None and stored.patching is not None:
        return ["starts"]
    if "entropies" not in schema.names:
        return []
    if (number := schema.names.count("entropies")) > 1:
        raise BadRow(file, f"has {number} columns 'entropies', and which counts is not clear; rename one")
    kind = schema.field("entropies").type
    if not (is_list(kind) or is_large_list(kind)) or not is_floating(kind.value_type):
        raise BadRow(file, f"holds in column 'entropies' no lists of floats but {kind}")
    return ["entropies"]
