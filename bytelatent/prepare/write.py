"""The second pass, which writes the output files, and the manifest, which comes last.

Each range of bins is read from all runs, put in order, and written where its documents belong in the output.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.files import own_file
from bytelatent.prepare.disk import Buffer, read_at, scratch, write_past_cache, write_text, writing
from bytelatent.prepare.plan import FORMAT, WorkFolder
from bytelatent.prepare.scatter import SLICE_BYTES, gathered
from bytelatent.prepare.shuffle import INDEX_BYTES, BinRange, RunIndex
from bytelatent.text import MAX_ROW_BYTES

MAX_OPEN = 128
MANIFEST = "manifest.json"
READ_BYTES = 1 << 22


def make_room(work: WorkFolder) -> None:
    """Give the output files their sizes, so that a full disk is found before the second pass.

    Raises:
        UserError: the disk is too small.
    """
    cut = json.loads(work.cut_file.read_text(encoding="utf-8"))
    with writing(work.out):
        for output in cut["outputs"]:
            size = output["end"] - output["begin"]
            if (work.out / output["name"]).exists():  # finished and renamed before the work was stopped
                continue
            with open(work.aside / output["name"], "ab") as file:
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)


def gather(work: WorkFolder, rank: int, ranks: int, report: Callable[[int], None]) -> None:
    """Do this rank's share of the second pass, except what earlier calls have finished.

    Args:
        report: receives the bytes written.

    Raises:
        UserError: the disk is full, or the first pass is not finished.
    """
    cut = json.loads(work.cut_file.read_text(encoding="utf-8"))
    ranges = cut["ranges"]
    mine = [
        i for i in range(len(ranges) * rank // ranks, len(ranges) * (rank + 1) // ranks) if range_parts(work, i) is None
    ]
    if not mine:
        return
    index = RunIndex(work)
    with writing(work.out):
        for number in mine:
            _gather_range(work, index, cut["outputs"], number, ranges[number], report)


def range_parts(work: WorkFolder, number: int) -> list[list[Any]] | None:
    """What a finished range wrote, as [output, bytes, sha256]; None if it is not finished."""
    try:
        return json.loads(work.range_marker(number).read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        return None


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
    with DataFiles(work) as data, StreamWriter(work.aside, outputs, planned["stream"][0]) as stream:
        in_memory = needed <= max(work.plan.range_bytes, 1)
        for buffer in _documents(bins, data) if in_memory else _documents_one_by_one(bins, data):
            stream.write(buffer)
            report(len(buffer))
        parts = stream.parts()
        assert stream.position == planned["stream"][1], "the second pass wrote other bytes than were planned"
    write_text(work.range_marker(number), json.dumps({"parts": parts}))


def _documents(bins: BinRange, data: "DataFiles") -> Iterator[Buffer]:
    """The documents in order, all read into memory first."""
    import pyarrow

    buffer = scratch(sum(part.size for part in bins.parts))
    filled = 0
    for part in bins.parts:
        read_at(data.file(part.task), buffer.data[filled : filled + part.size], part.offset)
        filled += part.size
    # the type with offsets of 64 bits, since a range may be larger than 2 GiB
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(bins.lengths, dtype=np.int64)])
    buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(buffer)]
    array = pyarrow.Array.from_buffers(pyarrow.large_binary(), len(bins.lengths), buffers)
    yield from gathered(array, bins.order, bins.lengths[bins.order])


def _documents_one_by_one(bins: BinRange, data: "DataFiles") -> Iterator[Buffer]:
    """The documents in order, each read on its own: slow, for a range that is too large for the memory."""
    counts = np.array([part.documents for part in bins.parts])
    part_of_document = np.repeat(np.arange(len(bins.parts)), counts)
    starts = np.cumsum(bins.lengths, dtype=np.int64) - bins.lengths
    part_starts = np.cumsum([part.size for part in bins.parts]) - [part.size for part in bins.parts]
    buffer = memoryview(bytearray(SLICE_BYTES))
    for document in bins.order.tolist():
        number = int(part_of_document[document])
        part = bins.parts[number]
        offset = part.offset + int(starts[document] - part_starts[number])
        left = int(bins.lengths[document])
        while left:
            slice_ = buffer[: min(left, SLICE_BYTES)]
            read_at(data.file(part.task), slice_, offset)
            yield slice_
            offset, left = offset + len(slice_), left - len(slice_)


class DataFiles:
    """The data files of the first pass, a few of them open."""

    def __init__(self, work: WorkFolder) -> None:
        self.work = work
        self._open: OrderedDict[int, int] = OrderedDict()

    def file(self, task: int) -> int:
        if task not in self._open:
            if len(self._open) == MAX_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[task] = os.open(self.work.task_files(task).path("data"), os.O_RDONLY)
        return self._open[task]

    def __enter__(self) -> "DataFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            os.close(file)


class StreamWriter:
    """Writes consecutive bytes of the stream into the output files they belong to."""

    def __init__(self, folder: Path, outputs: list[dict[str, Any]], position: int) -> None:
        self.folder, self.outputs, self.position = folder, outputs, position
        self._output, self._file = -1, -1
        self._parts: list[list[Any]] = []
        self._hash, self._count = hashlib.sha256(), 0
        self._ends = np.array([output["end"] for output in outputs], dtype=np.int64)

    def write(self, data: Buffer) -> None:
        rest = memoryview(data)
        while len(rest):
            output = int(np.searchsorted(self._ends, self.position, side="right"))
            if output != self._output:
                self._switch_to(output)
            begin, end = self.outputs[output]["begin"], self.outputs[output]["end"]
            now = rest[: end - self.position]
            write_past_cache(self._file, now, self.position - begin)
            self._hash.update(now)
            self._count += len(now)
            self.position += len(now)
            rest = rest[len(now) :]

    def parts(self) -> list[list[Any]]:
        """[output, bytes, sha256] of each file written to."""
        self._switch_to(-1)
        return self._parts

    def _switch_to(self, output: int) -> None:
        if self._count:
            self._parts.append([self._output, self._count, self._hash.hexdigest()])
        self._hash, self._count = hashlib.sha256(), 0
        if self._file >= 0:
            os.close(self._file)
        self._output, self._file = output, -1
        if output >= 0:
            self._file = own_file(self.folder / self.outputs[output]["name"], os.O_WRONLY)

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


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
        write_text(work.out / MANIFEST, json.dumps(masked(_manifest(work, cut, parts)), indent=1))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished folder; None if there is none.

    Raises:
        UserError: it cannot be read, or is of another program.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = isinstance(manifest, dict) and {"request", "outputs", "inputs"} <= manifest.keys()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        known, manifest = False, {}
    if not known:
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
        with path.open("rb") as file:
            for part_size, digest in output["parts"]:
                begin = file.tell()
                if _digest(file, part_size) != digest:
                    return f"{path.name} is not as it was written, between bytes {begin:,} and {begin + part_size:,}"
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


def _manifest(work: WorkFolder, cut: dict[str, Any], parts: list[list[Any]]) -> dict[str, Any]:
    plan = work.plan
    return {
        "format": FORMAT,
        "request": plan.request,
        "memory": plan.memory,
        "inputs": [{"file": file.path, "bytes": file.size, "changed": file.changed} for file in plan.files],
        "documents_read": cut["documents_read"],
        "bytes_read": cut["bytes_read"],
        "documents": cut["documents"],
        "bytes": cut["bytes"],
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
