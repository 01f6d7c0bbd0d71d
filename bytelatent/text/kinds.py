"""What a file is, decided in one place: its kind, how it is compressed, and whether it is text at all.

The content decides. The ending counts where the content leaves it open: JSON lines or one text.
"""

import functools
import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bytelatent.text.compressed import Decompressed, compression_of, zstd_module
from bytelatent.text.documents import json_value
from bytelatent.text.places import (
    BUFFER_BYTES,
    BadRow,
    import_pyarrow,
    is_remote,
    open_file,
    open_raw,
    readable,
    size_of,
)

Kind = Literal["lines", "json", "parquet", "text"]

COMPRESSED = r"(?:\.(?:gz|zst|xz|bz2))?"
ROWS = re.compile(
    rf"\.(?:(?P<lines>jsonl|ndjson){COMPRESSED}|(?P<json>json){COMPRESSED}|(?P<parquet>parquet))$", re.IGNORECASE
)
TABLE = re.compile(rf"\.(?:csv|tsv){COMPRESSED}$", re.IGNORECASE)
HEAD_BYTES = 1 << 16
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
PARQUET_MAGIC = b"PAR1"
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
MANIFEST = ("manifest.json", (b'"format"', b'"request"'))  # of `blt prepare`: its name, and what it begins with
CONTROLS = bytes(sorted(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")))  # those that no text has
PDF_MAGIC = b"%PDF-"  # such a file may hold nothing but characters of text
BINARY = {  # how binary files begin whose name helps
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


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        kind: `lines` is JSONL, `json` an array or an object that takes several lines; None for what is not read.
        compression: a name among `compressed.MAGICS`; None for a file that lies as it is.
        why_not: of a file that is not read: what it is instead.
    """

    kind: Kind | None
    compression: str | None = None
    why_not: str = ""


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


def name_of(file: str) -> str:
    """A file's name without its folders; what follows it in an address (`?sig=...`) is no part of it."""
    return Path(file.partition("?")[0] if is_remote(file) else file).name


def rows_by_name(name: str) -> str | None:
    """`lines`, `json` or `parquet` where the ending says so."""
    found = ROWS.search(name)
    return found.lastgroup if found and found.start() else None


def without_ending(name: str) -> str:
    """The name of a file of rows without its ending; others, which are one text each, keep it."""
    return name[: ROWS.search(name).start()] if rows_by_name(name) else name  # type: ignore[union-attr]


class TextReader(io.BufferedReader):
    """A file's bytes, decompressed, without a byte order mark; seekable where the file is not compressed.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, file: str, compression: str | None):
        self.file = file
        self._decompressed: Decompressed | _ArrowZstd | None = None
        if compression == "zstd" and zstd_module() is None:
            self._decompressed = _ArrowZstd(file, open_file(file))
        elif compression is not None:
            self._decompressed = Decompressed(open_file(file), size_of(file), compression)
        super().__init__(self._decompressed or open_raw(file), BUFFER_BYTES)

    @property
    def damage(self) -> str | None:
        """Once the end is reached: what of the file was not read and why."""
        return self._decompressed.damage if self._decompressed else None

    def skip_byte_order_mark(self) -> int:
        """Go past a mark at the start; returns its bytes."""
        return len(self.read(3)) if self.peek(3)[:3] == BYTE_ORDER_MARK else 0


class _ArrowZstd(io.RawIOBase):
    """zstd by pyarrow, for want of the module: of windows up to 128 MiB, and what it read last is lost with damage."""

    def __init__(self, file: str, raw: io.BufferedReader):
        pyarrow = import_pyarrow(file)
        self.damage: str | None = None
        self._inner = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = b"" if self.damage else self._inner.read(min(len(buffer), HEAD_BYTES))
        except Exception as error:
            self.damage = (
                f"is not whole: after {self._given:,} decompressed bytes the rest cannot be read: {error}; "
                "if its window is a long one: pip install backports.zstd"
            )
            found = b""
        buffer[: len(found)] = found
        self._given += len(found)
        return len(found)


@functools.lru_cache(maxsize=1 << 16)
def _kind_of(file: str, size: int, changed: int | None) -> FileKind:
    with open_file(file) as stream:
        head = stream.read(HEAD_BYTES)
    compression = compression_of(head)
    if compression is not None:
        with TextReader(file, compression) as text:
            head = text.read(HEAD_BYTES)
    kind, why_not = _kind_by_content(name_of(file), head)
    within = "Parquet" if kind == "parquet" else compression_of(head)
    if compression is not None and within is not None:
        kind, why_not = None, f"{within} inside {compression} (decompress it)"
    return FileKind(kind, compression, why_not)


def _kind_by_content(name: str, head: bytes) -> tuple[Kind | None, str]:
    if head.startswith(PARQUET_MAGIC) or rows_by_name(name) == "parquet":
        return "parquet", ""
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
    if rows_by_name(name) == "lines":
        return "lines", ""
    if is_binary:
        return None, "binary data"
    if rows_by_name(name) == "json":
        return _kind_of_json(head.removeprefix(BYTE_ORDER_MARK)), ""
    if TABLE.search(name):
        return None, "a CSV or TSV table (write it as JSONL or Parquet)"
    return "text", ""


def _is_binary(head: bytes) -> bool:
    """Zero bytes, or more than one in fifty of the control characters that no text has, whatever its encoding."""
    return b"\0" in head or 50 * (len(head) - len(head.translate(None, CONTROLS))) > len(head)


def _kind_of_json(head: bytes) -> Kind:
    """JSON lines if the first line is an object of its own, or longer than what is looked at; else one value."""
    first, end, _ = head.lstrip().partition(b"\n")
    if not first.startswith(b"{"):
        return "json" if first else "lines"
    try:
        json_value(first)
    except ValueError:
        return "json" if end or len(head) < HEAD_BYTES else "lines"
    return "lines"


def must_be_read(file: str) -> FileKind:
    """As `kind_of`, of a file that is to be read.

    Raises:
        BadRow: it cannot be opened, or it is not read as text; what it is is named.
        UserError: a package for it is not installed.
    """
    found = kind_of(file)
    if found.kind is None:
        raise BadRow(
            f"data: '{file}' is {found.why_not}, which is not read as text; what is read: "
            "JSONL, JSON, Parquet and text in UTF-8 or any encoding without zero bytes"
        )
    return found
