"""Rows of ids padded at either end, and how they lie in a packed stream, where each row is a document."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bytelatent.model.stream import PatchedStream, Stream

# Shapes: B rows, N ids in a row, T ids in the stream, P patches in it, L places in a row


@dataclass(frozen=True)
class Layout:
    """Where in padded rows the values of a stream belong: those of its ids, or those of its patches."""

    row: Tensor  # [T] int64
    column: Tensor  # [T] int64
    shape: tuple[int, int]  # B, L

    def put(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[T, ...] -> [B, L, ...], with `fill` at padding. Gradients pass through it."""
        out = values.new_full((*self.shape, *values.shape[1:]), fill)
        out[self.row, self.column] = values
        return out

    def take(self, values: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]."""
        return values[self.row, self.column]

    @cached_property
    def is_real(self) -> Tensor:
        """Which places hold a value, bool [B, L]."""
        return self.put(torch.ones_like(self.row, dtype=torch.bool))


@dataclass(frozen=True)
class Rows:
    """
    Attributes:
        ids: [B, N] int64; any at padding.
        is_real: [B, N] bool, False at padding, which is at the ends of rows.
    """

    ids: Tensor
    is_real: Tensor

    @cached_property
    def layout(self) -> Layout:
        """Of the ids of the stream."""
        row, column = self.is_real.nonzero(as_tuple=True)
        return Layout(row, column, (self.ids.shape[0], self.ids.shape[1]))

    def layout_of_patches(self, batch: PatchedStream) -> Layout:
        rows_with_ids = self.is_real.any(1).nonzero()[:, 0]
        longest = int(batch.patch_position.max()) + 1 if batch.num_patches else 0
        return Layout(rows_with_ids[batch.patch_document], batch.patch_position, (self.ids.shape[0], longest))

    @cached_property
    def stream(self) -> Stream:
        """Rows without ids are left out."""
        position = (self.is_real.cumsum(1) - 1)[self.is_real]
        document = (position == 0).cumsum(0) - 1
        return Stream(self.ids[self.is_real], document, position, num_documents=len(self.ids))
