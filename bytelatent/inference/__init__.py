"""Generation."""

from bytelatent.inference.generate import generate_ids
from bytelatent.inference.sampling import Sampling

__all__ = ["Sampling", "generate_ids"]
