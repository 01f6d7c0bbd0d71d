"""How good a model is: bits per byte of text."""

from bytelatent.evaluation.load import FoundModel, ReadSettings, find_model, find_models, packed_model
from bytelatent.evaluation.models import Cost, PackedModel, TextModel, TransformersModel
from bytelatent.evaluation.text import Measured, Texts, bootstrap, compare, measure_texts

__all__ = [
    "Cost",
    "FoundModel",
    "Measured",
    "PackedModel",
    "ReadSettings",
    "TextModel",
    "Texts",
    "TransformersModel",
    "bootstrap",
    "compare",
    "find_model",
    "find_models",
    "measure_texts",
    "packed_model",
]
