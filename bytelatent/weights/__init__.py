"""Weights in and out: our format, Meta's, and that of Hugging Face transformers."""

from bytelatent.weights.byteified import blt_around, byteify
from bytelatent.weights.native import BYTE_LM, NATIVE, is_run, origin_of_run, save
from bytelatent.weights.pretrained import (
    FORMATS,
    check_target,
    convert,
    find_byte_lm,
    load,
    load_byte_lm,
    load_byte_lm_and_context,
    open_pretrained,
    write_model,
)
from bytelatent.weights.safetensors_io import StoredTensor
from bytelatent.weights.stored_model import (
    Config,
    ModelChecksums,
    Origin,
    Pretrained,
    StoredModel,
    drop_outdated,
    fingerprint,
)

__all__ = [
    "BYTE_LM",
    "FORMATS",
    "NATIVE",
    "Config",
    "ModelChecksums",
    "Origin",
    "Pretrained",
    "StoredModel",
    "StoredTensor",
    "blt_around",
    "byteify",
    "check_target",
    "convert",
    "drop_outdated",
    "find_byte_lm",
    "fingerprint",
    "is_run",
    "load",
    "load_byte_lm",
    "load_byte_lm_and_context",
    "open_pretrained",
    "origin_of_run",
    "save",
    "write_model",
]
