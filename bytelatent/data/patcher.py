"""Where patches start in pieces of text, and whether what is stored with a text fits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from bytelatent.data.packing import Piece, split_document, stream_of
from bytelatent.device import autocast
from bytelatent.errors import UserError
from bytelatent.model import ByteLM, Stream, lines_as_documents
from bytelatent.patching import Patch, PatchSettings, next_starts
from bytelatent.text import Document, Stored

GROUP = 32_768  # ids the byte LM reads at once where a whole text is patched


class Patcher:
    """Finds where patches start: stored with the text, from entropies stored or of a byte LM, or from the ids alone.

    Args:
        settings: the patching mode and its settings.
        byte_lm: gives the entropies, frozen; None where the mode needs none or they are stored with the text.
        dtype: precision of the byte LM.
        fingerprint: the byte LM's; stored entropies must have the same. None takes those of any byte LM.
        entropies_of: computes the entropies of a stream in place of the byte LM's forward pass.
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
        """The pieces with their patch starts, and with their entropies where the mode needs them."""
        pieces = self._replaced(pieces, [p for p in pieces if p.next_starts is None and self._without_byte_lm(p)])
        return self._replaced(pieces, [piece for piece in pieces if piece.next_starts is None])

    def early(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces as they wait to be packed: patched where that needs no byte LM."""
        ready = [piece for piece in pieces if piece.next_starts is None and self._without_byte_lm(piece)]
        return [replace(piece, entropies=None) for piece in self._replaced(pieces, ready)]

    def without_byte_lm(self) -> "Patcher":
        """A patcher for another process: it does only what `early` does."""
        return Patcher(self.settings)

    def _without_byte_lm(self, piece: Piece) -> bool:
        return not self.settings.needs_entropies or piece.entropies is not None

    def _replaced(self, pieces: Sequence[Piece], some: list[Piece]) -> list[Piece]:
        """The pieces, some of them patched."""
        found = {id(before): after for before, after in zip(some, self._patched(some), strict=True)}
        return [found.get(id(piece), piece) for piece in pieces]

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
        if self.settings.reset_at_newline:
            stream = lines_as_documents(stream)
        if self.entropies_of is not None:
            return self.entropies_of(stream)
        with autocast(self.device, self.dtype):
            return self.byte_lm.entropies(stream)


class StoredCheck:
    """Complains about stored entropies or starts that another byte LM or other patching settings made.

    Args:
        patcher: what the run asks for; None for a model without patches, which takes only the text.
    """

    def __init__(self, patcher: Patcher | None):
        self.patcher = patcher if patcher is not None and patcher.settings.needs_entropies else None
        self._first: tuple[Stored, str] | None = None

    def __call__(self, stored: Stored, file: str) -> None:
        """Compare with the run's byte LM and patching settings, and with the files seen before.

        Raises:
            UserError: it names the file and what differs.
        """
        if self.patcher is None:
            return
        if self._first is None:
            self._compare(stored, file, self.patcher)
            self._first = stored, file
        first, first_file = self._first
        for name in ("byte_lm", "window", "dtype", "patching", "reset_at_newline"):
            here, there = getattr(stored, name), getattr(first, name)
            if here != there:
                raise UserError(
                    f"data: '{file}' and '{first_file}' were not made alike ({name}: {here} and {there}); "
                    "make them again with one byte LM: blt entropies"
                )

    def _compare(self, stored: Stored, file: str, patcher: Patcher) -> None:
        if patcher.fingerprint is not None and stored.byte_lm != patcher.fingerprint:
            raise UserError(
                f"data: '{file}' holds the entropies of another byte LM ({stored.byte_lm}; entropy_model is "
                f"{patcher.fingerprint}); name that one, or make them again: blt entropies"
            )
        if patcher.byte_lm is not None and stored.window != patcher.byte_lm.settings.window:
            window = patcher.byte_lm.settings.window
            raise UserError(
                f"data: '{file}' holds entropies of a window of {stored.window} ids; entropy_model has {window}"
            )
        if stored.patching is None and stored.reset_at_newline != patcher.settings.reset_at_newline:
            raise UserError(
                f"data: '{file}' holds entropies with reset_at_newline={stored.reset_at_newline}, and patching has "
                f"reset_at_newline={patcher.settings.reset_at_newline}; use that, or make them again: blt entropies"
            )
        if stored.patching is not None and (own := PatchSettings.parse(stored.patching, file)) != patcher.settings:
            raise UserError(
                f"data: '{file}' holds the patch starts of other patching settings ({_shown(own)}; patching is "
                f"{_shown(patcher.settings)}); use those, or store entropies: blt entropies"
            )


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
    """The patches of a text, to be shown; without BOS, which is a patch of its own.

    Args:
        context: ids read at once, without those before them; None for all.
    """
    if not text:
        return []
    pieces = patch_in_groups(patcher, list(split_document(Document(text), context or len(text) + 1)))
    starts = np.concatenate([piece.next_starts for piece in pieces if piece.next_starts is not None])
    starts[np.cumsum([len(piece) for piece in pieces]) - 1] = True  # a piece always begins with a patch
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


def _shown(settings: PatchSettings) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.plain().items() if value not in (None, False))
