"""Weights in, weights out: our format, Meta's, that of transformers."""

from bytelatent.weights.convert import FORMATS, check_target, convert, num_bytes, write_model
from bytelatent.weights.native import save
from bytelatent.weights.pretrained import find_byte_lm, load, load_byte_lm, load_byte_lm_and_context, open_pretrained
from bytelatent.weights.stored_model import Config, Origin, Pretrained, StoredModel, fingerprint

__all__ = [
    "FORMATS",
    "Config",
    "Origin",
    "Pretrained",
    "StoredModel",
    "check_target",
    "convert",
    "find_byte_lm",
    "fingerprint",
    "load",
    "load_byte_lm",
    "load_byte_lm_and_context",
    "num_bytes",
    "open_pretrained",
    "save",
    "write_model",
]
