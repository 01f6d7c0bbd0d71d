"""Read and write many bytes at known offsets, with errors in one line."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bytelatent.errors import UserError
from bytelatent.files import whole_file

Buffer = bytes | bytearray | memoryview


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Explain in one line why writing below `folder` fails.

    Raises:
        UserError: in place of the system's errors.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--out: the disk of '{folder}' is full; make room and give the same command again, it goes on"
            ) from None
        raise UserError(f"--out: '{folder}' cannot be written: {error.strerror or error}") from None
    except MemoryError:
        raise UserError("--memory: the machine has less memory than this; give fewer --workers or less") from None


DONT_CACHE = 0x80  # RWF_DONTCACHE, Linux 6.14
_past_the_cache = sys.platform == "linux"
_scratch = np.empty(0, dtype=np.uint8)


def scratch(size: int) -> np.ndarray:
    """This process's one large buffer, uint8 [size]: to allocate new memory takes longer than to use it."""
    global _scratch
    if len(_scratch) < size:
        _scratch = np.empty(0, dtype=np.uint8)  # let go of the old one first
        _scratch = np.empty(size, dtype=np.uint8)
    return _scratch[:size]


def write_all(file: int, data: Buffer) -> None:
    """Write all of `data` at the end of a file, however few bytes the system takes at once."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(file, rest) :]


def write_at(file: int, data: Buffer, offset: int) -> None:
    rest = memoryview(data)
    while len(rest):
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


def write_past_cache(file: int, data: Buffer, offset: int) -> None:
    """Write all of `data`, which is not read again, to the disk at once, and drop it from the system's cache.

    Finding cache memory for it would take longer than writing it. On systems and file systems that do not support this
    it is an ordinary write.
    """
    global _past_the_cache
    rest = memoryview(data)
    while len(rest) and _past_the_cache:
        try:
            written = os.pwritev(file, [rest], offset, DONT_CACHE)
            rest, offset = rest[written:], offset + written
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            _past_the_cache = False
    write_at(file, rest, offset)


def read_at(file: int, into: memoryview, offset: int) -> None:
    """Fill `into` from the file.

    Raises:
        UserError: the file is shorter.
    """
    while len(into):
        count = os.preadv(file, [into], offset)
        if count == 0:
            raise UserError("--out: a file in its folder '.prepare' is shorter than it was; remove that folder")
        into, offset = into[count:], offset + count


def write_text(path: Path, text: str) -> None:
    """A small file that appears whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
