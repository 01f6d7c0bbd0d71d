"""Text made ready for training: read from anywhere, shuffled as a whole, cut into chunks of equal size."""

from bytelatent.prepare.run import prepare
from bytelatent.prepare.settings import PrepareSettings
from bytelatent.prepare.write import verify

__all__ = ["PrepareSettings", "prepare", "verify"]
