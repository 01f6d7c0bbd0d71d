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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.prepare.disk import write_text, writing
from bytelatent.prepare.plan import InputFile, WorkFolder, too_many_bad_rows
from bytelatent.prepare.settings import MAX_CHUNKS

KEY_BITS = 64
MAX_VALIDATION = 10_000
INDEX_BYTES = 96  # memory for one line beside its bytes: ends, key, order and temporary arrays


class PositionKeys:
    """Random keys for the documents of a unit, in their order."""

    def __init__(self, seed: int, unit: int) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence([seed, unit]))

    def draw(self, count: int) -> np.ndarray:
        """The next `count` keys, uint64 [N]; the same however the documents are divided into calls."""
        return self._bits.random_raw(count)


class TextKeys:
    """Random keys that are the same for the same text: 128 bits, of which the order needs the high 64."""

    def __init__(self, seed: int) -> None:
        self._hash = hashlib.blake2b(digest_size=16, key=seed.to_bytes(8, "big"))

    def key(self, text: bytes) -> bytes:
        """16 bytes, the most significant first."""
        keyed = self._hash.copy()
        keyed.update(text)
        return keyed.digest()


def split_keys(keys: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The high and the low 64 bits of keys of 16 bytes, uint64 [N] each."""
    both = np.frombuffer(b"".join(keys), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def sorted_order(high: np.ndarray, low: np.ndarray | None = None) -> np.ndarray:
    """The positions of the documents by key, int64 [N]; documents with equal keys keep their order."""
    if low is not None:
        return np.lexsort((low, high))
    order = np.argsort(high)
    in_order = high[order]
    if (in_order[1:] == in_order[:-1]).any():  # so rare that the faster sort, which is not stable, is tried first
        return np.argsort(high, kind="stable")
    return order


def first_of_equal(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Whether each of the sorted keys differs from the one before, bool [N]."""
    first = np.ones(len(high), dtype=bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return first


def bin_of(high: np.ndarray, bits: int) -> np.ndarray:
    """The bin of each key, int64 [N]: its `bits` highest bits."""
    return (high >> np.uint64(KEY_BITS - bits)).astype(np.int64)


def bin_edges(sorted_high: np.ndarray, bits: int) -> np.ndarray:
    """Number of sorted keys before each bin, int64 [2^bits + 1]."""
    first_keys = np.arange(1 << bits, dtype=np.uint64) << np.uint64(KEY_BITS - bits)
    return np.append(np.searchsorted(sorted_high, first_keys), len(sorted_high)).astype(np.int64)


@dataclass(frozen=True)
class RunPart:
    """Documents of a range of bins that stand together in a data file."""

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
        sorted_high = all_high[order]
        if all_low is not None:
            firsts = first_of_equal(sorted_high, all_low[order])
            order, sorted_high = order[firsts], sorted_high[firsts]
        return BinRange(parts, np.concatenate(lengths), order, sorted_high)

    def kept(self, documents: np.ndarray, at_once: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents and bytes of each bin once duplicates are removed, int64 [B] each.

        Args:
            documents: number in each bin before that, [B].
            at_once: number of documents to load together.
        """
        kept = np.zeros((2, self.bins), dtype=np.int64)
        for first, end in grouped(documents, at_once):
            part = self.load(first, end)
            bins = bin_of(part.high, self.work.plan.bits) - first
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


@dataclass(frozen=True)
class StreamPosition:
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
    """Decide which document goes where, and save that, unless an earlier call has done so.

    Raises:
        UserError: there are no documents, fewer than chunks, or too many bad rows.
    """
    if work.cut_file.exists():
        return
    plan, index = work.plan, RunIndex(work)
    corrupt = [place for marker in index.markers for place in marker["corrupt"]]
    if len(corrupt) > plan.request["max_bad_rows"]:
        raise too_many_bad_rows(corrupt, plan.request["max_bad_rows"])
    documents, sizes = index.totals()
    read, read_bytes = int(documents.sum()), int(sizes.sum())
    if read == 0:
        raise UserError(f"{_names(plan.request['source'])}: no documents" + (f"; bad: {corrupt[0]}" if corrupt else ""))
    kept, kept_bytes = documents, sizes
    if index.dedup:
        kept, kept_bytes = index.kept(documents, max(plan.range_bytes // (2 * INDEX_BYTES), 1))
    stream = ShuffledStream(index, kept, kept_bytes)
    ranges = []
    for first, end in grouped(sizes + INDEX_BYTES * documents, plan.range_bytes):
        if documents[first:end].any():
            span = [int(stream.bytes[first]), int(stream.bytes[end])]
            ranges.append({"bins": [first, end], "stream": span, "read_bytes": int(sizes[first:end].sum())})
    saved = {
        "documents_read": read,
        "bytes_read": read_bytes,
        "documents": int(kept.sum()),
        "bytes": int(kept_bytes.sum()),
        "corrupt": corrupt,
        "unread": _unread(index.markers, plan.files),
        "outputs": _outputs(stream, plan.request),
        "ranges": ranges,
    }
    with writing(work.out):
        write_text(work.cut_file, json.dumps(saved))


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
    name, digits = request["name"], max(2, len(str(chunks - 1)))
    first = stream.after(held_out)
    size = int(stream.bytes[-1]) - first.bytes
    positions = [first, *(stream.at(first.bytes - (-chunk * size // chunks)) for chunk in range(1, chunks))]
    positions.append(stream.after(total))
    found = [_output(f"{name}.val.jsonl", StreamPosition(0, 0), first)] if held_out else []
    for chunk in range(chunks):
        found.append(_output(f"{name}.chunk.{chunk:0{digits}d}.jsonl", positions[chunk], positions[chunk + 1]))
    return found


def _output(name: str, begin: StreamPosition, end: StreamPosition) -> dict[str, Any]:
    return {"name": name, "documents": end.documents - begin.documents, "begin": begin.bytes, "end": end.bytes}


def _names(sources: list[str]) -> str:
    return ", ".join(f"'{source}'" for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
