"""The bytes of a file, wherever it is and however it is compressed.

A file is on this machine, or where fsspec reaches (s3://, gs://, hf://, http://, memory://). Python's own file
objects for compressed files raise where one is cut short or followed by something else, and lose what they decompressed
just before. `Decompressed` ends there instead, as at the end of a file, and says what was not read.
"""

import bz2
import importlib
import io
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from bytelatent.errors import Interrupted, UserError, install
from bytelatent.text.documents import BadRow, TextError

BUFFER_BYTES = 1 << 20
PACKAGES = {"hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}  # of protocols, in the extra `data`
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # the first one's, or the end's: texts may begin with BZh1, too
INPUT_BYTES, OUTPUT_BYTES = 1 << 16, 1 << 16  # of one call
INPUT_BYTES_ELSE = 1 << 10  # bz2, lzma and zstd return nothing from a call in which they meet an error
AT_ONCE = 16  # bytes that come together, so that a byte order mark does
LONGEST_ZSTD_WINDOW = 31  # as a power of two: all that `zstd --long=31` writes


@dataclass(frozen=True)
class Compression:
    """
    Attributes:
        suffix: of file names.
        magics: how files begin.
        expansion: a guess at how much larger the text is.
    """

    suffix: str
    magics: tuple[bytes, ...]
    expansion: int


ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes([number, 0x2A, 0x4D, 0x18]) for number in range(0x50, 0x60)))
COMPRESSIONS = {
    "gzip": Compression(".gz", (b"\x1f\x8b\x08",), expansion=5),
    "zstd": Compression(".zst", ZSTD_MAGICS, expansion=6),
    "xz": Compression(".xz", (b"\xfd7zXZ\x00",), expansion=7),
    "bzip2": Compression(".bz2", tuple(b"BZh%d" % level for level in range(1, 10)), expansion=6),
}


def is_remote(path: str) -> bool:
    return "://" in path


def open_file(file: str) -> io.BufferedReader:
    """The file's bytes as they are, seekable.

    Raises:
        OSError: it cannot be read.
    """
    return io.BufferedReader(open_raw(file), BUFFER_BYTES)


def open_raw(file: str) -> Any:
    """As `open_file`, without a buffer."""
    if not is_remote(file):
        return io.FileIO(file)
    fs, path = file_system(file)
    return fs.open(path, "rb")


def size_of(file: str) -> int:
    """The size in bytes of a file as it is stored.

    Raises:
        OSError: it is not there.
    """
    if not is_remote(file):
        return os.stat(file).st_size
    fs, path = file_system(file)
    return int(fs.size(path) or 0)


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path with a protocol, and the path in it.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(path)
    except ImportError as error:
        if (package := PACKAGES.get(path.partition("://")[0])) is not None:
            raise TextError(f"'{path}' needs {install(package, 'data')}") from None
        raise TextError(f"'{path}' needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise TextError(f"'{path}' cannot be reached: {error}") from None


@contextmanager
def readable(file: str, title: str = "") -> Iterator[None]:
    """Turn errors of the system, the network and of libraries into one line about `file`.

    Args:
        title: of a format that a library reads: an invalid file is not a whole one of this format.

    Raises:
        BadRow: in place of these errors.
    """
    try:
        yield
    except (UserError, Interrupted, MemoryError):
        raise
    except FileNotFoundError:
        raise BadRow(file, "does not exist") from None
    except OSError as error:
        raise BadRow(file, f"cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of pyarrow, fsspec and what these use: of any class
        reason = str(error) or type(error).__name__
        if title and type(error).__name__ == "ArrowInvalid":
            raise BadRow(file, f"is not a whole {title} file; fetch or write it again ({reason})") from None
        if type(error) is ValueError and _comes_whole(file):
            raise BadRow(file, "is on a server that sends whole files only; download it first") from None
        raise BadRow(file, f"cannot be read: {reason}") from None


def _comes_whole(file: str) -> bool:
    """Whether a file is on a web server that sends no parts: fsspec then reads a large one from its start only."""
    if not file.startswith(("http://", "https://")):
        return False
    fs, path = file_system(file)
    return not fs.info(path).get("partial")


def _import(file: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise TextError(f"'{file}' needs {install(package, 'data')}") from None


def import_pyarrow(file: str) -> Any:
    """
    Raises:
        UserError: it is not installed.
    """
    return _import(file, "pyarrow")


class TextReader(io.BufferedReader):
    """A file's bytes, decompressed, without a byte order mark; seekable where the file is not compressed.

    Raises:
        OSError: it cannot be opened.
        UserError: the package for its compression is not installed.
    """

    def __init__(self, file: str, compression: str | None):
        self.file = file
        self._decompressed = None if compression is None else Decompressed(file, compression)
        super().__init__(self._decompressed or open_raw(file), BUFFER_BYTES)

    @property
    def unread(self) -> str | None:
        """Once the end is reached: what of the file was not read and why."""
        return self._decompressed.unread if self._decompressed else None

    def skip_byte_order_mark(self) -> int:
        """Go past a mark at the start; returns its bytes."""
        return len(self.read(3)) if self.peek(3)[:3] == BYTE_ORDER_MARK else 0


def compression_of(head: bytes) -> str | None:
    """How a file that begins so is compressed; None where it is not."""
    found = next((name for name, known in COMPRESSIONS.items() if head.startswith(known.magics)), None)
    return None if found == "bzip2" and not head[4:].startswith(BZIP2_BLOCKS) else found


class Decompressor(Protocol):
    """What `bz2`, `lzma` and `zstd` have in common: decompresses one member of a file."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class Gzip:
    """A gzip member as the other decompressors; it returns the bytes before the first wrong one."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self._rest = b""
        self._may_hold_more = False
        self._error: zlib.error | None = None

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def needs_input(self) -> bool:
        return not self._rest and not self._may_hold_more and self._error is None

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if self._error is not None:
            raise self._error
        data = self._rest + data
        before = self._member.copy()
        try:
            found = self._member.decompress(data, max_length)
        except zlib.error as error:
            self._error = error
            found = b""
            with suppress(zlib.error):
                for at in range(len(data)):
                    found += before.decompress(data[at : at + 1])
            return found
        self._rest = self._member.unconsumed_tail
        self._may_hold_more = len(found) == max_length
        return found


class Decompressed(io.RawIOBase):
    """A file's bytes, decompressed, up to its end or the first byte that cannot be decompressed.

    Args:
        file: its name.
        compression: a name among `COMPRESSIONS`.

    Attributes:
        unread: once the end is reached: what was not read and why; None where all was.
    """

    def __init__(self, file: str, compression: str):
        self.unread: str | None = None
        new = _decompressor(file, compression)
        self._raw = open_file(file)
        self._parts = self._decompressed(new, size_of(file), compression)
        self._output = b""  # decompressed, but not returned yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while len(self._output) < AT_ONCE and (part := next(self._parts, None)) is not None:
            self._output += part
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def close(self) -> None:
        self._parts.close()  # which holds this object, and much memory
        self._raw.close()
        super().close()

    def _decompressed(self, new: Callable[[], Decompressor], size: int, compression: str) -> Generator[bytes]:
        """The bytes in parts, up to the first error. Zeros after a member are padding."""
        at_once = INPUT_BYTES if compression == "gzip" else INPUT_BYTES_ELSE
        member: Decompressor | None = None
        padding, data = b"", b""
        num_read = num_given = 0
        try:
            while True:
                data = data.lstrip(padding) if padding else data
                while len(data) < at_once and (more := self._raw.read(at_once)):
                    num_read += len(more)
                    data = (data + more).lstrip(padding) if padding else data + more
                if not data:
                    return
                if compression_of(data) != compression:
                    raise EOFError(f"they are no {compression}")
                member = new()
                while not member.eof:
                    if member.needs_input and not data:
                        data = self._raw.read(at_once)
                        num_read += len(data)
                        if not data:
                            raise EOFError("it is cut short")
                    part, data = member.decompress(data, OUTPUT_BYTES), b""
                    num_given += len(part)
                    yield part
                data, member, padding = member.unused_data, None, b"\0"
        except Exception as error:  # of four libraries, of the disk or the network
            what = f"the rest of {size:,} bytes of {compression} cannot be read"
            if member is None:
                what = f"its last {len(data) + size - num_read:,} bytes are not read"
            reason = " ".join(str(error).split()) or type(error).__name__
            self.unread = f"is not whole: after {num_given:,} decompressed bytes {what}: {reason}"


def _decompressor(file: str, compression: str) -> Callable[[], Decompressor]:
    if compression != "zstd":
        return {"gzip": Gzip, "xz": lzma.LZMADecompressor, "bzip2": bz2.BZ2Decompressor}[compression]
    zstd = _import(file, "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    return lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: LONGEST_ZSTD_WINDOW})
