"""Text out of files: where they are, what they are, and the documents in them.

`folders` finds the files of a source, `formats` holds the table of formats and says what a file is, `streams` opens and
decompresses it, and `readers` and `tables` read documents in blocks. Every command reads text through these.
"""

from bytelatent.text.documents import MAX_ROW_BYTES, BadRow, BadRows, Document, ReadOptions, must_have_read
from bytelatent.text.folders import FileState, find_files
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
    "FileState",
    "ReadOptions",
    "Stored",
    "find_files",
    "must_have_read",
    "open_blocks",
    "read_documents",
]
