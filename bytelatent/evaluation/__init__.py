"""How good a model is."""

from bytelatent.evaluation.bits_per_byte import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
