"""Files of text that each become one file with entropies, divided among processes."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bytelatent.errors import UserError
from bytelatent.files import own_file
from bytelatent.text import Stored, find_files
from bytelatent.text.folders import name_inside
from bytelatent.text.formats import without_suffix
from bytelatent.text.stored import read_stored
from bytelatent.text.streams import is_remote, readable, size_of

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
            name = without_suffix(name_inside(file, source))
            other = found.get(name)
            if other is not None and other.source != file:
                raise UserError(
                    f"entropies: '{other.source}' and '{file}' would both become '{name}.parquet'; "
                    "rename one, give the folder above theirs as the source, or each a folder of its own with --out"
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
    """Whether a byte could be locked: one file holds the locks of any number of shards."""
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


def is_done(shard: Shard, out: Path, wanted: Stored) -> bool:
    """Whether a shard is done already.

    Raises:
        UserError: there is something else.
    """
    output = out / shard.output
    if not output.exists():
        return False
    found = read_stored(output)
    if found is None:
        raise UserError(f"entropies: '{output}' was not written by blt entropies; choose another --out")
    if found != wanted:
        differences = "; ".join(found.differences(wanted))
        raise UserError(
            f"entropies: '{output}' was made with other settings: {differences}; remove it to make it again, or "
            "choose another --out"
        )
    if not is_remote(shard.source) and os.stat(shard.source).st_mtime_ns > os.stat(output).st_mtime_ns:
        raise UserError(
            f"entropies: '{shard.source}' has changed since '{output}' was written; remove that, "
            "or choose another --out"
        )
    return True


def remove_leftovers(out: Path, shards: Sequence[Shard]) -> None:
    """Remove what killed processes left of these shards, which are locked: no process writes them now."""
    own = {out / shard.output for shard in shards}
    for part in out.rglob(".*.part"):
        output = part.with_name(part.name[1:].removesuffix(".part").rpartition(".")[0] or part.name)
        if output in own:
            part.unlink(missing_ok=True)
