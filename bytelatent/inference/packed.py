"""Whole packed streams read at a GPU's speed: the models with the blocks that read prompts, but no KV cache."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bytelatent.inference.step.packed_weights import CrossWeights, StackWeights
from bytelatent.inference.step.prefill import (
    PrefillDecoderCrossAttention,
    PrefillStack,
    RunAttention,
    can_run,
    with_modules,
)
from bytelatent.kernels.gated_product import ROWS
from bytelatent.kernels.patch_attention import ByteRanges
from bytelatent.kernels.rotary import cos_sin
from bytelatent.kernels.window_attention import first_seen
from bytelatent.model import BLTModel

__all__ = ["ROWS", "packed_form"]


class PackedStack(PrefillStack):
    """A stack in place of the model's own, with the same calls, that stores no keys and values."""

    SIZES = ()

    def mask(self, document: Tensor, num_documents: int | None) -> RunAttention:
        settings = self.settings
        place = torch.arange(len(document), device=document.device)
        is_first = F.pad(document[1:] != document[:-1], (1, 0), value=True)
        position = F.pad(place - torch.where(is_first, place, 0).cummax(0).values, (0, -len(document) % ROWS))
        cos, sin = cos_sin(position, settings.head_dim, settings.rope_theta, settings.rope_scaling)
        return RunAttention(first_seen(position, settings.window), cos, sin, lambda k_THE, v_THE: None)


class PackedDecoderCrossAttention(PrefillDecoderCrossAttention):
    def forward(self, h_TD: Tensor, keys_PKD: Tensor, read: ByteRanges) -> Tensor:
        return self.attend(h_TD, *self.keys_values(keys_PKD), read)


def packed_form(model: Any) -> Any:
    """The same model, faster, for packed streams of a multiple of `ROWS` ids; None where the kernels cannot run it.

    It shares or copies the weights as they are now.
    """
    parts = [model.encoder, model.global_transformer, model.decoder] if isinstance(model, BLTModel) else [model]
    like = next(model.parameters())
    if not all(can_run(part.stack.settings, like) for part in parts):
        return None
    fast = [with_modules(part, stack=_packed(part.stack)) for part in parts]
    if not isinstance(model, BLTModel):
        return fast[0]
    encoder, middle, decoder = fast
    cross = [PackedDecoderCrossAttention(model.settings, CrossWeights.of(own)) for own in decoder.cross_attention]
    decoder = with_modules(decoder, cross_attention=nn.ModuleList(cross))
    return with_modules(model, encoder=encoder, global_transformer=middle, decoder=decoder)


def _packed(stack: Any) -> PackedStack:
    return PackedStack(stack.settings, StackWeights.of(stack))
