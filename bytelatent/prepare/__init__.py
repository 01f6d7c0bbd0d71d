"""Text made ready for training: read from anywhere, shuffled as a whole, cut into chunks of equal size."""

from bytelatent.prepare.manifest import verify
from bytelatent.prepare.run import prepare
from bytelatent.prepare.settings import PrepareSettings

__all__ = ["PrepareSettings", "prepare", "verify"]
