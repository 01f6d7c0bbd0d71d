"""Blocks of text read and cut into pieces, here or ahead in other processes."""

import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from bytelatent.data.packing import Piece, split_document
from bytelatent.data.patcher import Patcher
from bytelatent.errors import UserError
from bytelatent.signals import ignore_interrupts
from bytelatent.text import BadRow, BlockReader, ReadOptions, Stored, open_blocks
from bytelatent.text.conversations import ChatOptions
from bytelatent.vocab import BYTES, Vocabulary

RESTARTS = 3  # of the processes, for one block


@dataclass(frozen=True)
class CutBlock:
    """A block's documents, each cut into pieces, and an error for each row that holds none."""

    documents: list[list[Piece]] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    stored: Stored | None = None
    num_cut: int = 0  # conversations that are longer than a context


Begun = Future[CutBlock | None] | None  # the reading of a block; None where it is read when it is needed


class PieceReader:
    """Reads blocks of one source and cuts them. The last file stays open, so that blocks in order are fast.

    Args:
        text_key: the key or column that holds the text.
        max_row_bytes: a longer row is a bad one.
        chat: rows are conversations, read so; None for texts.
        context: ids that a piece holds at most.
        patcher: finds patches where that needs no byte LM; None for a model without patches.
        vocabulary: of the ids.
    """

    def __init__(
        self,
        text_key: str,
        context: int,
        patcher: Patcher | None,
        max_row_bytes: int,
        vocabulary: Vocabulary = BYTES,
        chat: ChatOptions | None = None,
    ):
        # Otherwise what is stored is of another patching mode, or the model reads bytes alone.
        stored = chat is None and patcher is not None and patcher.settings.needs_entropies
        self.options = ReadOptions(text_key, stored, max_row_bytes, chat=chat)
        self.context, self.vocabulary = context, vocabulary
        self.patcher = patcher.without_byte_lm() if patcher is not None else None
        self._file = ""
        self._blocks: BlockReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": None}  # an open file stays here

    def count(self, file: str) -> int | None:
        """The number of blocks of a file; None where only reading it would tell."""
        return self._open(file).count()

    def __call__(self, file: str, index: int) -> CutBlock | None:
        """A block; None past the last one.

        Raises:
            UserError: the file cannot be read (BadRow), a package to read it is missing, or a newer version wrote it.
        """
        try:
            block = self._open(file).read(index)
        except BadRow:
            self._blocks = None
            raise
        if block is None:
            return None
        documents = [list(split_document(text, self.context, self.vocabulary)) for _, text in block.documents]
        num_cut = sum(len(pieces) > 1 for pieces in documents) if self.options.chat is not None else 0
        if self.patcher is not None:
            pieces = iter(self.patcher.early([piece for document in documents for piece in document]))
            documents = [[next(pieces) for _ in document] for document in documents]
        return CutBlock(documents, block.bad_rows, block.stored, num_cut)

    def _open(self, file: str) -> BlockReader:
        if self._blocks is None or self._file != file:
            self._blocks = open_blocks(file, self.options)
            self._file = file
        return self._blocks


class ReaderPool:
    """The readers of all sources, and the processes that read ahead.

    Args:
        readers: of each source.
        workers: number of processes; 0 to read in this one.
    """

    def __init__(self, readers: list[PieceReader], workers: int):
        self.readers, self.workers = readers, workers
        self._pool: ProcessPoolExecutor | None = None

    def request(self, source: int, file: str, index: int) -> Begun:
        """Begin to read a block, for `result`."""
        if self.workers == 0:
            return None
        if self._pool is None:
            # Not forked: threads and CUDA do not survive that.
            self._pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _begin, (self.readers,))
        try:
            return self._pool.submit(_read, source, file, index)
        except BrokenProcessPool:
            self._pool = None
            return self.request(source, file, index)

    def result(self, source: int, file: str, index: int, begun: Begun) -> CutBlock | None:
        """The block, as `PieceReader` returns it.

        Args:
            begun: what `request` returned.

        Raises:
            BadRow, UserError: as `PieceReader`; or processes were killed repeatedly.
        """
        for _ in range(RESTARTS):
            if begun is None:
                return self.readers[source](file, index)
            try:
                return begun.result()
            except BrokenProcessPool:
                self.close()
                begun = self.request(source, file, index)
        raise UserError(
            f"data: the processes that read '{file}' are killed again and again, as by a system without memory left; "
            f"take fewer data.workers (now {self.workers})"
        )

    def close(self) -> None:
        """End the processes."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


_readers: list[PieceReader] = []  # of a process that reads ahead


def _begin(readers: list[PieceReader]) -> None:
    ignore_interrupts()  # the training process answers Ctrl-C
    torch.set_num_threads(1)
    _readers[:] = readers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _read(source: int, file: str, index: int) -> CutBlock | None:
    return _readers[source](file, index)
