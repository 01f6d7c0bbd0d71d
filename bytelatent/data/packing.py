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
from bytelatent.text.documents import warn_once
from bytelatent.vocab import BYTES, OFFSET, Vocabulary

# Shapes: N ids a piece reads, T ids in the batch, P patches


@dataclass(frozen=True)
class Piece:
    """A part of a document: N ids to read, the id that follows each of them, and what is known of its patches."""

    ids: np.ndarray  # [N + 1] of the vocabulary's dtype, read ids[:-1] and predict ids[1:]
    entropies: np.ndarray | None = None  # [N] float32 nats
    next_starts: np.ndarray | None = None  # [N] bool, whether the id that follows starts a patch
    counts: np.ndarray | None = None  # [N] bool, of a conversation: whether the id that follows counts in the loss

    def __len__(self) -> int:
        return len(self.ids) - 1

    def split(self, at: int) -> tuple["Piece", "Piece"]:
        """The first `at` ids to read, and the rest. Every id is still predicted exactly once."""

        def part(values: np.ndarray | None, where: slice) -> np.ndarray | None:
            return None if values is None else values[where]

        head, tail = slice(None, at), slice(at, None)
        return (
            Piece(
                self.ids[: at + 1], *(part(values, head) for values in (self.entropies, self.next_starts, self.counts))
            ),
            Piece(self.ids[at:], *(part(values, tail) for values in (self.entropies, self.next_starts, self.counts))),
        )


def split_document(document: Document, context: int, vocabulary: Vocabulary = BYTES) -> Iterator[Piece]:
    """A document's pieces of at most `context` ids to read.

    A conversation is cut between exchanges, each piece with its system message, where these are not too long; pieces in
    which nothing counts are left out.
    """
    if document.chat is None:
        rest = Piece(vocabulary.encode(document.text).astype(vocabulary.dtype), document.entropies, document.starts)
        yield from _cut(rest, context)
        return
    for ids, counts in document.chat.within(context, vocabulary):
        pieces = _cut(Piece(ids.astype(vocabulary.dtype), counts=counts[1:]), context)
        yield from (piece for piece in pieces if piece.counts is not None and piece.counts.any())


def _cut(rest: Piece, context: int) -> Iterator[Piece]:
    while len(rest) > context:
        piece, rest = rest.split(context)
        yield piece
    yield rest


def warn_of_cuts(path: str, context: int) -> None:
    """Say once that a source has conversations of more ids than a piece may hold."""
    warn_once(
        f"data: '{path}' holds conversations longer than data.context={context}: they are cut between exchanges, each "
        "part with the system message, and an exchange that is longer within it"
    )


def stream_of(pieces: Sequence[Piece], device: torch.device | str = "cpu") -> Stream:
    """The ids that the pieces read, packed."""
    return pack_rows([torch.from_numpy(piece.ids[:-1].astype(np.int64)) for piece in pieces]).to(device)


@dataclass(frozen=True)
class Batch:
    """What a model reads and what it should predict."""

    stream: Stream  # a PatchedStream where there are patches
    targets: Tensor  # [T] the id that follows each id; -100 for padding, and for what does not count in conversations
    num_targets: int  # that count
    num_bytes: int  # of text that is read
    num_patches: int  # that hold a byte; BOS is a patch of its own, which does not count. For a token LM: tokens
    counted_bytes: int | None = None  # of text in the targets that count; None: all of it

    @property
    def target_bytes(self) -> int:
        """Bytes of text in the targets that count: all but EOS."""
        return self.num_bytes if self.counted_bytes is None else self.counted_bytes

    @property
    def num_ids(self) -> int:
        """Ids that are read, without padding."""
        return int((self.stream.document >= 0).sum())

    def to(self, device: torch.device | str) -> "Batch":
        targets = self.targets.to(device, non_blocking=True)
        stream = self.stream.to(device, non_blocking=True)
        return replace(self, stream=stream, targets=targets)

    def pin_memory(self) -> "Batch":
        """Itself in memory from which a GPU copies while the host goes on, and which is not reused until it has."""
        return replace(self, stream=self.stream.pin_memory(), targets=self.targets.pin_memory())


def fill_batch(ready: deque[Piece], size: int, slots: int | None, more: Callable[[], bool]) -> list[Piece]:
    """Take pieces from `ready` until a batch is full. The last one is cut to fit; its rest stays in `ready`.

    A conversation is not cut: if it does not fit, the first piece that does goes before it, or else the batch ends.

    Args:
        ready: pieces in order; patched, where there is a limit on patches.
        size: T.
        slots: P, one of which is for padding; None for no limit.
        more: appends to `ready`; False if there is nothing left to append.
    """
    taken: list[Piece] = []
    bytes_left, patches_left = size, None if slots is None else slots - 1
    while bytes_left > 0 and (ready or more()):
        fits, at = _fits(ready[0], bytes_left, patches_left), 0
        if fits < len(ready[0]) and ready[0].counts is not None and taken:
            room = ((_fits(piece, bytes_left, patches_left), n, piece) for n, piece in enumerate(ready))
            whole = ((fits, n) for fits, n, piece in room if fits == len(piece) or piece.counts is None)
            fits, at = next(whole, (0, 0))
        if fits == 0:
            break
        piece = ready[at]
        del ready[at]
        if fits < len(piece):
            piece, rest = piece.split(fits)
            ready.insert(at, rest)
        if patches_left is not None:
            assert piece.next_starts is not None
            patches_left -= 1 + int(piece.next_starts[:-1].sum())
        bytes_left -= fits
        taken.append(piece)
    return taken


def _fits(piece: Piece, bytes_left: int, patches_left: int | None) -> int:
    """How many of a piece's ids have room."""
    fits = min(len(piece), bytes_left)
    if patches_left is None:
        return fits
    assert piece.next_starts is not None
    patches = 1 + np.concatenate([[0], np.cumsum(piece.next_starts[: fits - 1])])
    return int(np.searchsorted(patches, patches_left, side="right"))


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
    num_ids, num_bytes = len(targets), int(bytes_of.sum())
    num_targets, counted_bytes = num_ids, None
    if any(piece.counts is not None for piece in pieces):
        counts = np.concatenate([np.ones(len(p), bool) if p.counts is None else p.counts for p in pieces])
        targets = torch.where(torch.from_numpy(counts), targets, IGNORED)
        num_targets, counted_bytes = int(counts.sum()), int(bytes_of[counts].sum())
    padding = 0 if size is None else size - num_ids
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
    return Batch(stream, targets, num_targets, num_bytes, num_patches, counted_bytes)


def _pad(values: Tensor, padding: int, filler: Tensor) -> Tensor:
    assert len(filler) == padding
    return torch.cat([values, filler.to(values.dtype)])
