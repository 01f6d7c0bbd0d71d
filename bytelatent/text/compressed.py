"""Compressed files: what was decompressed before damage is kept, and what was not is said.

The library's own file objects raise where a file is cut short or followed by something else, and what they had
decompressed just before is lost. `Decompressed` ends there instead, as at the end of a file.
"""

import bz2
import importlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any, Protocol

MAGICS = {
    "gzip": (b"\x1f\x8b\x08",),
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([number, 0x2A, 0x4D, 0x18]) for number in range(0x50, 0x60))),
    "xz": (b"\xfd7zXZ\x00",),
    "bzip2": tuple(b"BZh%d" % level for level in range(1, 10)),
}
BZIP2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")  # the first one's, or the end's: texts may begin with BZh1, too
INPUT_BYTES, OUTPUT_BYTES = 1 << 16, 1 << 16  # of one call
INPUT_BYTES_ELSE = 1 << 10  # bz2, lzma and zstd give nothing out of a call in which they find damage
AT_ONCE = 16  # bytes that come together, so that a byte order mark does
LONGEST_ZSTD_WINDOW = 31  # as a power of two: all that `zstd --long=31` writes


def compression_of(head: bytes) -> str | None:
    """How a file that begins so is compressed; None where it is not."""
    found = next((name for name, magics in MAGICS.items() if head.startswith(magics)), None)
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
    """A gzip member as the other decompressors; bytes before its first wrong one are given out."""

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
            return _until_error(before, data)
        self._rest = self._member.unconsumed_tail
        self._may_hold_more = len(found) == max_length
        return found


class Decompressed(io.RawIOBase):
    """A file's bytes, decompressed, up to its end or its first damage.

    Args:
        raw: the file as it is.
        size: its bytes.
        compression: a name among `MAGICS`.

    Attributes:
        damage: once the end is reached: what was not read and why; None where all was.
    """

    def __init__(self, raw: io.BufferedReader, size: int, compression: str):
        self.damage: str | None = None
        self._raw, self._size, self._compression = raw, size, compression
        self._new = _decompressor(compression)
        self._input_bytes = INPUT_BYTES if compression == "gzip" else INPUT_BYTES_ELSE
        self._member: Decompressor | None = None
        self._input = b""  # read, but not given to the decompressor yet
        self._read = 0  # bytes of the file in all
        self._output = b""  # decompressed, but not given out yet
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        ended = False
        while len(self._output) < AT_ONCE and not ended and self.damage is None:
            try:
                more = self._decompress(len(buffer))
            except Exception as error:  # of four libraries, of the disk or the network
                self.damage = self._what_is_lost(error)
            else:
                self._output += more
                ended = not more
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        self._given += count
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _decompress(self, max_length: int) -> bytes:
        """The next bytes; none at the end.

        Raises:
            Exception: the file is cut short, damaged, or cannot be read.
        """
        max_length = min(max_length, OUTPUT_BYTES)
        while True:
            if (self._member is None or self._member.eof) and not self._begin_member():
                return b""
            assert self._member is not None
            if self._member.needs_input and not self._input and not self._fill():
                raise EOFError("it is cut short")
            data, self._input = self._input, b""
            if found := self._member.decompress(data, max_length):
                return found

    def _begin_member(self) -> bool:
        """Begin the first member, or the next one; False where there is none. Zeros between them are padding."""
        is_first = self._member is None
        if self._member is not None:
            self._input, self._member = self._member.unused_data + self._input, None
        while True:
            if not is_first:
                self._input = self._input.lstrip(b"\0")
            if len(self._input) >= self._input_bytes or not self._fill():
                break
        if not self._input:
            return False
        if compression_of(self._input) != self._compression:
            raise EOFError(f"they are no {self._compression}")
        self._member = self._new()
        return True

    def _fill(self) -> bool:
        more = self._raw.read(self._input_bytes)
        self._read += len(more)
        self._input += more
        return bool(more)

    def _what_is_lost(self, error: Exception) -> str:
        done = f"is not whole: after {self._given + len(self._output):,} decompressed bytes"
        reason = " ".join(str(error).split()) or type(error).__name__
        if self._member is None:
            return f"{done} its last {len(self._input) + self._size - self._read:,} bytes are not read: {reason}"
        return f"{done} the rest of {self._size:,} bytes of {self._compression} cannot be read: {reason}"


def zstd_module() -> Any:
    """The module `compression.zstd` of Python 3.14, or its backport; None where neither is installed."""
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _decompressor(compression: str) -> Callable[[], Decompressor]:
    if compression == "zstd":
        zstd = zstd_module()
        options = {zstd.DecompressionParameter.window_log_max: LONGEST_ZSTD_WINDOW}
        return lambda: zstd.ZstdDecompressor(options=options)
    return {"gzip": Gzip, "xz": lzma.LZMADecompressor, "bzip2": bz2.BZ2Decompressor}[compression]


def _until_error(member: Any, data: bytes) -> bytes:
    """What a zlib decompressor makes of data before the first wrong byte."""
    found = []
    try:
        for at in range(len(data)):
            found.append(member.decompress(data[at : at + 1]))
    except zlib.error:
        pass
    return b"".join(found)
