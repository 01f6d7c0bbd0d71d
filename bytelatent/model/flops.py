"""What a model costs: parameters, and floating-point operations per byte, part by part.

Counted on the meta device from the real modules: a matrix costs two operations a weight each time it is used. Uses are
per byte or per patch; attention adds 4 * width * (keys seen). Hash tables are looked up: memory, no operations.
"""

from dataclasses import dataclass

import torch
from torch import nn

from bytelatent.model.block import Stack
from bytelatent.model.blt import BLTModel
from bytelatent.model.byte_lm import ByteLM
from bytelatent.model.patch_attention import CrossAttention
from bytelatent.model.settings import BLTSettings, ByteLMSettings, ModelSettings, StackSettings


@dataclass(frozen=True)
class PartCost:
    """One part of a model."""

    name: str
    num_parameters: int
    flops_per_byte: float  # of a forward pass; training costs three times as much


def costs(settings: ModelSettings, patch_bytes: float = 4.5, context: int = 8192) -> list[PartCost]:
    """The cost of each part.

    Args:
        patch_bytes: mean bytes a patch.
        context: bytes of a document seen at once, over which attention is averaged.
    """
    with torch.device("meta"):
        if isinstance(settings, ByteLMSettings):
            return _byte_lm(ByteLM(settings), context)
        return _blt(BLTModel(settings), settings, patch_bytes, context)


def _byte_lm(model: ByteLM, context: int) -> list[PartCost]:
    return [
        PartCost("embedding", _parameters(model.embedding), 0.0),
        PartCost("blocks", _parameters(model.stack), _stack(model.stack, context)),
        PartCost("output", _parameters(model.norm, model.output), _matrices(model.output)),
    ]


def _blt(model: BLTModel, settings: BLTSettings, patch_bytes: float, context: int) -> list[PartCost]:
    per_byte, per_patch, k = 1.0, 1.0 / patch_bytes, settings.cross_attention.k
    encoder, middle, decoder = model.encoder, model.global_transformer, model.decoder
    encoder_cross = _matrices(encoder.pooled_to_queries) * per_patch
    for cross in encoder.cross_attention:
        assert isinstance(cross, CrossAttention)
        encoder_cross += _matrices(cross.query, cross.output) * k * per_patch + _matrices(cross.key, cross.value)
        encoder_cross += 4 * settings.encoder.dim * k * per_byte
    decoder_cross = _matrices(decoder.patch_to_keys) * per_patch
    for cross in decoder.cross_attention:
        assert isinstance(cross, CrossAttention)
        decoder_cross += _matrices(cross.query, cross.output) + _matrices(cross.key, cross.value) * k * per_patch
        decoder_cross += 4 * settings.decoder.dim * k * per_byte
    middle_flops = (_matrices(middle.projection) + _stack(middle.stack, context / patch_bytes)) * per_patch
    parts = [
        PartCost("byte embedding", _parameters(encoder.embedding), 0.0),
        PartCost("local encoder", _parameters(encoder.stack), _stack(encoder.stack, context)),
        PartCost(
            "encoder cross-attention",
            _parameters(encoder.cross_attention, encoder.pooled_to_queries),
            encoder_cross,
        ),
        PartCost("global transformer", _parameters(middle), middle_flops),
        PartCost(
            "decoder cross-attention",
            _parameters(decoder.cross_attention, decoder.patch_to_keys),
            decoder_cross,
        ),
        PartCost("local decoder", _parameters(decoder.stack), _stack(decoder.stack, context)),
        PartCost("output", _parameters(decoder.norm, decoder.output), _matrices(decoder.output)),
    ]
    if encoder.ngram_hash is not None:
        parts.insert(1, PartCost("n-gram hash tables", _parameters(encoder.ngram_hash), 0.0))
    return parts


def _stack(stack: Stack, context: float) -> float:
    """Forward operations for one position of a stack."""
    return _matrices(stack) + stack.settings.num_layers * 4 * stack.settings.dim * keys_seen(stack.settings, context)


def keys_seen(settings: StackSettings, context: float) -> float:
    """Keys that causal attention sees, averaged over the positions 1..context."""
    if settings.window is None or settings.window >= context:
        return (context + 1) / 2
    window = settings.window
    return (window * (window + 1) / 2 + (context - window) * window) / context


def _parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _matrices(*modules: nn.Module) -> float:
    return 2.0 * sum(
        part.weight.numel() for module in modules for part in module.modules() if isinstance(part, nn.Linear)
    )
