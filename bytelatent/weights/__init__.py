"""Weights in and out: our format, Meta's, and that of Hugging Face transformers."""

from bytelatent.weights.formats import FORMATS, check_target, convert, write_model
from bytelatent.weights.native import save
from bytelatent.weights.pretrained import find_byte_lm, load, load_byte_lm, load_byte_lm_and_context, open_pretrained
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
    "FORMATS",
    "Config",
    "ModelChecksums",
    "Origin",
    "Pretrained",
    "StoredModel",
    "check_target",
    "convert",
    "drop_outdated",
    "find_byte_lm",
    "fingerprint",
    "load",
    "load_byte_lm",
    "load_byte_lm_and_context",
    "open_pretrained",
    "save",
    "write_model",
]
