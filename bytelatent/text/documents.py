"""Documents: a text, and what a row of a file holds of one."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from bytelatent.terminal import one_line
from bytelatent.text.bad_rows import BadRow, NoDocument
from bytelatent.text.stored import Stored
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
class ReadOptions:
    """How the rows of a file are read.

    Attributes:
        text_key: the key or column that holds the text.
        stored: read entropies and starts beside the text; otherwise nothing in them can be wrong.
        max_row_bytes: a longer row, in bytes of its line or its text, is bad.
    """

    text_key: str = "text"
    stored: bool = True
    max_row_bytes: int = MAX_ROW_BYTES

    @property
    def too_long(self) -> str:
        """Why a row of more bytes is bad."""
        return f"is longer than max_row_bytes ({self.max_row_bytes:,}); cut it into documents, or allow more"


@dataclass(frozen=True)
class DocumentBlock:
    """Documents with their rows in the file, without empty ones, and one error for each row that holds none."""

    documents: list[tuple[int, Document]] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    stored: Stored | None = None  # what the file says of the entropies or starts in it

    def add(self, row: int, found: Document | BadRow) -> None:
        if isinstance(found, BadRow):
            found.row = row
            self.bad_rows.append(found)
        elif found.text:
            self.documents.append((row, found))

    def rows(self) -> list[tuple[int, Document | BadRow]]:
        """Documents and bad rows in the file's order."""
        rows: list[tuple[int, Document | BadRow]] = [*self.documents, *((error.row, error) for error in self.bad_rows)]
        return sorted(rows, key=lambda found: found[0]) if self.bad_rows else rows


def _whole_number(digits: str) -> int | Decimal:
    """A whole number, also of more digits than Python's `int` reads."""
    try:
        return int(digits)
    except ValueError:
        return Decimal(digits)


JSON = json.JSONDecoder(parse_int=_whole_number)


def json_value(line: bytes) -> Any:
    """What a line of JSON holds. Bytes that are not UTF-8 become surrogates, which `vocab.to_bytes` turns back.

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


def from_json(line: bytes, options: ReadOptions) -> Document:
    """The document of a JSON line.

    Raises:
        NoDocument: it holds none.
    """
    try:
        value = json_value(line)
    except ValueError as error:
        raise NoDocument(f"is not JSON ({error}); mend or remove it") from None
    return from_value(value, options)


def from_value(value: Any, options: ReadOptions) -> Document:
    """The document of a JSON object.

    Raises:
        NoDocument: it holds none.
    """
    key = options.text_key
    if not isinstance(value, dict):
        raise NoDocument(f"is not a JSON object with the key '{key}'")
    text = value.get(key)
    if key in value and not isinstance(text, str):
        raise NoDocument(f"has no text under '{key}' but {JSON_NAMES.get(type(text), 'an object')}")
    if not isinstance(text, str):
        raise NoDocument(f"has no text under '{key}'; its keys: {some(value)}")
    entropies = _floats(value.get("entropies")) if options.stored else None
    name = value.get("id")
    name = None if name is None or isinstance(name, list | dict) else id_of(name)
    return checked(Document(to_bytes(text), name, entropies))


def checked(document: Document) -> Document:
    """
    Raises:
        NoDocument: its entropies are not one for each id, or not finite.
    """
    text, entropies = document.text, document.entropies
    if entropies is not None:
        if entropies.shape != (len(text) + 1,):
            raise NoDocument(f"has {entropies.size} entropies for {len(text)} bytes; {ONE_EACH}")
        if not np.isfinite(entropies).all() or (entropies < 0).any():
            raise NoDocument("has an entropy that is negative or not finite")
    return document


def some(names: Iterable[Any]) -> str:
    """The first few of some keys or columns, each in a few characters."""
    found = [one_line(str(name)) for name in names]
    return ", ".join(name if len(name) <= 20 else f"{name[:17]}..." for name in found[:6]) + (
        ", ..." if len(found) > 6 else ""
    )


def id_of(value: Any) -> str:
    """A value as the id of a document, in valid UTF-8."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _floats(stored: Any) -> np.ndarray | None:
    if stored is None:
        return None
    try:
        with np.errstate(over="ignore"):
            given = np.asarray(stored)
            found = given.astype(np.float32) if given.dtype.kind in "iuf" else None  # no strings, booleans or nulls
    except ValueError:  # lists of several lengths
        found = None
    if found is None or found.ndim == 0:
        raise NoDocument("has entropies that are not a list of numbers")
    return found
