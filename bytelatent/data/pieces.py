"""Documents cut into pieces that fit a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from bytelatent.data.documents import Document
from bytelatent.errors import UserError
from bytelatent.model import ByteLM, Stream, pack_rows
from bytelatent.patching import PatchSettings, next_starts
from bytelatent.vocab import encode

# Shapes: N ids a piece reads


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
    rest = Piece(encode(document.text).astype(np.uint16), document.entropies)
    while len(rest) > context:
        piece, rest = rest.split(context)
        yield piece
    yield rest


def stream_of(pieces: Sequence[Piece], device: torch.device | str = "cpu") -> Stream:
    """The ids that the pieces read, packed."""
    return pack_rows([torch.from_numpy(piece.ids[:-1].astype(np.int64)) for piece in pieces]).to(device)


class Patcher:
    """Finds where patches start: from a rule alone, from stored entropies, or from the frozen byte LM.

    Args:
        settings: the rule.
        byte_lm: gives the entropies; None where the rule needs none or they are stored with the text.
        dtype: precision the byte LM runs in.
    """

    def __init__(self, settings: PatchSettings, byte_lm: ByteLM | None = None, dtype: torch.dtype = torch.float32):
        self.settings = settings
        self.byte_lm = byte_lm
        self.dtype = dtype
        self.device = next(byte_lm.parameters()).device if byte_lm is not None else torch.device("cpu")

    def __call__(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces with their entropies (where the rule needs them) and patch starts."""
        if not pieces:
            return []
        stream = stream_of(pieces, self.device)
        entropies = self._entropies(pieces, stream) if self.settings.needs_entropies else None
        starts = next_starts(stream.ids, entropies, stream.position, self.settings)
        ends = np.cumsum([len(piece) for piece in pieces])[:-1]
        starts_of = np.split(starts.cpu().numpy(), ends)
        if entropies is None:
            return [replace(p, next_starts=s) for p, s in zip(pieces, starts_of, strict=True)]
        entropies_of = np.split(entropies.cpu().numpy(), ends)
        return [replace(p, entropies=e, next_starts=s) for p, e, s in zip(pieces, entropies_of, starts_of, strict=True)]

    def _entropies(self, pieces: Sequence[Piece], stream: Stream) -> torch.Tensor:
        if self.byte_lm is not None:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return self.byte_lm.entropies(stream)
        stored = [piece.entropies for piece in pieces if piece.entropies is not None]
        if len(stored) < len(pieces):
            raise UserError("data: patching by entropy needs a byte LM or entropies stored beside every text")
        return torch.from_numpy(np.concatenate(stored))
