"""Text out of files: where they are, what they are, and the documents in them.

`folders` finds the files of a source, `formats` holds the table of formats and says what a file is, `streams` opens and
decompresses it, and `readers` and `tables` read documents in blocks. Every command reads text through these.
"""

from bytelatent.text.documents import MAX_ROW_BYTES, BadRow, BadRows, Document, ReadOptions
from bytelatent.text.folders import find_files
from bytelatent.text.formats import open_blocks, read_documents
from bytelatent.text.readers import BlockReader, DocumentBlock
from bytelatent.text.stored import Stored

__all__ = [
    "MAX_ROW_BYTES",
    "BadRow",
    "BadRows",
    "BlockReader",
    "Document",
    "DocumentBlock",
    "ReadOptions",
    "Stored",
    "find_files",
    "open_blocks",
    "read_documents",
]
