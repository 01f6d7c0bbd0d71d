"""The Byte Latent Transformer, the byte LM and the token LM."""

from bytelatent.model.block import Block
from bytelatent.model.blt import BLTModel, CrossAttention, build_model, compile_regions
from bytelatent.model.language_model import ByteLM, LanguageModel, TokenLM, entropies
from bytelatent.model.recording import recording
from bytelatent.model.rows import Layout, Rows
from bytelatent.model.settings import (
    PRESETS,
    BLTSettings,
    ByteLMSettings,
    LanguageModelSettings,
    ModelSettings,
    TokenLMSettings,
    UnknownPreset,
    preset,
    settings_class,
)
from bytelatent.model.stream import PatchedStream, Stream, add_patches, lines_as_documents, pack_rows

__all__ = [
    "PRESETS",
    "BLTModel",
    "BLTSettings",
    "Block",
    "ByteLM",
    "ByteLMSettings",
    "CrossAttention",
    "LanguageModel",
    "LanguageModelSettings",
    "Layout",
    "ModelSettings",
    "PatchedStream",
    "Rows",
    "Stream",
    "TokenLM",
    "TokenLMSettings",
    "UnknownPreset",
    "add_patches",
    "build_model",
    "compile_regions",
    "entropies",
    "lines_as_documents",
    "pack_rows",
    "preset",
    "recording",
    "settings_class",
]
