"""The Hugging Face hub: its repositories, transfers that go on where they broke, and models in its own cache."""

from bytelatent.hub.models import is_repository_name, model_exists, model_folder
from bytelatent.hub.repository import Unreachable

__all__ = ["Unreachable", "is_repository_name", "model_exists", "model_folder"]
