"""The formats of text files, in one table; what a file is; and its documents.

All that reads text follows the table `FORMATS`: which files a folder has, what a file is, how it is opened, messages
and help. A file's content decides what it is; its suffix counts where the content leaves that open.
"""

import functools
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bytelatent.text.conversations import ChatOptions
from bytelatent.text.documents import MAX_ROW_BYTES, BadRow, BadRows, Document, ReadOptions, json_value
from bytelatent.text.readers import BlockReader, JsonlReader, JsonReader, PlainTextReader
from bytelatent.text.stored import Stored
from bytelatent.text.streams import (
    BYTE_ORDER_MARK,
    COMPRESSIONS,
    TextReader,
    compression_of,
    is_remote,
    open_file,
    readable,
    size_of,
)
from bytelatent.text.tables import ParquetReader

HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class Format:
    """A format of text files.

    Attributes:
        name: as plans of `blt prepare` hold it.
        title: for people.
        reader: reads a file.
        suffixes: of file names; a compressible format's may be followed by one of a compression.
        magic: how every file of a binary format begins, and no text does; a file that begins so, or has the suffix and
            no magic of another format, is of this format.
        suffix_decides: a file with the suffix is of this format, and is looked into only when it is read.
        expansion: about how many bytes of text there are in a byte of a file.
    """

    name: str
    title: str
    reader: type[BlockReader]
    suffixes: tuple[str, ...] = ()
    magic: bytes = b""
    suffix_decides: bool = True
    expansion: int = 1

    @property
    def compressible(self) -> bool:
        """Whether a file may be compressed as a whole; binary formats compress within."""
        return not self.magic


JSONL = Format("lines", "JSONL", JsonlReader, (".jsonl", ".ndjson"))
JSON = Format("json", "JSON", JsonReader, (".json",), suffix_decides=False)
PARQUET = Format("parquet", "Parquet", ParquetReader, (".parquet",), magic=b"PAR1", expansion=4)
TEXT = Format("text", "text in UTF-8 or any encoding without zero bytes", PlainTextReader)  # any other file
FORMATS = {found.name: found for found in (JSONL, JSON, PARQUET, TEXT)}

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
MANIFEST = ("manifest.json", (b'"format"', b'"request"'))  # of `blt prepare`: its name, and what it begins with
CONTROLS = bytes(sorted(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")))  # those that no text has
PDF_MAGIC = b"%PDF-"  # such a file may hold nothing but characters of text
BINARY = {  # how files begin that are not read, where naming what they are helps
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    PDF_MAGIC: "a PDF file",
    b"PK\x03\x04": "a zip file",
    b"ARROW1": "an Arrow file",
    b"FEA1": "a Feather file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"\x7fELF": "a program",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive (unpack it)",
    b"Rar!\x1a\x07": "a RAR archive (unpack it)",
    b"SQLite format 3\0": "an SQLite database",
}


def _with_suffix(suffixes: tuple[str, ...], compressible: bool = True) -> re.Pattern[str]:
    packed = [re.escape(found.suffix) for found in COMPRESSIONS.values()] if compressible else []
    return re.compile(
        rf"(?<=.)(?:{'|'.join(map(re.escape, suffixes))})(?:{'|'.join(packed)})?$", re.IGNORECASE | re.DOTALL
    )


SUFFIXES = {
    found.name: _with_suffix(found.suffixes, found.compressible) for found in FORMATS.values() if found.suffixes
}
CSV = _with_suffix((".csv", ".tsv"))
PLAIN_TEXT = _with_suffix((".txt",))


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        format: None for a file that is not read.
        compression: a name among `streams.COMPRESSIONS`; None for a file that is not compressed as a whole.
        why_not: of a file that is not read: what it is instead.
    """

    format: Format | None
    compression: str | None = None
    why_not: str = ""


def format_of_name(name: str) -> Format | None:
    """The format that a file's suffix names, if any."""
    return next((FORMATS[key] for key, pattern in SUFFIXES.items() if pattern.search(name)), None)


def without_suffix(name: str) -> str:
    """The name of a file of rows without its suffix; others, which are one text each, keep it."""
    found = format_of_name(name)
    return name if found is None else SUFFIXES[found.name].sub("", name)


def is_named_as_text(name: str) -> bool:
    """Whether a name alone says that a file of a data set is text, and not a card, a picture or its metadata."""
    found = format_of_name(name)
    return found.suffix_decides if found is not None else bool(PLAIN_TEXT.search(name))


def file_name(file: str) -> str:
    """A file's name without its folders, and without what follows it in an address (`?sig=...`)."""
    return Path(file.partition("?")[0] if is_remote(file) else file).name


def kind_of(file: str) -> FileKind:
    """Look into a file.

    Raises:
        BadRow: it cannot be opened.
        UserError: a package for it is not installed.
    """
    with readable(file):
        if is_remote(file):
            return _kind_of(file, size_of(file), None)
        found = os.stat(file)
        if stat.S_ISDIR(found.st_mode):
            return FileKind(None, why_not="a folder")
        if not stat.S_ISREG(found.st_mode):  # it may never end
            return FileKind(None, why_not="a pipe or a device")
        return _kind_of(file, found.st_size, found.st_mtime_ns)


def readable_kind(file: str) -> tuple[Format, str | None]:
    """The format and the compression of a file that is to be read.

    Raises:
        BadRow: it cannot be opened, or is not read as text; the message says what it is.
        UserError: a package for it is not installed.
    """
    found = kind_of(file)
    if found.format is None:
        titles = [known.title for known in FORMATS.values()]
        read = f"{', '.join(titles[:-1])} and {titles[-1]}"
        raise BadRow(file, f"is {found.why_not}, which is not read as text; what is read: {read}")
    return found.format, found.compression


def open_blocks(file: str, options: ReadOptions | None = None) -> BlockReader:
    """A reader of a file's blocks.

    Raises:
        BadRow: the file cannot be opened, or is not read as text.
    """
    found, compression = readable_kind(file)
    return found.reader(file, compression, options or ReadOptions())


def read_documents(
    file: str,
    text_key: str = "text",
    check: Callable[[Stored, str], None] = lambda stored, file: None,
    bad_rows: BadRows | None = None,
    stored: bool = True,
    max_row_bytes: int = MAX_ROW_BYTES,
    on_block: Callable[[float | None], None] = lambda fraction: None,
    field_key: str | None = None,
    chat: ChatOptions | None = None,
) -> Iterator[tuple[int, Document]]:
    """The documents of a file with their rows, without empty ones.

    Args:
        text_key, stored, max_row_bytes, field_key, chat: see `ReadOptions`.
        check: is called with what the file says of stored entropies or starts, and raises where they are not wanted.
        bad_rows: receives each bad row, and a file that cannot be read; None to raise the first.
        on_block: is called before the documents of each block with the fraction of the file that is then read, None
            where it is not known.

    Raises:
        UserError: the file cannot be read or a row holds no text; the file and row are named.
    """
    is_read, first = False, None
    options = ReadOptions(text_key, stored and chat is None, max_row_bytes, field_key, chat)
    for row, found in _rows_of(file, options, check, on_block, bad_rows):
        if not isinstance(found, BadRow):
            is_read = True
            yield row, found
        elif bad_rows is None:
            raise found
        else:
            first = first or found
            bad_rows(found)
    if bad_rows is not None and first is not None and not is_read:
        bad_rows.unread[file] = first.line


def _rows_of(
    file: str,
    options: ReadOptions,
    check: Callable[[Stored, str], None],
    on_block: Callable[[float | None], None],
    bad_rows: BadRows | None,
) -> Iterator[tuple[int, Document | BadRow]]:
    try:
        reader = open_blocks(file, options)
        count = reader.count()
        for index in itertools.count():
            block = reader.read(index)
            if block is None:
                return
            if block.stored is not None:
                check(block.stored, file)
            on_block((index + 1) / count if count else None)
            yield from block.rows()
            if bad_rows is not None:
                bad_rows.num_empty += len(block.empty_rows)
    except BadRow as error:
        yield error.row, error


@functools.lru_cache(maxsize=1 << 16)
def _kind_of(file: str, size: int, changed: int | None) -> FileKind:
    with open_file(file) as stream:
        head = stream.read(HEAD_BYTES)
    compression = compression_of(head)
    if compression is not None:
        with TextReader(file, compression) as text:
            head = text.read(HEAD_BYTES)
    found, why_not = _format_by_content(file_name(file), head)
    if compression is not None:
        within = found.title if found is not None and not found.compressible else compression_of(head)
        if within is not None:
            return FileKind(None, compression, f"{within} inside {compression} (decompress it)")
    return FileKind(found, compression, why_not)


def _format_by_content(name: str, head: bytes) -> tuple[Format | None, str]:
    by_name = format_of_name(name)
    binary = next((found for found in FORMATS.values() if found.magic and head.startswith(found.magic)), by_name)
    if binary is not None and binary.magic:
        return binary, ""
    if head.startswith(UTF16_MARKS) and b"\0" in head:
        return None, "UTF-16 text (write it as UTF-8)"
    is_binary = _is_binary(head)
    if head[TAR_MAGIC_AT:].startswith(TAR_MAGIC):
        return None, "a tar archive (unpack it)"
    what = next((what for magic, what in BINARY.items() if head.startswith(magic)), None)
    if what and (is_binary or head.startswith(PDF_MAGIC)):  # a text may begin with `ORC`, too
        return None, what
    if name == MANIFEST[0] and all(key in head for key in MANIFEST[1]):
        return None, "the manifest of a prepared folder"
    if by_name is not None and by_name.suffix_decides:
        return by_name, ""
    if is_binary:
        return None, "binary data"
    if by_name is JSON:
        return _json_or_jsonl(head.removeprefix(BYTE_ORDER_MARK)), ""
    if CSV.search(name):
        return None, "a CSV or TSV table (write it as JSONL or Parquet)"
    return TEXT, ""


def _is_binary(head: bytes) -> bool:
    """Zero bytes, or more than one in fifty of the control characters that no text has, whatever its encoding."""
    return b"\0" in head or 50 * (len(head) - len(head.translate(None, CONTROLS))) > len(head)


def _json_or_jsonl(head: bytes) -> Format:
    """JSONL if the first line is an object of its own, or longer than what is looked at; otherwise JSON."""
    first, end, _ = head.lstrip().partition(b"\n")
    if not first.startswith(b"{"):
        return JSON if first else JSONL
    try:
        json_value(first)
    except ValueError:
        return JSON if end or len(head) < HEAD_BYTES else JSONL
    return JSONL
