"""Blocks of text into pieces, here or in processes that read ahead."""

import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from typing import Any, NamedTuple

import torch

from bytelatent.data.patcher import Patcher
from bytelatent.data.pieces import Piece, cut
from bytelatent.errors import UserError
from bytelatent.text import BadRow, BlockReader, ReadOptions, Stored, open_blocks

RESTARTS = 3  # of the processes, for one block


@dataclass(frozen=True)
class CutBlock:
    """A block's documents, each cut into pieces, and an error for each row that holds none."""

    documents: list[list[Piece]] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    stored: Stored | None = None


class Reading:
    """Reads blocks of one source. It keeps the last file open, so that blocks in order are quick.

    Args:
        text_key: the key or column that holds the text.
        max_row_bytes: a longer row is a bad one.
        context: ids that a piece holds at most.
        patcher: cuts into patches what needs no byte LM; None where there are no patches.
    """

    def __init__(self, text_key: str, context: int, patcher: Patcher | None, max_row_bytes: int):
        # Otherwise what is stored is of another patching mode, or the model reads bytes alone.
        stored = patcher is not None and patcher.settings.needs_entropies
        self.options = ReadOptions(text_key, stored, max_row_bytes)
        self.context = context
        self.patcher = patcher.without_byte_lm() if patcher is not None else None
        self._file = ""
        self._blocks: BlockReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": None}  # an open file stays here

    def count(self, file: str) -> int | None:
        """How many blocks a file holds; None where only reading it would tell."""
        return self._open(file).count()

    def __call__(self, file: str, index: int) -> CutBlock | None:
        """A block; None past the last one.

        Raises:
            BadRow: the file cannot be read.
            UserError: it is not of the kind that the settings say.
        """
        try:
            block = self._open(file).read(index)
        except BadRow:
            self._blocks = None
            raise
        if block is None:
            return None
        documents = [list(cut(document, self.context)) for _, document in block.documents]
        return CutBlock(self._patched(documents), block.bad_rows, block.stored)

    def _open(self, file: str) -> BlockReader:
        if self._blocks is None or self._file != file:
            self._blocks = open_blocks(file, self.options)
            self._file = file
        return self._blocks

    def _patched(self, documents: list[list[Piece]]) -> list[list[Piece]]:
        if self.patcher is None:
            return documents
        pieces = iter(self.patcher.early([piece for document in documents for piece in document]))
        return [[next(pieces) for _ in document] for document in documents]


class Request(NamedTuple):
    """A block that was asked for."""

    source: int
    file: str
    index: int
    future: "Future[CutBlock | None] | None"  # None: it will be read when it is wanted


class Readings:
    """The readings of all sources, and the processes that read ahead.

    Args:
        workers: processes; 0 to read here.
    """

    def __init__(self, readings: list[Reading], workers: int):
        self.readings = readings
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def ask(self, source: int, file: str, index: int) -> Request:
        """Ask for a block, to be had by `answer`."""
        if self.workers == 0:
            return Request(source, file, index, None)
        if self._pool is None:
            # Not forked: threads and CUDA do not survive that.
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _begin, (self.readings,))
        try:
            return Request(source, file, index, self._pool.submit(_read, source, file, index))
        except BrokenProcessPool:
            self._pool = None
            return self.ask(source, file, index)

    def answer(self, request: Request) -> CutBlock | None:
        """The block, as `Reading` gives it.

        Raises:
            BadRow, UserError: as `Reading`; or processes were killed again and again.
        """
        source, file, index, future = request
        if future is None:
            return self.readings[source](file, index)
        for _ in range(RESTARTS):
            try:
                return future.result()
            except BrokenProcessPool:
                self.close()
                future = self.ask(source, file, index).future
                assert future is not None
        raise UserError(
            f"data: the processes that read '{file}' are killed again and again, as by a system without memory left; "
            f"take fewer data.workers (now {self.workers})"
        )

    def close(self) -> None:
        """End the processes."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


_readings: list[Reading] = []  # in a process that reads ahead: its own copies


def _begin(readings: list[Reading]) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the training process's to answer
    torch.set_num_threads(1)
    _readings[:] = readings
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _read(source: int, file: str, index: int) -> CutBlock | None:
    return _readings[source](file, index)
