"""The first pass: each task reads some units and writes their lines as sorted runs.

A task collects lines until its memory is full, sorts them by key, and appends them as a *run* to its one data file.
Beside it are files of each line's key and length, and for every run a table of where each *bin* (the keys with the same
highest bits) begins. So the documents of a range of bins are one part of each run, and all parts are known without
reading the data.
"""

# Shapes: N documents, R runs of a task, B bins

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.files import own_file
from bytelatent.prepare.disk import scratch, write_all, write_at, write_text, writing
from bytelatent.prepare.plan import TaskFiles, WorkFolder
from bytelatent.prepare.rows import BadRowRecord, LineBlock, LineReader
from bytelatent.prepare.shuffle import INDEX_BYTES, PositionKeys, TextKeys, bin_edges, sorted_order, split_keys
from bytelatent.text import ReadOptions

SLICE_BYTES = 1 << 20  # written at once; fits into a core's cache
MAX_LINE_BYTES = 2**31 - 2**24  # Arrow's offsets are of 31 bits


def scatter(work: WorkFolder, task: int, report: Callable[[int], None]) -> None:
    """Do one task of the first pass, unless an earlier call has finished it.

    Args:
        report: receives the bytes read.

    Raises:
        UserError: the input cannot be read, there are too many bad rows, or the disk is full.
    """
    plan = work.plan
    files = work.task_files(task)
    if files.marker() is not None:
        return
    text_keys = TextKeys(plan.request["seed"]) if plan.request["dedup"] else None
    corrupt = BadRowRecord(plan.request["max_bad_rows"])
    max_line = min(plan.run_bytes // 2, MAX_LINE_BYTES)
    options = ReadOptions(plan.request["text_key"], stored=False, max_row_bytes=plan.request["max_row_bytes"])
    reader = LineReader(plan.files, options, text_keys, corrupt, max_line, report)
    with writing(work.out):
        runs = RunWriter(files, plan.bits, plan.run_bytes, with_low=text_keys is not None)
        try:
            for number in range(*plan.tasks[task]):
                position_keys = PositionKeys(plan.request["seed"], number)
                for rows in reader.read(plan.units[number]):
                    runs.add(rows, *_keys(rows, position_keys))
            runs.finish(corrupt.plain())
        finally:
            runs.close()


def _keys(rows: LineBlock, position_keys: PositionKeys) -> tuple[np.ndarray, np.ndarray | None]:
    if rows.keys is not None:
        return split_keys(rows.keys)
    return position_keys.draw(len(rows.kept)), None


class RunWriter:
    """Collects rows, and writes them as sorted runs.

    Args:
        bits: number of a key's bits that name its bin.
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

    def add(self, rows: LineBlock, high: np.ndarray, low: np.ndarray | None) -> None:
        """Add rows, with the keys (uint64 [N]) of the kept ones.

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

    def finish(self, bad_rows: dict[str, Any]) -> None:
        """Write the last run, and the marker, with the task's bad rows."""
        self.flush()
        sizes = {kind: os.fstat(file).st_size for kind, file in self._open.items()}
        self.close()
        counts = {"documents": self._documents, "bytes": self._bytes, "runs": self._runs}
        write_text(self.files.path("marker"), json.dumps({**counts, **bad_rows, "sizes": sizes}))

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
