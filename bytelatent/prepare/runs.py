"""Sorted runs: what a scatter task writes.

A task collects lines up to its memory, sorts them by key, and adds them as a *run* to its one data file. Aside stand
each line's key and length, and for every run a table of where each *bin* (the keys with the same highest bits) begins.
So the documents of a range of bins are one piece of each run, and all pieces are known without reading the data.
"""

# Shapes: N documents, R runs of a task, B bins

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.files import own_file
from bytelatent.prepare.disk import scratch, write_all, write_at, write_text
from bytelatent.prepare.order import bin_edges, sorted_order

INDEX_BYTES = 96  # memory for one line beside its bytes: ends, key, order and the arrays made on the way
SLICE_BYTES = 1 << 20  # written at once: what fits into a core's cache
MAX_LINE_BYTES = 2**31 - 2**24  # Arrow's offsets are of 31 bits


@dataclass
class Rows:
    """Lines of JSON, each with its newline, in one buffer; some of them (blank or corrupt ones) are to be left out."""

    data: bytes | bytearray | memoryview
    ends: np.ndarray  # int64 [lines], after the newline
    kept: np.ndarray  # int64 [N], which lines
    keys: list[bytes] | None = None  # [N] of 16 bytes, where duplicates are to be removed


@dataclass(frozen=True)
class TaskFiles:
    """The files of one scatter task. Those beside the marker count only once the marker is there."""

    folder: Path
    task: int

    def path(self, kind: str) -> Path:
        """`data`, `high` and `low` (keys), `lengths`, `table`, `marker`."""
        return self.folder / f"{self.task:05d}.{kind}"

    def marker(self) -> dict[str, Any] | None:
        """What the finished task says of itself; None if it is not finished or its files are not as it left them."""
        try:
            marker = json.loads(self.path("marker").read_text(encoding="utf-8"))
            sizes = {kind: self.path(kind).stat().st_size for kind in marker["sizes"]}
        except (OSError, ValueError, KeyError):
            return None
        return marker if sizes == marker["sizes"] else None


class RunWriter:
    """Collects rows, and writes them as sorted runs.

    Args:
        bits: of the key that name the bin.
        run_bytes: memory for a run, lines and index together.
        with_low: keys have 128 bits.
    """

    def __init__(self, files: TaskFiles, bits: int, run_bytes: int, with_low: bool) -> None:
        self.files, self.bits, self.run_bytes = files, bits, run_bytes
        kinds = ["data", "lengths", "table", "high"] + (["low"] if with_low else [])
        files.path("marker").unlink(missing_ok=True)
        self._open = {kind: own_file(files.path(kind), os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for kind in kinds}
        self._buffer = scratch(run_bytes)
        self._documents = self._bytes = self._runs = self._written = 0
        self._clear()

    def add(self, rows: Rows, high: np.ndarray, low: np.ndarray | None) -> None:
        """Take rows with the keys (uint64 [N]) of those that are kept.

        Raises:
            UserError: they do not fit into the memory for a run.
        """
        size, lines = len(rows.data), len(rows.ends)
        if self._used + size + INDEX_BYTES * (self._lines + lines) > self.run_bytes:
            self.flush()
            if size + INDEX_BYTES * lines > self.run_bytes:
                raise UserError(
                    f"--memory: too little for a line of about {size:,} bytes; give more, or fewer --workers"
                )
        self._buffer[self._used : self._used + size] = np.frombuffer(rows.data, dtype=np.uint8)
        self._ends.append((rows.ends + self._used).astype(np.int32))
        self._kept.append(rows.kept + self._lines)
        self._high.append(high)
        self._low.append(low)
        self._used += size
        self._lines += lines

    def flush(self) -> None:
        """Write what was collected as one run."""
        if not sum(len(kept) for kept in self._kept):
            self._clear()
            return
        import pyarrow

        ends = np.concatenate([np.zeros(1, np.int32), *self._ends])
        high = np.concatenate(self._high)
        low = np.concatenate(self._low) if "low" in self._open else None  # type: ignore[arg-type]
        order = sorted_order(high, low)
        lines = np.concatenate(self._kept)[order]
        high = high[order]
        lengths = (ends[1:] - ends[:-1])[lines].astype(np.uint32)
        self._write_index(lengths, high, low[order] if low is not None else None)
        buffers = [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(self._buffer[: self._used])]
        array = pyarrow.Array.from_buffers(pyarrow.binary(), len(ends) - 1, buffers)
        for data in gathered(array, lines, lengths):
            write_at(self._open["data"], data, self._written)
            self._written += len(data)
        self._clear()

    def finish(self, said: dict[str, Any]) -> None:
        """Write the last run, and the marker with what the task has to say."""
        self.flush()
        sizes = {kind: os.fstat(file).st_size for kind, file in self._open.items()}
        self.close()
        counts = {"documents": self._documents, "bytes": self._bytes, "runs": self._runs}
        write_text(self.files.path("marker"), json.dumps({**counts, **said, "sizes": sizes}))

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)
        self._open = {}

    def _clear(self) -> None:
        self._used = self._lines = 0
        self._ends: list[np.ndarray] = []
        self._kept: list[np.ndarray] = []
        self._high: list[np.ndarray] = []
        self._low: list[np.ndarray | None] = []

    def _write_index(self, lengths: np.ndarray, high: np.ndarray, low: np.ndarray | None) -> None:
        """Add a run's keys and lengths, and documents and bytes before each bin to the table, [R, 2, B + 1]."""
        before = bin_edges(high, self.bits)
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        write_all(self._open["table"], np.stack([before + self._documents, ends[before] + self._bytes]).tobytes())
        write_all(self._open["lengths"], lengths.data.cast("B"))
        write_all(self._open["high"], high.data.cast("B"))
        if low is not None:
            write_all(self._open["low"], low.data.cast("B"))
        self._documents += len(lengths)
        self._bytes += int(ends[-1])
        self._runs += 1


def gathered(array: Any, order: np.ndarray, lengths: np.ndarray) -> Iterator[memoryview]:
    """The lines of an Arrow array in another order, as buffers of about SLICE_BYTES.

    Args:
        order: int64 [N].
        lengths: in that order, [N].
    """
    import pyarrow
    import pyarrow.compute as compute

    pool = pyarrow.system_memory_pool()  # keeps a slice's memory for the next one, where others give it back
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.searchsorted(ends, np.arange(SLICE_BYTES, total, SLICE_BYTES), side="left") + 1
    for begin, end in zip([0, *np.unique(cuts)], [*np.unique(cuts), len(order)], strict=True):
        if begin < end:
            size = int(ends[end - 1] - (ends[begin - 1] if begin else 0))
            part = compute.take(array, pyarrow.array(order[begin:end]), memory_pool=pool)
            yield memoryview(part.buffers()[2])[:size]
