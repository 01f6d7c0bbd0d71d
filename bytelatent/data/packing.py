"""Documents cut into pieces, and pieces packed into batches."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.model.loss import IGNORED
from bytelatent.model.stream import Stream, add_patches, pack_rows
from bytelatent.text import Document
from bytelatent.vocab import BYTES, OFFSET, Vocabulary

# Shapes: N ids a piece reads, T ids in the batch, P patches


@dataclass(frozen=True)
class Piece:
    """A part of a document: N ids to read, the id that follows each of them, and what is known of its patches."""

    ids: np.ndarray  # [N + 1] of the vocabulary's dtype, read ids[:-1] and predict ids[1:]
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


def split_document(document: Document, context: int, vocabulary: Vocabulary = BYTES) -> Iterator[Piece]:
    """A document's pieces of at most `context` ids to read."""
    rest = Piece(vocabulary.encode(document.text).astype(vocabulary.dtype), document.entropies, document.starts)
    while len(rest) > context:
        piece, rest = rest.split(context)
        yield piece
    yield rest


def stream_of(pieces: Sequence[Piece], device: torch.device | str = "cpu") -> Stream:
    """The ids that the pieces read, packed."""
    return pack_rows([torch.from_numpy(piece.ids[:-1].astype(np.int64)) for piece in pieces]).to(device)


@dataclass(frozen=True)
class Batch:
    """What a model reads and what it should predict."""

    stream: Stream  # a PatchedStream where there are patches
    targets: Tensor  # [T] the id that follows each id; -100 for padding
    num_targets: int
    num_bytes: int  # of text in the targets: all but EOS
    num_patches: int  # that hold a byte; BOS is a patch of its own, which does not count. For a token LM: tokens

    def to(self, device: torch.device | str) -> "Batch":
        targets = self.targets.to(device, non_blocking=True)
        stream = self.stream.to(device, non_blocking=True)
        return replace(self, stream=stream, targets=targets)

    def pin_memory(self) -> "Batch":
        """Itself in memory from which a GPU copies while the host goes on, and which is not reused until it has."""
        return replace(self, stream=self.stream.pin_memory(), targets=self.targets.pin_memory())


def fill_batch(ready: deque[Piece], size: int, slots: int | None, more: Callable[[], bool]) -> list[Piece]:
    """Take pieces from `ready` until a batch is full. The last one is cut to fit; its rest stays in `ready`.

    Args:
        ready: pieces in order; patched, where there is a limit on patches.
        size: T.
        slots: P, one of which is for padding; None for no limit.
        more: appends to `ready`; False if there is nothing left to append.
    """
    taken: list[Piece] = []
    bytes_left, patches_left = size, None if slots is None else slots - 1
    while bytes_left > 0 and (ready or more()):
        piece = ready.popleft()
        fits = min(len(piece), bytes_left)
        if patches_left is not None:
            assert piece.next_starts is not None
            patches = 1 + np.concatenate([[0], np.cumsum(piece.next_starts[: fits - 1])])
            fits = int(np.searchsorted(patches, patches_left, side="right"))
        if fits == 0:
            ready.appendleft(piece)
            break
        if fits < len(piece):
            piece, rest = piece.split(fits)
            ready.appendleft(rest)
        if patches_left is not None:
            assert piece.next_starts is not None
            patches_left -= 1 + int(piece.next_starts[:-1].sum())
        bytes_left -= fits
        taken.append(piece)
    return taken


def pack(
    pieces: list[Piece],
    size: int | None = None,
    slots: int | None = None,
    as_one_row: bool = False,
    vocabulary: Vocabulary = BYTES,
) -> Batch:
    """A batch of pieces.

    Args:
        pieces: what is read; patched or not, all alike.
        size: T, filled up with padding; None for as many ids as there are.
        slots: P likewise.
        as_one_row: let n-grams that do not stop at documents reach from a piece into the one before, as in the training
            of the published models; otherwise each is read as if it were alone.
        vocabulary: of the ids.

    Raises:
        UserError: there are no pieces.
    """
    if not pieces:
        raise UserError("data: there is no text to read: every document is empty")
    stream = stream_of(pieces)
    target_ids = np.concatenate([piece.ids[1:] for piece in pieces]).astype(np.int64)
    targets, bytes_of = torch.from_numpy(target_ids), vocabulary.id_bytes[target_ids]
    num_targets, num_bytes = len(targets), int(bytes_of.sum())
    padding = 0 if size is None else size - num_targets
    if padding:
        stream = Stream(
            ids=_pad(stream.ids, padding, torch.zeros(padding)),
            document=_pad(stream.document, padding, torch.full([padding], -1)),
            position=_pad(stream.position, padding, torch.arange(padding)),
            num_documents=stream.num_documents,
        )
        targets = _pad(targets, padding, torch.full([padding], IGNORED))
    num_patches = int((bytes_of > 0).sum()) if vocabulary.is_tokens else 0
    if all(piece.next_starts is not None for piece in pieces):
        starts = torch.from_numpy(np.concatenate([p.next_starts for p in pieces if p.next_starts is not None]))
        if padding:
            starts = torch.cat([starts, torch.zeros(padding, dtype=torch.bool)])
        stream = add_patches(stream, starts, slots, torch.arange(len(starts)) if as_one_row else None)
        with_bytes = stream.patch[stream.ids >= OFFSET]  # in rising order
        num_patches = int((with_bytes[1:] != with_bytes[:-1]).sum()) + (len(with_bytes) > 0)
    return Batch(stream, targets, num_targets, num_bytes, num_patches)


def _pad(values: Tensor, padding: int, filler: Tensor) -> Tensor:
    assert len(filler) == padding
    return torch.cat([values, filler.to(values.dtype)])
