"""Files wherever they are: on this machine, or where fsspec reaches (s3://, gs://, hf://, http://, memory://)."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bytelatent.errors import Interrupted, UserError

BUFFER_BYTES = 1 << 20


class BadRow(UserError):
    """A file or a row that cannot be read, though others may be: training passes over some of these."""

    row = 0  # in the file, where it is one row


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
    """Bytes the file takes where it lies.

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
        raise UserError(f"data: '{path}' needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise UserError(f"data: '{path}' cannot be reached: {error}") from None


@contextmanager
def readable(file: str) -> Iterator[None]:
    """Say in one line why `file` could not be read.

    Raises:
        BadRow: in place of the errors of the system, the network and the formats.
    """
    try:
        yield
    except (UserError, Interrupted, MemoryError):
        raise
    except FileNotFoundError:
        raise BadRow(f"data: '{file}' does not exist any more") from None
    except OSError as error:
        raise BadRow(f"data: '{file}' cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of pyarrow, fsspec and what these use: of any class
        if "range requests" in str(error):  # fsspec's ValueError, for a large file that is not read from end to end
            raise BadRow(f"data: '{file}' is on a server that sends whole files only; download it first") from None
        reason = str(error) or type(error).__name__
        if type(error).__name__ == "ArrowInvalid":
            raise BadRow(f"data: '{file}' is not a whole Parquet file; fetch or write it again ({reason})") from None
        raise BadRow(f"data: '{file}' cannot be read: {reason}") from None


def import_pyarrow(file: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"data: '{file}' needs the package pyarrow; run: pip install 'bytelatent[data]'") from None
    return pyarrow
