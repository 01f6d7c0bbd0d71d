"""Generation, and the byte LM's entropies at a GPU's speed."""

from bytelatent.inference.fast_entropies import FastEntropies
from bytelatent.inference.generate import generate_ids
from bytelatent.inference.sampling import Sampling

__all__ = ["FastEntropies", "Sampling", "generate_ids"]
