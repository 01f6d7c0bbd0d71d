"""What a model costs: parameters, and floating-point operations per byte, part by part.

Counted on the meta device from the real modules: a matrix costs two operations a weight each time it is used. Uses are
per byte or per patch (in a token LM per token); attention adds 4 * (width of all heads) * (keys seen). Hash tables are
looked up: memory, no operations. Norms, biases, rotations, activations and softmax are not counted: they cost time by
what they read and write.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from bytelatent.model.block import Stack
from bytelatent.model.blt import BLTModel, build_model
from bytelatent.model.language_model import LanguageModel, TokenLM
from bytelatent.model.settings import ModelSettings, StackSettings

TABLES = "n-gram hash tables"  # the part that is memory


@dataclass(frozen=True)
class PartCost:
    """One part of a model."""

    name: str
    num_parameters: int
    flops_per_byte: float = 0.0  # of a forward pass; see `training_flops`
    of_attention: float = 0.0  # the share of them between queries, keys and values, where the mask lets them meet


def costs(settings: ModelSettings, patch_bytes: float = 4.5, context: int = 8192) -> list[PartCost]:
    """The cost of each part.

    Args:
        patch_bytes: mean bytes per patch, or per token of a token LM.
        context: bytes of a document seen at once, over which attention is averaged.
    """
    model = _without_values(type(settings), settings.model_dump_json())
    if isinstance(model, LanguageModel):
        return _language_model(model, patch_bytes if isinstance(model, TokenLM) else 1.0, context)
    return _blt(model, patch_bytes, context)


def flops_per_byte(settings: ModelSettings, patch_bytes: float = 4.5, context: int = 8192) -> float:
    """Operations of a forward pass, all parts together; the arguments are those of `costs`."""
    return sum(part.flops_per_byte for part in costs(settings, patch_bytes, context))


def training_flops(settings: ModelSettings, patch_bytes: float = 4.5, context: int = 8192) -> float:
    """Operations a byte in training: the backward pass has two products for each one of the forward pass.

    What a device may do beyond them (activation checkpointing computes almost all of the forward pass a second time;
    attention kernels compute weights again; the optimizer) is no use to the model, and utilisation does not count it.
    """
    return 3 * flops_per_byte(settings, patch_bytes, context)


@lru_cache(maxsize=8)  # a run asks again and again, with other patches
def _without_values(kind: type[ModelSettings], settings: str) -> LanguageModel | BLTModel:
    """A model on the meta device, by its settings as JSON, since lists in them have no hash."""
    parsed = kind.model_validate_json(settings)
    with torch.device("meta"):
        model = build_model(parsed)
    assert isinstance(model, LanguageModel | BLTModel)
    return model


def _language_model(model: LanguageModel, id_bytes: float, context: int) -> list[PartCost]:
    return [
        PartCost("embedding", _parameters(model.embedding)),
        _stack("blocks", model.stack, context / id_bytes, 1 / id_bytes),
        PartCost("output", _parameters(model.norm, model.output), _matrices(model.output) / id_bytes),
    ]


def _blt(model: BLTModel, patch_bytes: float, context: int) -> list[PartCost]:
    per_patch, k = 1.0 / patch_bytes, model.settings.states_per_patch
    encoder, middle, decoder = model.encoder, model.global_transformer, model.decoder
    stack = _stack("global transformer", middle.stack, context / patch_bytes, per_patch)
    stack = replace(
        stack,
        num_parameters=_parameters(middle),
        flops_per_byte=_matrices(middle.projection) * per_patch + stack.flops_per_byte,
    )
    hashes = [] if encoder.ngram_hash is None else [PartCost(TABLES, _parameters(encoder.ngram_hash))]
    pooling: list[PartCost] = []
    if decoder.cross_attention:
        cross = partial(_cross_attention, k=k, dim=model.settings.encoder.dim, per_patch=per_patch)
        pooling = [cross("encoder", encoder.cross_attention, encoder.pooled_to_queries, queries=k * per_patch, keys=1)]
        reading = cross("decoder", decoder.cross_attention, decoder.patch_to_keys, queries=1, keys=k * per_patch)
    else:
        added = decoder.patch_norm, decoder.patch_to_bytes
        reading = PartCost("patches to bytes", _parameters(*added), _matrices(*added) * per_patch)
    return [
        PartCost("byte embedding", _parameters(encoder.embedding)),
        *hashes,
        _stack("local encoder", encoder.stack, context),
        *pooling,
        stack,
        reading,
        _stack("local decoder", decoder.stack, context),
        PartCost("output", _parameters(decoder.norm, decoder.output), _matrices(decoder.output)),
    ]


def _cross_attention(
    of: str, layers: Any, to_patches: nn.Module, queries: float, keys: float, k: int, dim: int, per_patch: float
) -> PartCost:
    """Each byte meets k queries of its patch, or k keys of the patch it reads; `queries` and `keys` are per byte."""
    meetings = 4.0 * k * dim * len(layers)
    products = _matrices(to_patches) * per_patch
    for cross in layers:
        products += _matrices(cross.query, cross.output) * queries + _matrices(cross.key, cross.value) * keys
    return PartCost(f"{of} cross-attention", _parameters(layers, to_patches), products + meetings, meetings)


def _stack(name: str, stack: Stack, context: float, per_byte: float = 1.0) -> PartCost:
    """A stack's cost; `context` is in its positions, of which there are `per_byte`."""
    settings = stack.settings
    attention = settings.num_layers * 4 * settings.attention_dim * keys_seen(settings, context) * per_byte
    return PartCost(name, _parameters(stack), _matrices(stack) * per_byte + attention, attention)


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
