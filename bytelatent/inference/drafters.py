"""What guesses the next bytes without the global transformer, for the whole model to verify.

The byte LM knows when it is unsure: its drafts end with the first byte of a new patch. The local models, which read
bytes anyway, go on past the border of a patch with what the newest closed one told them.

Source: arXiv 2605.08044 for drafts by the local models; those by the byte LM are this project's.
"""

from typing import Protocol

import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.state import DecodeState
from bytelatent.model import ByteLM, entropies

# Shapes: T rows that are read in, V vocabulary


class Drafter(Protocol):
    """Says what may follow, an id at a time."""

    def read(self, state: DecodeState, rows: Tensor, ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Read one id in some rows, ahead of the whole model.

        Args:
            rows, ids, position: [T]; positions follow on one another from call to call.

        Returns:
            The logits of what follows, float32 [T, V]; and whether to go on after that, bool [T].
        """
        ...


class ByteLMDrafter:
    """Drafts by the byte LM.

    Args:
        bound: nats; what is less sure than that is the draft's last byte. None: where a patch would begin.

    Raises:
        UserError: the model's patches need no byte LM.
    """

    def __init__(self, decoder: Decoder, bound: float | None = None):
        if decoder.byte_lm is None or decoder.patching is None or decoder.patching.threshold is None:
            raise UserError("speculation: it drafts with the byte LM, which this model's patches do not need")
        self.decoder = decoder
        self.bound = decoder.patching.threshold if bound is None else bound

    def read(self, state: DecodeState, rows: Tensor, ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.decoder.read_byte_lm(state, rows, ids, position)
        return logits, entropies(logits) <= self.bound


class LocalDrafter:
    """Drafts by the local encoder and decoder, over the borders of patches.

    Raises:
        UserError: the model has no such parts.
    """

    def __init__(self, decoder: Decoder):
        if isinstance(decoder.model, ByteLM):
            raise UserError("speculation: it drafts with a BLT's encoder and decoder, which a byte LM does not have")
        self.decoder = decoder

    def read(self, state: DecodeState, rows: Tensor, ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.decoder.read_local(state, rows, ids, position)
        return logits, torch.ones_like(rows, dtype=torch.bool)
