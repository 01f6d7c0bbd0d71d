"""What the first pass left, seen as one: tables, keys and lengths of all tasks."""

# Shapes: N documents, B bins

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bytelatent.errors import UserError
from bytelatent.prepare.order import bin_of, first_of_each, sorted_order
from bytelatent.prepare.work import Work


@dataclass(frozen=True)
class Piece:
    """Documents of a range of bins that stand together in a data file."""

    task: int
    offset: int
    size: int
    documents: int


@dataclass(frozen=True)
class Range:
    """All documents of some bins: in the order of the pieces, and in the shuffled order."""

    pieces: list[Piece]
    lengths: np.ndarray  # uint32 [N], as in the pieces
    order: np.ndarray  # int64 [kept], indices into `lengths`
    high: np.ndarray  # uint64 [kept], in the shuffled order


class Index:
    """
    Raises:
        UserError: a task of the first pass is not finished.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.bins = 1 << work.plan.bits
        self.dedup = bool(work.plan.request["dedup"])
        self.markers = []
        for task in range(len(work.plan.tasks)):
            marker = work.task_files(task).marker()
            if marker is None:
                raise UserError(f"--out: part {task} of the first pass is not there; give the same command again")
            self.markers.append(marker)

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents and bytes of each bin, int64 [B] each."""
        total = np.zeros((2, self.bins), dtype=np.int64)
        for task, marker in enumerate(self.markers):
            if marker["documents"]:
                for table in self._table(task):
                    total += np.diff(table, axis=1)
        return total[0], total[1]

    def load(self, first: int, end: int) -> Range:
        """The documents of the bins from `first` to `end`, without their bytes."""
        pieces, lengths, high, low = [], [np.zeros(0, np.uint32)], [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for task, marker in enumerate(self.markers):
            if not marker["documents"]:
                continue
            table = self._table(task)
            places = np.stack([table[:, :, first], table[:, :, end]], axis=2)
            for (begin_d, end_d), (begin_b, end_b) in places.tolist():
                if begin_d < end_d:
                    pieces.append(Piece(task, begin_b, end_b - begin_b, end_d - begin_d))
                    lengths.append(self._part(task, "lengths", begin_d, end_d))
                    high.append(self._part(task, "high", begin_d, end_d))
                    if self.dedup:
                        low.append(self._part(task, "low", begin_d, end_d))
        all_high = np.concatenate(high)
        all_low = np.concatenate(low) if self.dedup else None
        order = sorted_order(all_high, all_low)
        sorted_high = all_high[order]
        if all_low is not None:
            first_ones = first_of_each(sorted_high, all_low[order])
            order, sorted_high = order[first_ones], sorted_high[first_ones]
        return Range(pieces, np.concatenate(lengths), order, sorted_high)

    def kept(self, documents: np.ndarray, at_once: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents and bytes of each bin once duplicates are removed, int64 [B] each.

        Args:
            documents: of each bin before, [B].
            at_once: documents to look at together.
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
    """Consecutive bins (first, end), as many together as stay within `limit`; at least one."""
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    first = 0
    while first < len(sizes):
        end = int(np.searchsorted(before, before[first] + limit, side="right")) - 1
        end = min(max(end, first + 1), len(sizes))
        yield first, end
        first = end
