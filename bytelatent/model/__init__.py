"""The byte LM and the Byte Latent Transformer."""

import torch
from torch import nn

from bytelatent.model.block import Block
from bytelatent.model.blt import BLTModel
from bytelatent.model.byte_lm import ByteLM, entropies
from bytelatent.model.patch_attention import CrossAttention
from bytelatent.model.presets import PRESETS, UnknownPreset, preset
from bytelatent.model.settings import BLTSettings, ByteLMSettings, ModelSettings
from bytelatent.model.stream import PatchedStream, Stream, add_patches, pack_rows


def build(settings: ModelSettings) -> nn.Module:
    """The model these settings describe, with fresh weights, on torch's default device."""
    return ByteLM(settings) if isinstance(settings, ByteLMSettings) else BLTModel(settings)


def compile_regions(model: nn.Module) -> None:
    """Compile a model block by block: alike blocks share one graph, and masks are built outside of it."""
    for part in model.modules():
        if isinstance(part, Block | CrossAttention):
            part.forward = torch.compile(part.forward)  # not `compile()`, which looks past a forward that was replaced


__all__ = [
    "PRESETS",
    "BLTModel",
    "BLTSettings",
    "ByteLM",
    "ByteLMSettings",
    "ModelSettings",
    "PatchedStream",
    "Stream",
    "UnknownPreset",
    "add_patches",
    "build",
    "compile_regions",
    "entropies",
    "pack_rows",
    "preset",
]
