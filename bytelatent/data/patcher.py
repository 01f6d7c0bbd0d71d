"""Pieces cut into patches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from bytelatent.data.pieces import Piece, cut, stream_of
from bytelatent.device import autocast
from bytelatent.errors import UserError
from bytelatent.model import ByteLM, Stream
from bytelatent.patching import Patch, PatchSettings, next_starts
from bytelatent.text import Document

GROUP = 32_768  # ids the byte LM reads at once where a whole text is patched


class Patcher:
    """Finds where patches start: stored with the text, from stored entropies, from a rule alone, or by the byte LM.

    Args:
        settings: the rule.
        byte_lm: gives the entropies, frozen; None where the rule needs none or they are stored with the text.
        dtype: precision the byte LM runs in.
        fingerprint: the byte LM's, which stored entropies must bear; None to take those of any byte LM.
        entropies_of: computes the byte LM's entropies of a stream in its place.
    """

    def __init__(
        self,
        settings: PatchSettings,
        byte_lm: ByteLM | None = None,
        dtype: torch.dtype = torch.float32,
        fingerprint: str | None = None,
        entropies_of: Callable[[Stream], torch.Tensor] | None = None,
    ):
        self.settings = settings
        self.byte_lm = byte_lm
        self.dtype = dtype
        self.fingerprint = fingerprint
        self.entropies_of = entropies_of
        self.device = next(byte_lm.parameters()).device if byte_lm is not None else torch.device("cpu")

    def __call__(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with their patch starts, and with their entropies where the rule needs them."""
        missing = [piece for piece in pieces if piece.next_starts is None]
        stored = [piece for piece in missing if self._without_byte_lm(piece)]
        others = [piece for piece in missing if not self._without_byte_lm(piece)]
        found = {id(before): after for before, after in zip(stored, self._patched(stored), strict=True)}
        found |= {id(before): after for before, after in zip(others, self._patched(others), strict=True)}
        return [found.get(id(piece), piece) for piece in pieces]

    def early(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces as they are to be kept until they are packed: patched where that needs no byte LM."""
        ready = [piece for piece in pieces if piece.next_starts is None and self._without_byte_lm(piece)]
        found = {id(before): after for before, after in zip(ready, self._patched(ready), strict=True)}
        return [replace(found.get(id(piece), piece), entropies=None) for piece in pieces]

    def without_byte_lm(self) -> "Patcher":
        """One that another process can have: it does only what `early` does."""
        return Patcher(self.settings)

    def _without_byte_lm(self, piece: Piece) -> bool:
        return not self.settings.needs_entropies or piece.entropies is not None

    def _patched(self, pieces: Sequence[Piece]) -> list[Piece]:
        if not pieces:
            return []
        stream = stream_of(pieces)
        entropies = None
        if self.settings.needs_entropies:
            if all(piece.entropies is not None for piece in pieces):
                entropies = torch.from_numpy(np.concatenate([p.entropies for p in pieces if p.entropies is not None]))
            else:
                stream = stream.to(self.device)
                entropies = self._entropies(stream)
        starts = next_starts(stream.ids, entropies, stream.position, self.settings)
        ends = np.cumsum([len(piece) for piece in pieces])[:-1]
        starts_of = np.split(starts.cpu().numpy(), ends)
        if entropies is None:
            return [replace(p, next_starts=s) for p, s in zip(pieces, starts_of, strict=True)]
        entropies_of = np.split(entropies.cpu().numpy(), ends)
        return [replace(p, entropies=e, next_starts=s) for p, e, s in zip(pieces, entropies_of, starts_of, strict=True)]

    def _entropies(self, stream: Stream) -> torch.Tensor:
        if self.byte_lm is None:
            raise UserError(
                "data: patching by entropy needs a byte LM or entropies stored beside every text; "
                "name the byte LM: --model of blt calibrate, or entropy_model= in training"
            )
        if self.entropies_of is not None:
            return self.entropies_of(stream)
        with autocast(self.device, self.dtype):
            return self.byte_lm.entropies(stream)


def patch_in_groups(patcher: Patcher, pieces: Sequence[Piece]) -> list[Piece]:
    """Patch any number of pieces, a group at a time, so that the byte LM's memory is bounded."""
    return [piece for group in groups_of(pieces, GROUP) for piece in patcher(group)]


def groups_of(pieces: Iterable[Piece], num_ids: int) -> Iterator[list[Piece]]:
    """The pieces in order, in groups that hold `num_ids` ids or a little more; the last one may be smaller."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= num_ids:
            yield group
            group, size = [], 0
    if group:
        yield group


def patches_of(text: bytes, patcher: Patcher, context: int | None = None) -> list[Patch]:
    """The patches of a text, for people to look at. BOS, which stands alone before the text, is left out.

    Args:
        context: ids read at once, without those before them; None: all.
    """
    if not text:
        return []
    pieces = patch_in_groups(patcher, list(cut(Document(text), context or len(text) + 1)))
    starts = np.concatenate([piece.next_starts for piece in pieces if piece.next_starts is not None])
    starts[np.cumsum([len(piece) for piece in pieces]) - 1] = True  # whatever was expected, a piece begins with a patch
    begins = [0, *(int(at) for at in np.flatnonzero(starts[1 : len(text)]) + 1)]
    entropies = [e for piece in pieces if piece.entropies is not None for e in piece.entropies.tolist()]
    return [
        Patch(
            start,
            end,
            text[start:end].decode("utf-8", errors="replace"),
            entropies[start:end] if patcher.settings.needs_entropies else None,
        )
        for start, end in zip(begins, [*begins[1:], len(text)], strict=True)
    ]
