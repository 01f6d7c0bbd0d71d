"""Rows of several texts end to end, as trainers pack them: `position_ids` begin at 0 in each."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bytelatent.blt.forward import checked_mask
from bytelatent.errors import UserError
from bytelatent.vocab import PADDING

# Shapes: B rows, N ids in a row, T of them are text, R texts, L ids of the longest


@dataclass(frozen=True)
class PackedTexts:
    """Where the texts of packed rows are.

    Attributes:
        is_text: [B, N] bool, False at padding.
        begins: [B, N] bool, the first id of each text.
        text, place: [T] the text that an id belongs to, and its place there.
    """

    is_text: Tensor
    begins: Tensor
    text: Tensor
    place: Tensor

    @classmethod
    def of(cls, position_ids: Tensor, attention_mask: Tensor | None, shape: torch.Size) -> "PackedTexts":
        """Find them.

        Raises:
            UserError: positions do not count up from 0.
        """
        if position_ids.shape[-1] != shape[1] or position_ids.dim() != 2:
            raise UserError(f"position_ids: {list(position_ids.shape)} for ids {list(shape)}; they should be the same")
        positions = position_ids.expand(shape)
        is_text = torch.ones_like(positions, dtype=torch.bool)
        if attention_mask is not None:
            is_text = checked_mask("forward", attention_mask, shape)
        begins = is_text & (positions == 0)
        place = positions[is_text]
        row = is_text.nonzero()[:, 0]
        continues = (place[1:] == place[:-1] + 1) & (row[1:] == row[:-1])
        is_counted = torch.cat([place[:1] == 0, (place[1:] == 0) | continues])
        if not bool(is_counted.all()):
            raise UserError("position_ids: they should count up from 0 in each text of a row; leave them out")
        return cls(is_text, begins, begins[is_text].cumsum(0) - 1, place)

    def rows(self, input_ids: Tensor) -> Tensor:
        """The texts as rows of their own, [R, L], padded at the right with -1."""
        shape = (int(self.text[-1]) + 1, int(self.place.max()) + 1) if len(self.text) else (0, 0)
        rows = input_ids.new_full(shape, PADDING)
        rows[self.text, self.place] = input_ids[self.is_text]
        return rows

    def packed(self, values: Tensor) -> Tensor:
        """Values of the texts' ids [R, L, ...] where the ids were, [B, N, ...]; 0 at padding."""
        found = values.new_zeros(*self.is_text.shape, *values.shape[2:])
        found[self.is_text] = values[self.text, self.place]
        return found
