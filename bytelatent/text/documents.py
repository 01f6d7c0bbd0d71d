"""Documents out of rows: a JSON value, a row of a table, or a file that is one text."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from bytelatent.terminal import one_line
from bytelatent.text.places import BadRow
from bytelatent.text.stored import Stored, unpack_starts
from bytelatent.vocab import to_bytes

MAX_ROW_BYTES = 64 << 20
JSON_NAMES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
ONE_EACH = "there should be one for BOS and one for each byte"


@dataclass(frozen=True)
class Document:
    """A text, and what is stored with it: entropies in nats or patch starts, one for BOS and one for each byte."""

    text: bytes
    id: str | None = None  # valid UTF-8
    entropies: np.ndarray | None = None  # float32 [bytes + 1]
    starts: np.ndarray | None = None  # bool [bytes + 1], whether the id that follows starts a patch


@dataclass(frozen=True)
class Rows:
    """How the rows of a file are read.

    Attributes:
        text_key: the key or column that holds the text.
        stored: whether entropies and starts beside the text are wanted; if not, nothing there can be wrong.
        max_row_bytes: a longer row, in bytes of its line or its text, is bad.
    """

    text_key: str = "text"
    stored: bool = True
    max_row_bytes: int = MAX_ROW_BYTES


@dataclass(frozen=True)
class Block:
    """Documents with their rows in the file, empty ones left out, and one error for each row that holds none."""

    documents: list[tuple[int, Document]] = field(default_factory=list)
    damaged: list[BadRow] = field(default_factory=list)
    stored: Stored | None = None  # what the file says of the entropies or starts in it

    def add(self, row: int, found: Document | BadRow) -> None:
        if isinstance(found, BadRow):
            found.row = row
            self.damaged.append(found)
        elif found.text:
            self.documents.append((row, found))

    def rows(self) -> list[tuple[int, Document | BadRow]]:
        """Documents and damaged rows in the file's order."""
        rows: list[tuple[int, Document | BadRow]] = [*self.documents, *((error.row, error) for error in self.damaged)]
        return sorted(rows, key=lambda found: found[0]) if self.damaged else rows


def _whole_number(digits: str) -> int | Decimal:
    """A whole number, also of more digits than Python reads as one: a row is rarely read for it."""
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)


JSON = json.JSONDecoder(parse_int=_whole_number)


def json_value(line: bytes) -> Any:
    """What a line of JSON holds. Bytes that are no UTF-8 become surrogates, which `vocab.to_bytes` turns back.

    Raises:
        ValueError: it is not JSON; the message says why.
    """
    text = line.decode("utf-8", errors="surrogateescape")
    try:
        return JSON.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(error.msg) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_json(line: bytes, how: Rows, where: str) -> Document:
    """The document of a JSON line.

    Raises:
        BadRow: it holds none; `where` names the row.
    """
    try:
        value = json_value(line)
    except ValueError as error:
        raise BadRow(f"data: {where} is not JSON ({error}); mend or remove it") from None
    return from_value(value, how, where)


def from_value(value: Any, how: Rows, where: str) -> Document:
    """The document of a JSON object, or of what `lines.json_values` gives in place of one.

    Raises:
        BadRow: as `from_json`.
    """
    if isinstance(value, BadRow):
        raise value
    if not isinstance(value, dict):
        raise BadRow(f"data: {where} is not a JSON object with the key '{how.text_key}'")
    text = value.get(how.text_key)
    if how.text_key in value and not isinstance(text, str):
        instead = JSON_NAMES.get(type(text), "an object")
        raise BadRow(f"data: {where} has no text under '{how.text_key}' but {instead}")
    if not isinstance(text, str):
        raise BadRow(f"data: {where} has no text under '{how.text_key}'; its keys: {some(value)}")
    entropies = _floats(value.get("entropies"), where) if how.stored else None
    name = value.get("id")
    name = None if name is None or isinstance(name, list | dict) else name_of(name)
    return _checked(to_bytes(text), name, entropies, None, where)


def from_table(table: Any, how: Rows, wheres: list[str]) -> Iterator[Document | BadRow]:
    """The documents of an Arrow table's rows, in order.

    Args:
        table: with a column of strings or bytes for the text, and perhaps `id`, `entropies` or `starts`.
        wheres: names each row.
    """
    texts = bytes_of(table.column(how.text_key))
    none = [None] * len(texts)
    names = table.column_names
    ids = _names(table.column("id")) if "id" in names and how.text_key != "id" else none
    entropies = _lists(table.column("entropies")) if "entropies" in names else none
    starts = bytes_of(table.column("starts")) if "starts" in names else none
    for text, name, floats, bits, where in zip(texts, ids, entropies, starts, wheres, strict=True):
        if text is None:
            yield BadRow(f"data: {where} has no text under '{how.text_key}'; its columns: {some(names)}")
        elif len(text) > how.max_row_bytes:
            yield too_long(where, how)
        else:
            try:
                yield _checked(text, name, floats, None if bits is None else _unpacked(bits, text, where), where)
            except BadRow as error:
                yield error


def too_long(where: str, how: Rows) -> BadRow:
    return BadRow(
        f"data: {where} is longer than max_row_bytes ({how.max_row_bytes:,}); cut it into documents, or allow more"
    )


def some(names: Iterable[Any]) -> str:
    """The first few of some keys or columns, each in a few characters."""
    found = [one_line(str(name)) for name in names]
    return ", ".join(name if len(name) <= 20 else f"{name[:17]}..." for name in found[:6]) + (
        ", ..." if len(found) > 6 else ""
    )


def bytes_of(column: Any) -> list[bytes | None]:
    """A column of strings or bytes; strings are not decoded, so that bytes that are no UTF-8 survive."""
    import pyarrow as pa

    if isinstance(column.type, pa.BaseExtensionType):
        column = column.cast(column.type.storage_type)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.cast(pa.large_binary()).to_pylist()


def _checked(
    text: bytes, name: str | None, entropies: np.ndarray | None, starts: np.ndarray | None, where: str
) -> Document:
    if entropies is not None:
        if entropies.shape != (len(text) + 1,):
            raise BadRow(f"data: {where} has {entropies.size} entropies for {len(text)} bytes; {ONE_EACH}")
        if not np.isfinite(entropies).all() or (entropies < 0).any():
            raise BadRow(f"data: {where} has an entropy that is negative or not finite")
    return Document(text, name, entropies, starts)


def _floats(stored: Any, where: str) -> np.ndarray | None:
    if stored is None:
        return None
    try:
        with np.errstate(over="ignore"):
            given = np.asarray(stored)
            found = given.astype(np.float32) if given.dtype.kind in "iuf" else None  # no texts, no truths, no nulls
    except ValueError:  # lists of several lengths
        found = None
    if found is None or found.ndim == 0:
        raise BadRow(f"data: {where} has entropies that are not a list of numbers")
    return found


def _unpacked(bits: bytes, text: bytes, where: str) -> np.ndarray:
    try:
        return unpack_starts(bits, len(text))
    except ValueError as error:
        raise BadRow(f"data: {where} has {error}; {ONE_EACH}") from None


def name_of(value: Any) -> str:
    """A value as the name of a document, in valid UTF-8."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _names(column: Any) -> list[str | None]:
    """A column of ids; none where they are of a kind that names nothing."""
    import pyarrow as pa

    try:
        found = bytes_of(column if pa.types.is_dictionary(column.type) else column.cast(pa.large_binary()))
    except Exception:
        try:
            found = column.cast(pa.string()).to_pylist()
        except Exception:
            return [None] * len(column)
    names = [name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name for name in found]
    return [None if name is None else name_of(name) for name in names]


def _lists(column: Any) -> list[np.ndarray | None]:
    """A column of lists of numbers, as float32 arrays."""
    arrays: list[np.ndarray | None] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False).astype(np.float32)
        ends = chunk.offsets.to_numpy()
        for row, missing in enumerate(chunk.is_null().to_pylist()):
            arrays.append(None if missing else values[ends[row] : ends[row + 1]])
    return arrays
