"""Text out of files: where they are, what they are, and the documents in them.

`folders` finds the files, `kinds` decides what each is and opens it, `compressed` decompresses, `documents` makes
documents of rows, and `blocks` and `parquet` read them in parts. Every command reads text through these.
"""

from bytelatent.text.bad_rows import BadRows
from bytelatent.text.blocks import BlockReader, open_blocks, read_documents
from bytelatent.text.documents import MAX_ROW_BYTES, Block, Document
from bytelatent.text.folders import find_files
from bytelatent.text.places import BadRow
from bytelatent.text.stored import Stored

__all__ = [
    "MAX_ROW_BYTES",
    "BadRow",
    "BadRows",
    "Block",
    "BlockReader",
    "Document",
    "Stored",
    "find_files",
    "open_blocks",
    "read_documents",
]
