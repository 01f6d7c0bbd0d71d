"""The shuffled order: documents by a random key of 64 bits, and where each of them goes in the output.

A document's key comes from the seed and its position in the input or, to remove duplicates, from its text, so that the
order depends on neither the memory nor the number of workers. Of 10^9 documents two share one of the 2^64 keys with
probability 0.03; then the first in the input goes first.

Between the two passes, `plan_outputs` decides from the keys and lengths alone where every document goes. The kept
documents in the shuffled order are one stream: first those held out for validation, then those to train on. The output
files are parts of it that end where documents end. A document that starts at byte s of the S bytes to train on belongs
to chunk s * N // S, so that each of the N chunks is within one document of S / N bytes.
"""

# Shapes: N documents, B bins

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from bytelatent.errors import UserError
from bytelatent.files import write_whole_json
from bytelatent.prepare.plan import MAX_CHUNKS, InputFile, WorkFolder, too_many_bad_rows, writing

KEY_BITS = 64
MAX_VALIDATION = 10_000
SLICE_BYTES = 1 << 20  # written at once; fits into a core's cache
INDEX_BYTES = 96  # memory for one line beside its bytes: ends, key, order and temporary arrays


def position_keys(seed: int, unit: int) -> Callable[[int], np.ndarray]:
    """Draws random keys for the next documents of a unit, uint64 [N]; the same however they are divided into calls."""
    return np.random.Philox(np.random.SeedSequence([seed, unit])).random_raw


class TextKeys:
    """Random keys that are the same for the same text: 128 bits, of which the order needs the high 64."""

    def __init__(self, seed: int) -> None:
        self._hash = hashlib.blake2b(digest_size=16, key=seed.to_bytes(8, "big"))

    def key(self, text: bytes) -> bytes:
        """16 bytes, the most significant first."""
        keyed = self._hash.copy()
        keyed.update(text)
        return keyed.digest()


def sorted_order(high: np.ndarray, low: np.ndarray | None = None) -> np.ndarray:
    """The positions of the documents by key, int64 [N]; documents with equal keys keep their order."""
    if low is not None:
        return np.lexsort((low, high))
    order = np.argsort(high)
    in_order = high[order]
    if (in_order[1:] == in_order[:-1]).any():  # so rare that the faster sort, which is not stable, is tried first
        return np.argsort(high, kind="stable")
    return order


def bin_edges(sorted_high: np.ndarray, bits: int) -> np.ndarray:
    """Number of sorted keys before each bin, int64 [2^bits + 1]."""
    first_keys = np.arange(1 << bits, dtype=np.uint64) << np.uint64(KEY_BITS - bits)
    return np.append(np.searchsorted(sorted_high, first_keys), len(sorted_high)).astype(np.int64)


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


_scratch = np.empty(0, dtype=np.uint8)


def scratch(size: int) -> np.ndarray:
    """This process's one large buffer, uint8 [size]: to allocate new memory takes longer than to use it."""
    global _scratch
    if len(_scratch) < size:
        _scratch = np.empty(0, dtype=np.uint8)  # let go of the old one first
        _scratch = np.empty(size, dtype=np.uint8)
    return _scratch[:size]


@dataclass(frozen=True)
class RunPart:
    """Documents of a range of bins that are next to each other in a data file."""

    task: int
    offset: int
    size: int
    documents: int


@dataclass(frozen=True)
class BinRange:
    """All documents of some bins: in the order of the parts, and in the shuffled order."""

    parts: list[RunPart]
    lengths: np.ndarray  # uint32 [N], in the order of the parts
    order: np.ndarray  # int64 [kept], indices into `lengths`
    high: np.ndarray  # uint64 [kept], in the shuffled order


class RunIndex:
    """What the first pass wrote, seen as one: tables, keys and lengths of all tasks.

    Raises:
        UserError: a task of the first pass is not finished.
    """

    def __init__(self, work: WorkFolder) -> None:
        self.work = work
        self.bins = 1 << work.plan.bits
        self.dedup = bool(work.plan.request["dedup"])
        self.markers = []
        for task in range(len(work.plan.tasks)):
            marker = work.task_files(task).marker()
            if marker is None:
                raise UserError(f"--out: part {task} of the first pass is missing; give the same command again")
            self.markers.append(marker)

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents and bytes of each bin, int64 [B] each."""
        total = np.zeros((2, self.bins), dtype=np.int64)
        for task, marker in enumerate(self.markers):
            if marker["documents"]:
                for table in self._table(task):
                    total += np.diff(table, axis=1)
        return total[0], total[1]

    def load(self, first: int, end: int) -> BinRange:
        """The documents of the bins from `first` to `end`, without their bytes."""
        parts, lengths, high, low = [], [np.zeros(0, np.uint32)], [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for task, marker in enumerate(self.markers):
            if not marker["documents"]:
                continue
            table = self._table(task)
            bounds = np.stack([table[:, :, first], table[:, :, end]], axis=2)
            for (begin_d, end_d), (begin_b, end_b) in bounds.tolist():
                if begin_d < end_d:
                    parts.append(RunPart(task, begin_b, end_b - begin_b, end_d - begin_d))
                    lengths.append(self._part(task, "lengths", begin_d, end_d))
                    high.append(self._part(task, "high", begin_d, end_d))
                    if self.dedup:
                        low.append(self._part(task, "low", begin_d, end_d))
        all_high = np.concatenate(high)
        all_low = np.concatenate(low) if self.dedup else None
        order = sorted_order(all_high, all_low)
        if all_low is not None and len(order):
            before, after = order[:-1], order[1:]
            differs = (all_high[after] != all_high[before]) | (all_low[after] != all_low[before])
            order = order[np.concatenate([[True], differs])]
        return BinRange(parts, np.concatenate(lengths), order, all_high[order])

    def kept(self, documents: np.ndarray, at_once: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents and bytes of each bin once duplicates are removed, int64 [B] each.

        Args:
            documents: number in each bin before that, [B].
            at_once: number of documents to load together.
        """
        kept = np.zeros((2, self.bins), dtype=np.int64)
        for first, end in grouped(documents, at_once):
            part = self.load(first, end)
            bins = (part.high >> np.uint64(KEY_BITS - self.work.plan.bits)).astype(np.int64) - first
            kept[0, first:end] = np.bincount(bins, minlength=end - first)
            # in float64, exact below 2^53 bytes
            kept[1, first:end] = np.bincount(bins, weights=part.lengths[part.order], minlength=end - first)
        return kept[0], kept[1]

    def _table(self, task: int) -> np.ndarray:
        """Documents and bytes of the task before each bin of each run, int64 [runs, 2, B + 1]."""
        table = np.memmap(self.work.task_files(task).path("table"), dtype=np.int64, mode="r")
        return table.reshape(-1, 2, self.bins + 1)

    def _part(self, task: int, kind: str, first: int, end: int) -> np.ndarray:
        """Keys or lengths of a run of the task's documents; read, for pages of a mapped file would count as memory."""
        dtype = np.dtype(np.uint32 if kind == "lengths" else np.uint64)
        path = self.work.task_files(task).path(kind)
        return np.fromfile(path, dtype=dtype, count=end - first, offset=first * dtype.itemsize)


def grouped(sizes: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Groups of consecutive bins (first, end), each within `limit` or a single bin."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    first = 0
    while first < len(sizes):
        end = int(np.searchsorted(before, before[first] + limit, side="right")) - 1
        end = min(max(end, first + 1), len(sizes))
        yield first, end
        first = end


class StreamPosition(NamedTuple):
    """A position between two documents of the stream."""

    documents: int
    bytes: int


class ShuffledStream:
    """The kept documents in the shuffled order, known bin by bin."""

    def __init__(self, index: RunIndex, documents: np.ndarray, sizes: np.ndarray) -> None:
        self.index = index
        self.documents = np.concatenate([np.zeros(1, np.int64), np.cumsum(documents)])
        self.bytes = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        self._loaded: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def after(self, count: int) -> StreamPosition:
        """The position after the first `count` documents."""
        if count >= self.documents[-1]:
            return StreamPosition(int(self.documents[-1]), int(self.bytes[-1]))
        bin_index = int(np.searchsorted(self.documents, count, side="right")) - 1
        return self._position(bin_index, count - int(self.documents[bin_index]))

    def at(self, offset: int) -> StreamPosition:
        """The first position at or after a byte."""
        if offset >= self.bytes[-1]:
            return self.after(int(self.documents[-1]))
        bin_index = int(np.searchsorted(self.bytes, offset, side="right")) - 1
        return self._position(
            bin_index, int(np.searchsorted(self._starts(bin_index), offset - int(self.bytes[bin_index])))
        )

    def _position(self, bin_index: int, inside: int) -> StreamPosition:
        return StreamPosition(
            int(self.documents[bin_index]) + inside, int(self.bytes[bin_index] + self._starts(bin_index)[inside])
        )

    def _starts(self, bin_index: int) -> np.ndarray:
        """Where each document of a bin starts in it, and where the last one ends, int64 [N + 1]."""
        if self._loaded[0] != bin_index:
            part = self.index.load(bin_index, bin_index + 1)
            ends = np.cumsum(part.lengths[part.order], dtype=np.int64)
            self._loaded = (bin_index, np.concatenate([np.zeros(1, np.int64), ends]))
        return self._loaded[1]


def plan_outputs(work: WorkFolder) -> None:
    """Decide which document goes where, save that, and give the output files their sizes.

    Raises:
        UserError: there are no documents, fewer than chunks, or too many bad rows; or the disk is too small for the
            output files, which is found before the second pass.
    """
    with writing(work.out):
        if not work.cut_file.exists():
            write_whole_json(work.cut_file, _planned(work))
        for output in json.loads(work.cut_file.read_text(encoding="utf-8"))["outputs"]:
            if (work.out / output["name"]).exists():  # finished and renamed before the work was stopped
                continue
            with open(work.aside / output["name"], "ab") as file:
                if size := output["end"] - output["begin"]:
                    os.posix_fallocate(file.fileno(), 0, size)


def _planned(work: WorkFolder) -> dict[str, Any]:
    plan, index = work.plan, RunIndex(work)
    corrupt = [place for marker in index.markers for place in marker["corrupt"]]
    if len(corrupt) > plan.request["max_bad_rows"]:
        raise too_many_bad_rows(corrupt, plan.request["max_bad_rows"])
    documents, sizes = index.totals()
    if not documents.any():
        names = [f"'{source}'" for source in plan.request["source"]]
        bad = f"; bad: {corrupt[0]}" if corrupt else ""
        raise UserError(f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: no documents{bad}")
    kept, kept_bytes = documents, sizes
    if index.dedup:
        kept, kept_bytes = index.kept(documents, max(plan.range_bytes // (2 * INDEX_BYTES), 1))
    stream = ShuffledStream(index, kept, kept_bytes)
    ranges = []
    for first, end in grouped(sizes + INDEX_BYTES * documents, plan.range_bytes):
        if documents[first:end].any():
            span = [int(stream.bytes[first]), int(stream.bytes[end])]
            ranges.append({"bins": [first, end], "stream": span, "read_bytes": int(sizes[first:end].sum())})
    return {
        "documents_read": int(documents.sum()),
        "bytes_read": int(sizes.sum()),
        "documents": int(kept.sum()),
        "bytes": int(kept_bytes.sum()),
        "corrupt": corrupt,
        "unread": _unread(index.markers, plan.files),
        "outputs": _outputs(stream, plan.request),
        "ranges": ranges,
    }


def _unread(markers: list[dict[str, Any]], files: list[InputFile]) -> dict[str, str]:
    """The files of which nothing could be read, each with the reason."""
    good = {number for marker in markers for number in marker["good_files"]}
    bad = {number: why for marker in reversed(markers) for number, why in marker["bad_files"]}
    return {files[number].path: why for number, why in sorted(bad.items()) if number not in good}


def _outputs(stream: ShuffledStream, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The output files in the order of the stream: name, documents, and where in it they begin and end."""
    total = int(stream.documents[-1])
    held_out = request["validation"]
    if held_out is None:
        held_out = 0 if total < 2 else min(MAX_VALIDATION, max(total // 100, 1))
    elif held_out >= total:
        raise UserError(f"--validation: {held_out} of {total} documents leave none to train on; give fewer")
    left = total - held_out
    chunks = request["chunks"] or min(MAX_CHUNKS, left)
    if chunks > left:
        raise UserError(f"--chunks: {chunks} are more than the {left} documents to train on; give fewer")
    first, last = stream.after(held_out), stream.after(total)
    size = last.bytes - first.bytes
    while True:
        positions = [first, *(stream.at(first.bytes - (-chunk * size // chunks)) for chunk in range(1, chunks)), last]
        if request["chunks"] or all(begin.documents < end.documents for begin, end in pairwise(positions)):
            break
        chunks -= 1  # a document is longer than a chunk: one chunk is empty, or several
    name, digits = request["name"], max(2, len(str(chunks - 1)))
    names = [f"{name}.chunk.{chunk:0{digits}d}.jsonl" for chunk in range(chunks)]
    if held_out:
        positions.insert(0, StreamPosition(0, 0))
        names.insert(0, f"{name}.val.jsonl")
    return [
        {"name": name, "documents": end.documents - begin.documents, "begin": begin.bytes, "end": end.bytes}
        for name, (begin, end) in zip(names, pairwise(positions), strict=True)
    ]
