"""Text into batches: documents, pieces, packing, the loader."""

from bytelatent.data.documents import Document, find_files, read_documents
from bytelatent.data.loader import Loader, batches_once
from bytelatent.data.packing import Batch, pack, patched, take
from bytelatent.data.pieces import Patcher, Piece, cut, stream_of
from bytelatent.data.settings import DataSettings, SourceSettings

__all__ = [
    "Batch",
    "DataSettings",
    "Document",
    "Loader",
    "Patcher",
    "Piece",
    "SourceSettings",
    "batches_once",
    "cut",
    "find_files",
    "pack",
    "patched",
    "read_documents",
    "stream_of",
    "take",
]
