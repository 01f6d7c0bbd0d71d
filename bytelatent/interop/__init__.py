"""Weights in, weights out: our format and others'."""

from bytelatent.interop.native import Config, Pretrained, fingerprint, save
from bytelatent.interop.pretrained import load, load_byte_lm, load_byte_lm_and_context

__all__ = ["Config", "Pretrained", "fingerprint", "load", "load_byte_lm", "load_byte_lm_and_context", "save"]
