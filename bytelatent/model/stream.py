"""Packed batches: documents end to end in one flat stream.

A batch is T ids and P patch slots, both of any size; where shapes must not change they are padded, the bytes with
document -1 and the patches likewise. Positions restart in each document, and nothing crosses from one to another.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Self

import torch
from torch import Tensor

from bytelatent.vocab import BOS, NEWLINE

# Shapes: T ids in the stream, P patches


@dataclass(frozen=True)
class Stream:
    """Ids of packed documents."""

    ids: Tensor  # [T] int64
    document: Tensor  # [T] int64, -1: padding
    position: Tensor  # [T] int64, 0 at each document's start
    num_documents: int | None = field(default=None, kw_only=True)  # at most, and padding at the end; None: any number

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What of it lies on a device, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in self.tensors.items()})

    def pin_memory(self) -> Self:
        return replace(self, **{k: v.pin_memory() for k, v in self.tensors.items()})


@dataclass(frozen=True)
class PatchedStream(Stream):
    """A stream cut into patches."""

    patch: Tensor  # [T] int64, the patch an id is in
    read: Tensor  # [T] int64, the patch an id reads: the newest one closed once it is read; -1: none yet
    patch_document: Tensor  # [P] int64, -1: an unused slot
    patch_position: Tensor  # [P] int64, 0 at each document's first patch
    history: Tensor  # [T] int64, ids before this one that n-gram hashes reach where they do not stop at documents

    @property
    def num_patches(self) -> int:
        return self.patch_document.shape[0]


def pack_rows(rows: list[Tensor]) -> Stream:
    """A stream of rows of ids, each a document."""
    sizes = torch.tensor([len(row) for row in rows], dtype=torch.long)
    ids = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    document = torch.repeat_interleave(torch.arange(len(rows)), sizes)
    position = torch.cat([torch.arange(len(row)) for row in rows]) if rows else document
    return Stream(ids, document.to(ids.device), position.to(ids.device), num_documents=len(rows))


def lines_as_documents(stream: Stream) -> Stream:
    """The stream of a byte LM whose context is reset at newlines: each newline is the BOS of a document of its own.

    So what is predicted from a newline on is what is predicted of the text after it alone.
    """
    is_newline = stream.ids == NEWLINE
    begins = is_newline | (stream.position == 0)
    index = torch.arange(len(begins), device=begins.device)
    first = torch.where(begins, index, 0).cummax(0).values
    document = torch.where(stream.document < 0, -1, begins.cumsum(0) - 1)
    return Stream(torch.where(is_newline, BOS, stream.ids), document, index - first)


def add_patches(
    stream: Stream, next_starts: Tensor, num_patches: int | None = None, history: Tensor | None = None
) -> PatchedStream:
    """Cut a stream into patches.

    Args:
        next_starts: bool [T], whether the id after each id starts a patch; a document's first id always does.
        num_patches: patch slots, at least as many as there are patches; None for exactly as many.
        history: [T] ids before each one in the row it came from, which n-grams reach unless they stop at documents.
            None: each document is a row of its own. A row of several documents end to end, as the published training
            reads them, is `torch.arange(T)`.
    """
    is_first = stream.position == 0
    follows = torch.cat([torch.zeros_like(next_starts[:1]), next_starts[:-1]])
    patch = (is_first | follows).cumsum(0) - 1
    if num_patches is None:
        num_patches = int(patch[-1]) + 1 if len(patch) else 0
    first_of_document = torch.where(is_first, patch, 0).cummax(0).values
    newest_closed = torch.where(next_starts, patch, patch - 1)
    read = torch.where(newest_closed < first_of_document, -1, newest_closed)
    patch_document = torch.full([num_patches], -1, dtype=torch.long, device=patch.device)
    patch_position = torch.zeros([num_patches], dtype=torch.long, device=patch.device)
    return PatchedStream(
        ids=stream.ids,
        document=stream.document,
        position=stream.position,
        patch=patch,
        read=read,
        patch_document=patch_document.scatter(0, patch, stream.document),
        patch_position=patch_position.scatter(0, patch, patch - first_of_document),
        history=stream.position if history is None else history,
        num_documents=stream.num_documents,
    )
