"""Documents, and the rows that hold none: how they are counted, logged and passed over."""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.terminal import one_line
from bytelatent.text.chat import BadMessages
from bytelatent.text.conversations import (
    COMPLETION,
    MESSAGES,
    PROMPT,
    TEXT_KEY,
    ChatOptions,
    Conversation,
    conversation_of,
)
from bytelatent.vocab import to_bytes

LOGGER = logging.getLogger(__name__)

MAX_ROW_BYTES = 64 << 20
MAX_BAD_ROWS = 100  # unless a setting says otherwise
MAX_LINE = 200  # characters of a log line about a bad row
JSON_NAMES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
ONE_EACH = "there should be one for BOS and one for each byte"


class NotPlain(Enum):
    """What a key holds instead of a text, a number, or true or false."""

    LIST = "a list"
    OBJECT = "an object"


@dataclass(frozen=True)
class Document:
    """A text, and what is stored with it: entropies in nats or patch starts, one for BOS and one for each byte.

    `field` is the value of the key or column that was asked for.
    """

    text: bytes
    id: str | None = None  # valid UTF-8
    entropies: np.ndarray | None = None  # float32 [bytes + 1]
    starts: np.ndarray | None = None  # bool [bytes + 1], whether the id that follows starts a patch
    field: "str | NotPlain | None" = None  # valid UTF-8
    chat: Conversation | None = None  # what the text was written from


@dataclass(frozen=True)
class ReadOptions:
    """How the rows of a file are read.

    Attributes:
        text_key: the key or column that holds the text.
        stored: read entropies and starts beside the text; otherwise nothing in them can be wrong.
        max_row_bytes: a longer row, in bytes of its line or its text, is bad.
        field_key: the key (`meta.source` in an object within) or column whose value a document keeps as its `field`.
        chat: rows are conversations, read so; None for texts.
    """

    text_key: str = "text"
    stored: bool = True
    max_row_bytes: int = MAX_ROW_BYTES
    field_key: str | None = None
    chat: ChatOptions | None = None

    @property
    def too_long(self) -> str:
        """Why a row of more bytes is bad."""
        return f"is longer than max_row_bytes ({self.max_row_bytes:,}); cut it into documents, or allow more"


class TextError(UserError):
    """Text cannot be found or read.

    Attributes:
        line: the message without the prefix `data: `, in one line that any terminal can print.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.line: str = self.args[0]

    def __str__(self) -> str:
        return f"data: {self.line}"


class BadRow(TextError):
    """A row, or a file from some point on, that cannot be read, though others may be.

    Attributes:
        file: its name.
        reason: what is wrong with it.
        where: which part of the file; empty for all or the rest of it.
        row: the number of the row from 0; 0 for a whole file.
    """

    def __init__(self, file: str, reason: str, where: str = "", row: int = 0) -> None:
        self.file, self.reason, self.where, self.row = file, reason, where, row
        super().__init__(f"'{file}' {where} {reason}")

    def __reduce__(self) -> Any:  # processes that read ahead send them
        return type(self), (self.file, self.reason, self.where, self.row)


class RowTooLong(BadRow):
    """A row of more bytes than may be read at once."""


class NoDocument(ValueError):
    """A row holds no document; the message is the reason of a `BadRow`."""


class BadRows:
    """Counts bad rows and files, and logs each of them once.

    Args:
        limit: one more is an error; 0 makes each an error.
        name: the setting that holds the limit, for the error.
        of: what they are counted of, for the error: empty, or ` of '...'`.

    Attributes:
        count: bad rows and files so far.
        unread: files of which nothing could be read, each with the reason.
        num_empty: documents without a byte in what was read to its end.
        first: what was wrong with the first one.
    """

    def __init__(self, limit: int, name: str = "--max-bad-rows", of: str = ""):
        self.limit, self.name, self.of = limit, name, of
        self.count = 0
        self.unread: dict[str, str] = {}
        self.num_empty = 0
        self.first = ""

    def __call__(self, error: BadRow) -> None:
        """Pass over one.

        Raises:
            UserError: there are more than the limit.
        """
        self.count += 1
        line = str(error).rstrip(".")
        self.first = self.first or error.line.rstrip(".")
        if self.count > self.limit:
            before = f"{self.limit} bad rows or files{self.of} were passed over already ({self.name})"
            raise UserError(f"{line}; {before}" if self.limit else line)
        warn_once(line, f"; passed over ({self.count} of at most {self.limit})")

    @property
    def why_no_text(self) -> str:
        """Why nothing was read: all was empty, or passed over."""
        if not self.first:
            return "every document is empty"
        return f"all its rows were passed over ({self.name}), each named in a warning; the first: {self.first}"


def must_have_read(unread: dict[str, str]) -> None:
    """Complain, once all else is done, about files of which nothing could be read.

    Args:
        unread: `BadRows.unread`.

    Raises:
        UserError: there are some.
    """
    if unread:
        file, line = next(iter(unread.items()))
        num_others = len(unread) - 1
        more = f" (and {num_others:,} more file{'s' if num_others > 1 else ''})" if num_others else ""
        raise UserError(f"data: nothing of '{file}' could be read{more}: {line}")


_logged: set[str] = set()


def warn_once(line: str, end: str = "") -> None:
    """Log a line and its end, shortened, unless it was logged since `forget_logged`: text is read in every epoch."""
    if line not in _logged:
        _logged.add(line)
        LOGGER.warning("%s", short(line, end))


def forget_logged() -> None:
    """Let another run or command of this process log the same lines again."""
    _logged.clear()


def logged_lines() -> set[str]:
    """The lines that were logged since `forget_logged`."""
    return set(_logged)


def mark_logged(lines: set[str]) -> None:
    """Do not log lines that another process has logged."""
    _logged.update(lines)


def short(line: str, end: str = "") -> str:
    """A line and its end in at most `MAX_LINE` characters: a long file name loses its beginning, then the line its end.

    Both may hold anything; `UserError` has made it safe to print.
    """
    if len(line) + len(end) > MAX_LINE:
        line = re.sub(r"^([^']*)'([^']{40,})'", lambda found: f"{found[1]}'...{found[2][-37:]}'", line)
    if len(line) + len(end) > MAX_LINE:
        line = f"{line[: MAX_LINE - len(end) - 3]}..."
    return line + end


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
        keys = f"the key '{key}'" if options.chat is None else keys_of_chats(key)
        raise NoDocument(f"is not a JSON object with {keys}")
    if options.chat is not None:
        return chat_document(value, options)
    if key not in value:
        raise NoDocument(f"has no text under '{key}'; its keys: {some(value)}{_hint(value)}")
    text = value[key]
    if not isinstance(text, str):
        raise NoDocument(f"has no text under '{key}' but {JSON_NAMES.get(type(text), 'an object')}")
    entropies = _floats(value.get("entropies")) if options.stored else None
    field = None if options.field_key is None else field_of(value, options.field_key)
    return checked(Document(to_bytes(text), _plain(value.get("id")), entropies, field=field))


def chat_document(row: dict[str, Any], options: ReadOptions) -> Document:
    """The document of a row that holds a conversation.

    Raises:
        NoDocument: it holds none.
    """
    assert options.chat is not None
    try:
        found = conversation_of(row, options.text_key, options.chat)
    except BadMessages as error:
        raise NoDocument(f"holds no conversation to train on: {error}") from None
    if found is None:
        keys = keys_of_chats(options.text_key, "nor")
        raise NoDocument(f"has no {keys}; its keys: {some(row)}; it is no conversation (format: chat)")
    field = None if options.field_key is None else field_of(row, options.field_key)
    return Document(found.rendered.text, _plain(row.get("id")), field=field, chat=found)


def keys_of_chats(text_key: str, conjunction: str = "or") -> str:
    """The keys of which a row of a conversation has some."""
    return f"'{MESSAGES if text_key == TEXT_KEY else text_key}', {conjunction} '{PROMPT}' and '{COMPLETION}'"


def _hint(row: Iterable[str]) -> str:
    return "; it is a conversation: set format: chat of the source" if {MESSAGES, COMPLETION} & set(row) else ""


def _within(value: dict[str, Any], key: str) -> Any:
    """The value of a key, or of one in objects within, with points; None where it is missing."""
    found: Any = value
    for part in [key] if key in value else key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def field_of(value: dict[str, Any], key: str) -> str | NotPlain | None:
    """The value of a key of a row as a group of documents, as `ReadOptions.field_key` names it."""
    found = _within(value, key)
    if isinstance(found, list | dict):
        return NotPlain.LIST if isinstance(found, list) else NotPlain.OBJECT
    return _plain(found)


def _plain(value: Any) -> str | None:
    return None if value is None or isinstance(value, list | dict) else id_of(value)


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
    shown = [name if len(name) <= 20 else f"{name[:17]}..." for name in found[:6]]
    return ", ".join(shown) + (", ..." if len(found) > 6 else "")


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
