"""The byte LM and the Byte Latent Transformer."""

from bytelatent.model.block import Block
from bytelatent.model.blt import BLTModel, CrossAttention, build_model, compile_regions
from bytelatent.model.byte_lm import ByteLM, entropies
from bytelatent.model.settings import PRESETS, BLTSettings, ByteLMSettings, ModelSettings, UnknownPreset, preset
from bytelatent.model.stream import PatchedStream, Stream, add_patches, pack_rows

__all__ = [
    "PRESETS",
    "BLTModel",
    "BLTSettings",
    "Block",
    "ByteLM",
    "ByteLMSettings",
    "CrossAttention",
    "ModelSettings",
    "PatchedStream",
    "Stream",
    "UnknownPreset",
    "add_patches",
    "build_model",
    "compile_regions",
    "entropies",
    "pack_rows",
    "preset",
]
