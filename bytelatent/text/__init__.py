"""Text out of files: where they are, and the documents in them."""

from bytelatent.text.places import find_files

__all__ = ["find_files"]
