"""Files and folders that appear whole or not at all: written aside, then renamed."""

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from filelock import FileLock, Timeout, lock_descriptor

from bytelatent.errors import UserError

MANIFEST = "complete.json"
SCANT_BYTES = 2**16  # less free space than this is a full disk
IS_LINK = "'{}' is a link, and would be written through; remove it"
WITHOUT_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # of file systems that cannot lock a file
Digest = list[int | str]  # size and SHA-256 of a file


class DiskFull(UserError):
    """The disk has no room for what was to be written."""


class Locked(UserError):
    """Another process is writing a file or a folder.

    Attributes:
        path: the file or folder.
    """

    def __init__(self, path: str | Path, way_out: str) -> None:
        super().__init__(f"'{path}' is being written by another process; {way_out}")
        self.path = Path(path)


def own_file(path: str | Path, flags: int) -> int:
    """Open a file for writing whose name others can predict: a link in its place is not followed.

    An `opener` of the built-in `open`; `flags` are those of `os.open`.

    Raises:
        UserError: it is a link.
    """
    try:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError:
        if os.path.islink(path):
            raise UserError(IS_LINK.format(path)) from None
        raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` when the block ends without an error."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)  # a link there would be written through
        yield aside
        os.replace(aside, path)
    except Exception as error:
        explain(path, error)
        raise
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path, known: dict[str, Digest] | None = None) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `path`, with a manifest of its files, when the block ends.

    Until then, what was at `path` before stays.

    Args:
        known: digests of files that need not be read again for the manifest, filled before the block ends.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        (aside / MANIFEST).write_text(json.dumps({"files": digests(aside, known)}, indent=1))
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, old)
            try:
                os.replace(aside, path)
            except BaseException:
                os.replace(old, path)
                raise
            old.unlink() if old.is_symlink() else shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(aside, path)
    except Exception as error:
        explain(path, error)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(path: Path) -> None:
    """Remove what killed processes of this computer left beside a folder that `whole_folder` writes."""
    for place in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.part"):
        number = place.name.split(".")[-2]
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            shutil.rmtree(place, ignore_errors=True)
        except (OSError, ValueError, OverflowError):
            continue


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Keep other processes from writing into `folder` while the block runs. A killed process releases its lock.

    Raises:
        Locked: another process writes there.
        UserError: the folder cannot be written.
    """
    path = Path(folder) / ".lock"
    lock = FileLock(path, timeout=0, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise Locked(folder, "wait for it, or use run=FOLDER") from None
    except OSError as error:
        if path.is_symlink():
            raise UserError(IS_LINK.format(path)) from None
        if error.errno not in WITHOUT_LOCKS:
            raise UserError(f"'{folder}' cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()


def json_if_any(path: Path) -> Any:
    """What a JSON file holds; None if it is missing or corrupt."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_whole_json(path: Path, values: Any, indent: int | None = None) -> None:
    """A JSON file that appears whole or not at all."""
    with whole_file(path) as aside:
        aside.write_text(json.dumps(values, indent=indent), encoding="utf-8")


def partial_path(path: Path) -> Path:
    """Where `growing_file` writes until the file is finished."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def growing_file(path: Path) -> Iterator[BinaryIO]:
    """A file to append lines to, `path.part`; it becomes `path` when the block ends without an error.

    If the block ends with an error, whole lines stay there, and the next block appends to them; a file without any is
    removed. Writes are unbuffered, so that a killed process loses no line.

    Raises:
        Locked: another process writes it.
        UserError: it cannot be written.
    """
    part = partial_path(path)
    with _opened_alone(part) as file:
        try:
            try:
                _leave_whole_lines(part)
                yield file
            except BaseException:
                _leave_whole_lines(part)
                if part.stat().st_size == 0:
                    part.unlink()
                raise
            if os.name == "nt":  # an open file is not renamed there
                file.close()
            os.replace(part, path)  # while it is locked, or another process would append to the finished file
        except OSError as error:
            explain(path, error)
            raise


def _opened_alone(part: Path) -> BinaryIO:
    """A file to append to, locked until it is closed."""
    while True:
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            file = open(part, "ab", buffering=0, opener=own_file)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"'{part}' cannot be written: {error.strerror or error}") from None
        if not _lock(file):
            file.close()
            raise Locked(part, "wait for it, or name another file")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), part.lstat()):
                return file
        file.close()  # before it was locked here, another process finished or removed it


def _lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; False if another process has locked it."""
    if os.name == "nt":  # there a lock would keep this process from opening the file again
        return True
    try:
        return lock_descriptor(file.fileno(), blocking=False)
    except OSError:  # a file system without locks
        return True


def _leave_whole_lines(path: Path) -> None:
    """Cut off a last line that has no end."""
    size = whole = path.stat().st_size
    with path.open("r+b") as file:
        while whole > 0:
            begin = max(whole - 2**16, 0)
            file.seek(begin)
            end = file.read(whole - begin).rfind(b"\n")
            if end >= 0:
                whole = begin + end + 1
                break
            whole = begin
        if whole < size:
            file.truncate(whole)


def find_corruption(folder: Path, ending: str = "", part: int = 0, parts: int = 1) -> str | None:
    """Why a folder written by `whole_folder` is corrupt; None if all its files are as they were written.

    Args:
        ending: check only files whose names end with this.
        part, parts: check only files number `part`, `part + parts`, ...: each rank checks some.
    """
    try:
        for name, digest in list(manifest_of(folder).items())[part::parts]:
            if not name.endswith(ending):
                continue
            if not (folder / name).is_file():
                return f"{name} is missing"
            if digest_of(folder / name) != digest:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is corrupt"
    except OSError as error:
        return str(error.strerror)
    return None


def manifest_of(folder: Path) -> dict[str, Digest]:
    """The files that `whole_folder` wrote, with their digests; the folder may hold others by now."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8-sig"))["files"]


def digests(folder: Path, known: dict[str, Digest] | None = None) -> dict[str, Digest]:
    """Size and SHA-256 of each file below a folder, but for those that are known already."""
    names = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
    return {name: (known or {}).get(name) or digest_of(folder / name) for name in names}


def digest_of(file: Path) -> Digest:
    with file.open("rb") as data:
        return [file.stat().st_size, hashlib.file_digest(data, "sha256").hexdigest()]


def explain(path: Path, error: Exception) -> None:
    """Raise a UserError in place of `error`, met while `path` was written, where the disk is the reason."""
    if _disk_is_full(path, error):
        raise DiskFull(
            f"the disk is full: '{path}' was not written, what was there before is whole; make room"
        ) from None
    if isinstance(error, shutil.Error):  # of copytree: a list of (from, to, why), one for each file
        raise UserError(f"'{path}' cannot be written: {error.args[0][0][2]}") from None
    if isinstance(error, OSError):
        raise UserError(f"'{path}' cannot be written: {error.strerror or error}") from None


def _disk_is_full(path: Path, error: Exception) -> bool:
    if isinstance(error, OSError) and not isinstance(error, shutil.Error):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, UserError):
        return False
    # safetensors, torch.save and copytree hide the system's error in one of their own, torch without its name. What
    # they wrote is still there at this point, so a disk that was too small for it has nothing left.
    with suppress(OSError):
        return os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(path.parent).free < SCANT_BYTES
    return False
