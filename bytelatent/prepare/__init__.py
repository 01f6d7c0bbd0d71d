"""Text made ready for training: read from anywhere, shuffled as a whole, cut into chunks of equal size."""

from bytelatent.prepare.plan import PrepareSettings
from bytelatent.prepare.run import prepare
from bytelatent.prepare.write import verify

__all__ = ["PrepareSettings", "prepare", "verify"]
