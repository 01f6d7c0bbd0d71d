"""Batches without end from weighted sources; the position is part of the checkpoint."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np

from bytelatent.data.documents import Document, find_files, read_documents
from bytelatent.data.packing import Batch, pack, take
from bytelatent.data.patcher import Patcher
from bytelatent.data.pieces import Piece, cut
from bytelatent.data.settings import DataSettings, SourceSettings
from bytelatent.errors import UserError


class SourceReader:
    """The documents of one source, again and again, the files in another order in each epoch."""

    def __init__(self, settings: SourceSettings, seed: int):
        self.settings = settings
        self.seed = seed
        self.files = find_files(settings.path)
        self.epoch, self.place, self.row = 0, 0, 0
        self._rows = self._read()

    def __next__(self) -> Document:
        return next(self._rows)

    def _read(self) -> Iterator[Document]:
        while True:
            found = self.place > 0 or self.row > 0
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.files))
            while self.place < len(order):
                file = self.files[order[self.place]]
                for row, document in read_documents(file, self.settings.text_key, self.row):
                    self.row, found = row + 1, True
                    yield document
                self.place, self.row = self.place + 1, 0
            if not found:
                raise UserError(f"data: '{self.settings.path}' holds no text: every document is empty")
            self.epoch, self.place = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"files": self.files, "epoch": self.epoch, "place": self.place, "row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["files"] != self.files:
            raise UserError(
                f"data: the files of '{self.settings.path}' are not those of the checkpoint; "
                "put them back as they were, or start another run"
            )
        self.epoch, self.place, self.row = state["epoch"], state["place"], state["row"]
        self._rows = self._read()


class Loader:
    """Endless training batches.

    Documents are drawn from the sources by weight, cut into pieces, shuffled, patched where there is a patcher, and
    packed. `state_dict` holds all that the next batch depends on, the shuffle buffer too.
    """

    def __init__(self, settings: DataSettings, seed: int, patcher: Patcher | None = None):
        self.settings = settings
        self.patcher = patcher
        self.readers = [SourceReader(source, seed) for source in settings.train]
        weights = np.array([source.weight for source in settings.train])
        self.shares = weights / weights.sum()
        self.random = np.random.default_rng(seed)
        self.buffer: list[Piece] = []
        self.ready: deque[Piece] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        settings = self.settings
        pieces = take(self.ready, settings.batch_bytes, settings.batch_patches, self._prepare)
        return pack(pieces, settings.batch_bytes, settings.batch_patches)

    def _prepare(self) -> bool:
        """Move about a batch of pieces, patched, from the shuffle buffer to `ready`."""
        pieces, size = [], 0
        while size < self.settings.batch_bytes:
            while len(self.buffer) < self.settings.shuffle_buffer:
                source = int(self.random.choice(len(self.readers), p=self.shares))
                self.buffer.extend(cut(next(self.readers[source]), self.settings.context))
            at = int(self.random.integers(len(self.buffer)))
            self.buffer[at], self.buffer[-1] = self.buffer[-1], self.buffer[at]
            pieces.append(self.buffer.pop())
            size += len(pieces[-1])
        self.ready.extend(self.patcher(pieces) if self.patcher else pieces)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "readers": [reader.state_dict() for reader in self.readers],
            "random": self.random.bit_generator.state,
            "buffer": [_piece_state(piece) for piece in self.buffer],
            "ready": [_piece_state(piece) for piece in self.ready],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["readers"]) != len(self.readers):
            raise UserError("data: the number of sources is not that of the checkpoint; start another run")
        for reader, reader_state in zip(self.readers, state["readers"], strict=True):
            reader.load_state_dict(reader_state)
        self.random.bit_generator.state = state["random"]
        self.buffer = [Piece(**piece) for piece in state["buffer"]]
        self.ready = deque(Piece(**piece) for piece in state["ready"])


def batches_once(
    sources: list[SourceSettings],
    context: int,
    batch_bytes: int,
    patcher: Patcher | None = None,
    max_bytes: int | None = None,
) -> Iterator[Batch]:
    """The sources' documents once, in order, unpadded: for validation.

    Args:
        max_bytes: stop after about as much text.
    """
    documents = (
        document
        for source in sources
        for file in find_files(source.path)
        for _, document in read_documents(file, source.text_key)
    )
    ready: deque[Piece] = deque()
    num_bytes = 0

    def more() -> bool:
        nonlocal num_bytes
        pieces, size = [], 0
        while size < batch_bytes and (max_bytes is None or num_bytes < max_bytes):
            document = next(documents, None)
            if document is None:
                break
            text = document.text if max_bytes is None else document.text[: max_bytes - num_bytes]
            entropies = None if document.entropies is None else document.entropies[: len(text) + 1]
            pieces.extend(cut(Document(text, entropies), context))
            num_bytes += len(text)
            size += len(text)
        ready.extend(patcher(pieces) if patcher else pieces)
        return bool(ready)

    while pieces := take(ready, batch_bytes, None, more):
        yield pack(pieces)


def _piece_state(piece: Piece) -> dict[str, np.ndarray]:
    values = {"ids": piece.ids, "entropies": piece.entropies, "next_starts": piece.next_starts}
    return {name: value for name, value in values.items() if value is not None}
