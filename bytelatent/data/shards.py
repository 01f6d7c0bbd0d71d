"""Files of text that each become one file, divided among processes."""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bytelatent.errors import UserError
from bytelatent.files import own_file
from bytelatent.text import find_files
from bytelatent.text.formats import without_suffix
from bytelatent.text.streams import is_remote, readable, size_of

LOGGER = logging.getLogger(__name__)

LOCK = ".lock"


@dataclass(frozen=True)
class Shard:
    """A file of text and the name of what becomes of it."""

    source: str
    name: str  # with the folders below the source, without the suffix
    size: int  # bytes of the source's file

    @property
    def output(self) -> str:
        return f"{self.name}.parquet"


def shards_of(sources: Sequence[str], out: Path) -> list[Shard]:
    """The files of the sources, sorted by name.

    A file of a folder keeps its path below it, any other its name alone. Files of rows change their suffix; other
    files, which are one text each, keep theirs, so that `a.py` and `a.md` do not meet.

    Raises:
        UserError: there are none, two would become the same file, or `out` is inside a source.
    """
    found: dict[str, Shard] = {}
    for source in sources:
        if not is_remote(source) and out.resolve().is_relative_to(Path(source).expanduser().resolve()):
            raise UserError(f"entropies: --out '{out}' is inside the source '{source}'; choose a folder outside of it")
        for file in find_files(source):
            name = _name(file, source)
            other = found.get(name)
            if other is not None and other.source != file:
                raise UserError(
                    f"entropies: '{other.source}' and '{file}' would both become '{name}.parquet'; "
                    "give the folder above them as the source, or each a folder of its own with --out"
                )
            with readable(file):
                found[name] = Shard(file, name, size_of(file))
    return [found[name] for name in sorted(found)]


def divide_shards(shards: Sequence[Shard], world_size: int) -> list[list[Shard]]:
    """The shards of each rank, the largest first; each goes to the rank that has the fewest bytes so far."""
    ranks: list[list[Shard]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for shard in sorted(shards, key=lambda shard: (-shard.size, shard.name)):
        rank = min(range(world_size), key=lambda rank: (loads[rank], len(ranks[rank]), rank))
        ranks[rank].append(shard)
        loads[rank] += shard.size
    return ranks


@contextmanager
def lock_shards(out: Path, shards: Sequence[Shard]) -> Iterator[None]:
    """Keep other processes from writing these shards in the block. The lock of a killed process is released.

    Raises:
        UserError: another process writes one of them, or `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / LOCK, "ab", opener=own_file)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"entropies: '{out}' cannot be written: {error.strerror or error}") from None
    with lock:
        for shard in shards:
            if not _locked(lock.fileno(), lock_offset(shard)):
                raise UserError(
                    f"entropies: '{out / shard.output}' is being written by another process; wait for it, "
                    "or divide the files among processes with --rank and --world"
                )
        yield


def lock_offset(shard: Shard) -> int:
    """The byte of the lock file that is locked for a shard."""
    return int.from_bytes(hashlib.sha256(os.fsencode(shard.name)).digest()[:6], "big")


def _locked(lock: int, offset: int) -> bool:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return True
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, offset)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _name(file: str, source: str) -> str:
    folder = Path(source).expanduser()
    if is_remote(source):
        above = source.rstrip("/") + "/"
        name = file.removeprefix(above) if file.startswith(above) else file.partition("?")[0].rsplit("/", 1)[-1]
    elif folder.is_dir():
        name = Path(file).relative_to(folder).as_posix()
    else:
        name = Path(file).name
    return without_suffix(name)
