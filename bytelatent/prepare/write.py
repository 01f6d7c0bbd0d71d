"""The second pass, which writes the output files, and the manifest, which comes last.

Each range of bins is read from all runs, put in order, and written where its documents belong in the output.
"""

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.files import json_if_any, own_file, write_whole_json
from bytelatent.prepare.plan import FORMAT, WorkFolder, writing
from bytelatent.prepare.shuffle import INDEX_BYTES, SLICE_BYTES, BinRange, RunIndex, gathered, scratch
from bytelatent.text import MAX_ROW_BYTES

MANIFEST = "manifest.json"
READ_BYTES = 1 << 22
DONT_CACHE = 0x80  # RWF_DONTCACHE, Linux 6.14
Buffer = bytes | memoryview

_flags = DONT_CACHE if sys.platform == "linux" else 0


def gather_rows(work: WorkFolder, rank: int, ranks: int, report: Callable[[int], None]) -> None:
    """Do this rank's share of the second pass, except what earlier calls have finished.

    Args:
        report: receives the bytes written.

    Raises:
        UserError: the disk is full, or the first pass is not finished.
    """
    cut = json.loads(work.cut_file.read_text(encoding="utf-8"))
    ranges = cut["ranges"]
    mine = range(len(ranges) * rank // ranks, len(ranges) * (rank + 1) // ranks)
    todo = [number for number in mine if range_parts(work, number) is None]
    if not todo:
        return
    index = RunIndex(work)
    with writing(work.out):
        for number in todo:
            _gather_range(work, index, cut["outputs"], number, ranges[number], report)


def range_parts(work: WorkFolder, number: int) -> list[list[Any]] | None:
    """What a finished range wrote, as [output, bytes, sha256]; None if it is not finished."""
    marker = json_if_any(work.range_marker(number))
    return marker and marker["parts"]


def _gather_range(
    work: WorkFolder,
    index: RunIndex,
    outputs: list[dict[str, Any]],
    number: int,
    planned: dict[str, Any],
    report: Callable[[int], None],
) -> None:
    bins = index.load(*planned["bins"])
    needed = planned["read_bytes"] + INDEX_BYTES * len(bins.lengths)
    documents = _documents if needed <= max(work.plan.range_bytes, 1) else _documents_one_by_one
    begin, end = planned["stream"]
    parts = _write_stream(work.aside, outputs, begin, end, documents(bins, work), report)
    write_whole_json(work.range_marker(number), {"parts": parts})


def _documents(bins: BinRange, work: WorkFolder) -> Iterator[Buffer]:
    """The documents in order, all read into memory first."""
    import pyarrow

    buffer = scratch(sum(part.size for part in bins.parts))
    filled = 0
    for part in bins.parts:
        _read(work, part.task, part.offset, buffer.data[filled : filled + part.size])
        filled += part.size
    # the type with offsets of 64 bits, since a range may be larger than 2 GiB
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(bins.lengths, dtype=np.int64)])
    buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(buffer)]
    array = pyarrow.Array.from_buffers(pyarrow.large_binary(), len(bins.lengths), buffers)
    yield from gathered(array, bins.order, bins.lengths[bins.order])


def _documents_one_by_one(bins: BinRange, work: WorkFolder) -> Iterator[Buffer]:
    """The documents in order, each read on its own: slow, for a range that is too large for the memory."""
    part_of_document = np.repeat(np.arange(len(bins.parts)), [part.documents for part in bins.parts])
    starts = np.cumsum(bins.lengths, dtype=np.int64) - bins.lengths
    part_starts = np.cumsum([0, *(part.size for part in bins.parts)])
    buffer = memoryview(bytearray(SLICE_BYTES))
    for document in bins.order.tolist():
        number = int(part_of_document[document])
        part, begin = bins.parts[number], int(starts[document] - part_starts[number])
        for at in range(begin, begin + int(bins.lengths[document]), SLICE_BYTES):
            slice_ = buffer[: begin + int(bins.lengths[document]) - at]
            _read(work, part.task, part.offset + at, slice_)
            yield slice_


def _read(work: WorkFolder, task: int, offset: int, into: memoryview) -> None:
    """Fill `into` from a data file of the first pass."""
    with open(work.task_files(task).path("data"), "rb") as file:
        file.seek(offset)
        if file.readinto(into) < len(into):
            raise UserError(f"--out: a file in '{work.folder}' is shorter than it was; remove that folder")


def write_past_cache(file: int, data: Buffer, offset: int) -> None:
    """Write all of `data`, which is not read again, to the disk at once, and drop it from the system's cache.

    Finding cache memory for it would take longer than writing it. On systems and file systems that do not support this
    it is an ordinary write.
    """
    global _flags
    rest = memoryview(data)
    while len(rest):
        try:
            written = os.pwritev(file, [rest], offset, _flags)
        except OSError as error:
            if not _flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            _flags = written = 0
        rest, offset = rest[written:], offset + written


def _write_stream(
    folder: Path,
    outputs: list[dict[str, Any]],
    begin: int,
    end: int,
    buffers: Iterator[Buffer],
    report: Callable[[int], None],
) -> list[list[Any]]:
    """Write the bytes of the stream from `begin` to `end`; returns [output, bytes, sha256] of each file written to."""
    parts: list[list[Any]] = []
    rest = memoryview(b"")
    for number, output in enumerate(outputs):
        position, last = max(begin, output["begin"]), min(end, output["end"])
        if position >= last:
            continue
        digest, size = hashlib.sha256(), last - position
        with open(folder / output["name"], "r+b", buffering=0, opener=own_file) as file:
            while position < last:
                if not len(rest):
                    rest = memoryview(next(buffers))
                    report(len(rest))
                now = rest[: last - position]
                write_past_cache(file.fileno(), now, position - output["begin"])
                digest.update(now)
                position, rest = position + len(now), rest[len(now) :]
        parts.append([number, size, digest.hexdigest()])
    assert not len(rest), "the second pass read other bytes than were planned"
    return parts


def finish(work: WorkFolder) -> None:
    """Give the output files their names, and write the manifest.

    Raises:
        UserError: a part of the second pass is missing.
    """
    cut = json.loads(work.cut_file.read_text(encoding="utf-8"))
    parts: list[list[Any]] = [[] for _ in cut["outputs"]]
    for number in range(len(cut["ranges"])):
        done = range_parts(work, number)
        if done is None:
            raise UserError(f"--out: part {number} of the second pass is missing; give the same command again")
        for output, size, digest in done:
            parts[output].append([size, digest])
    with writing(work.out):
        for output, its_parts in zip(cut["outputs"], parts, strict=True):
            assert sum(size for size, _ in its_parts) == output["end"] - output["begin"]
            if (work.aside / output["name"]).exists():
                os.replace(work.aside / output["name"], work.out / output["name"])
        write_whole_json(work.out / MANIFEST, masked(_manifest(work, cut, parts)), indent=1)


def _manifest(work: WorkFolder, cut: dict[str, Any], parts: list[list[Any]]) -> dict[str, Any]:
    plan = work.plan
    return {
        "format": FORMAT,
        "request": plan.request,
        "memory": plan.memory,
        "inputs": [{"file": file.path, "bytes": file.size, "changed": file.changed} for file in plan.files],
        **{name: cut[name] for name in ("documents_read", "bytes_read", "documents", "bytes")},
        "duplicates": cut["documents_read"] - cut["documents"],
        "corrupt": {"rows": len(cut["corrupt"]), "places": cut["corrupt"]},
        "unread": cut["unread"],
        "outputs": [
            {
                "name": output["name"],
                "documents": output["documents"],
                "bytes": output["end"] - output["begin"],
                "parts": its_parts,  # [bytes, sha256] in order
            }
            for output, its_parts in zip(cut["outputs"], parts, strict=True)
        ],
    }


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder; None if it has none.

    Raises:
        UserError: it cannot be read, or is of another program.
    """
    if not os.path.lexists(folder / MANIFEST):
        return None
    manifest = json_if_any(folder / MANIFEST)
    if not isinstance(manifest, dict) or not {"request", "outputs", "inputs"} <= manifest.keys():
        raise UserError(f"--out: '{folder / MANIFEST}' is corrupt or of another program; give another folder")
    request = manifest["request"]
    if "max_corrupt" in request:  # as of earlier versions
        request["max_bad_rows"] = request.pop("max_corrupt")
    request.setdefault("max_row_bytes", MAX_ROW_BYTES)
    manifest.setdefault("unread", {})
    return manifest


def verify(folder: str | Path) -> list[str]:
    """Compare a prepared folder with its manifest; one line for each file that differs.

    Raises:
        UserError: the folder is not one that was prepared.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"'{folder}' has no {MANIFEST}; it is not a prepared folder, or is not finished")
    return [wrong for output in manifest["outputs"] if (wrong := _what_is_wrong(folder / output["name"], output))]


def _what_is_wrong(path: Path, output: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != output["bytes"]:
            return f"{path.name} has {size:,} bytes, not {output['bytes']:,}"
        begin = 0
        with path.open("rb") as file:
            for part_size, digest in output["parts"]:
                if _digest(file, part_size) != digest:
                    return f"{path.name} is not as it was written, between bytes {begin:,} and {begin + part_size:,}"
                begin += part_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    return None


def _digest(file: Any, size: int) -> str:
    digest = hashlib.sha256()
    while size and (data := file.read(min(READ_BYTES, size))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()
