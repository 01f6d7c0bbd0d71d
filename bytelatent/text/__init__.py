"""Text out of files: where they are, and the documents in them."""

from bytelatent.text.blocks import Block, BlockReader, open_blocks, read_documents
from bytelatent.text.damage import DamageLimit
from bytelatent.text.documents import Document
from bytelatent.text.places import Damaged, find_files
from bytelatent.text.stored import Stored

__all__ = [
    "Block",
    "BlockReader",
    "DamageLimit",
    "Damaged",
    "Document",
    "Stored",
    "find_files",
    "open_blocks",
    "read_documents",
]
