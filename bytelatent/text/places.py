"""Files wherever they are: on this machine, or where fsspec reaches (s3://, gs://, hf://, http://, memory://)."""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError

GZIP, ZSTD = ".gz", ".zst"
BUFFER_BYTES = 1 << 20


class Damaged(UserError):
    """A file or a row that cannot be read, though others may be: training passes over some of these."""

    row = 0  # in the file, where it is one row


def is_remote(path: str) -> bool:
    return "://" in path


def find_files(path: str) -> list[str]:
    """The files of a source, sorted: a file, a folder (all files below it, hidden ones not), or a glob.

    Raises:
        UserError: there are none.
    """
    if is_remote(path):
        return _find_remote(path)
    place = Path(path).expanduser()
    if place.is_file():
        return [str(place)]
    if place.is_dir():
        found = [str(file) for file in sorted(place.rglob("*")) if file.is_file() and _visible(file.relative_to(place))]
        if not found:
            raise UserError(f"data: the folder '{path}' holds no files")
        return found
    found = sorted(name for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"data: '{path}' does not exist; give a file, a folder or a pattern such as 'text/*.jsonl'")
    return found


def open_file(file: str) -> io.BufferedReader:
    """The file's bytes as they are, seekable.

    Raises:
        OSError: it cannot be read.
    """
    if not is_remote(file):
        return io.BufferedReader(io.FileIO(file), BUFFER_BYTES)
    fs, path = file_system(file)
    raw: Any = fs.open(path, "rb")
    return io.BufferedReader(raw, BUFFER_BYTES)


def open_decompressed(file: str) -> io.BufferedReader:
    """The file's bytes, those of .gz and .zst decompressed; not seekable.

    Raises:
        OSError, EOFError, zlib.error: it cannot be read, or is not whole; see `readable`.
    """
    if file.endswith(GZIP):
        return io.BufferedReader(gzip.open(open_file(file), "rb"))  # type: ignore[arg-type]
    if file.endswith(ZSTD):
        pyarrow = import_pyarrow(file)
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(open_file(file), "r"), "zstd")
        return io.BufferedReader(stream)  # type: ignore[arg-type]
    return open_file(file)


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
        Damaged: in place of the errors of the system, the network and the formats.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise Damaged(f"data: '{file}' does not exist any more") from None
    except (EOFError, zlib.error) as error:  # gzip's own, for a file that ends early or is damaged
        raise Damaged(f"data: '{file}' is not a whole gzip file; fetch or write it again ({error})") from None
    except OSError as error:
        raise Damaged(f"data: '{file}' cannot be read: {error.strerror or error}") from None
    except Exception as error:
        if "range requests" in str(error):  # fsspec's ValueError, for a large file that is not read from end to end
            raise Damaged(f"data: '{file}' is on a server that sends whole files only; download it first") from None
        if not type(error).__module__.startswith(("pyarrow", "aiohttp", "httpx", "botocore", "huggingface_hub")):
            raise
        if type(error).__name__ == "ArrowInvalid":
            raise Damaged(
                f"data: '{file}' is not a whole {_kind(file)} file; fetch or write it again ({error})"
            ) from None
        raise Damaged(f"data: '{file}' cannot be read: {error}") from None


def import_pyarrow(file: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"data: '{file}' needs the package pyarrow; run: pip install 'bytelatent[data]'") from None
    return pyarrow


def _find_remote(path: str) -> list[str]:
    fs, inner = file_system(path)
    if path.startswith(("http://", "https://")) and path.endswith("/"):
        raise UserError(f"data: '{path}' is a page, not a file; name the files on it")
    with readable(path):
        if glob.has_magic(inner):
            found = [name for name in fs.glob(inner) if fs.isfile(name)]
        elif fs.isfile(inner):
            found = [inner]
        else:
            found = [n for n in fs.find(inner) if _visible(Path(n.removeprefix(inner)))] if fs.exists(inner) else []
    if not found:
        raise UserError(f"data: there are no files at '{path}'{_why_not(fs, inner)}")
    return sorted(fs.unstrip_protocol(name) for name in found)


def _why_not(fs: Any, inner: str) -> str:
    """`: REASON` where a place only looks empty because it cannot be reached; the file systems hide that."""
    try:
        fs.info(inner)
    except Exception as error:
        reason = error.__cause__ or error
        if not isinstance(reason, FileNotFoundError):
            return f": {reason}"
    return ""


def _kind(file: str) -> str:
    return "Parquet" if file.endswith(".parquet") else "zstd"


def _visible(inside: Path) -> bool:
    return not any(part.startswith(".") for part in inside.parts)
