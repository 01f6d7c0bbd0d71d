"""How good a model is: bits per byte of text."""

from bytelatent.evaluation.text import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
