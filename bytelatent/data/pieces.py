"""Documents cut into pieces that fit a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bytelatent.model import Stream, pack_rows
from bytelatent.text import Document
from bytelatent.vocab import encode

# Shapes: N ids a piece reads

ID_BYTES = 2  # of `Piece.ids`


@dataclass(frozen=True)
class Piece:
    """N ids to read, the id that follows each of them, and what is known of its patches."""

    ids: np.ndarray  # [N + 1] uint16, read ids[:-1] and predict ids[1:]
    entropies: np.ndarray | None = None  # [N] float32 nats
    next_starts: np.ndarray | None = None  # [N] bool, whether the id that follows starts a patch

    def __len__(self) -> int:
        return len(self.ids) - 1

    def split(self, at: int) -> tuple["Piece", "Piece"]:
        """The first `at` ids to read, and the rest. Every id is still predicted exactly once."""

        def part(values: np.ndarray | None, where: slice) -> np.ndarray | None:
            return None if values is None else values[where]

        head, tail = slice(None, at), slice(at, None)
        return (
            Piece(self.ids[: at + 1], part(self.entropies, head), part(self.next_starts, head)),
            Piece(self.ids[at:], part(self.entropies, tail), part(self.next_starts, tail)),
        )


def cut(document: Document, context: int) -> Iterator[Piece]:
    """A document's pieces of at most `context` ids to read."""
    rest = Piece(encode(document.text).astype(np.uint16), document.entropies, document.starts)
    while len(rest) > context:
        piece, rest = rest.split(context)
        yield piece
    yield rest


def stream_of(pieces: Sequence[Piece], device: torch.device | str = "cpu") -> Stream:
    """The ids that the pieces read, packed."""
    return pack_rows([torch.from_numpy(piece.ids[:-1].astype(np.int64)) for piece in pieces]).to(device)
