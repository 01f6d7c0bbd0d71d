"""Text into batches: documents, pieces, packing, the loader."""

from bytelatent.data.documents import Document, find_files, read_documents
from bytelatent.data.loader import Loader, batches_once
from bytelatent.data.packing import Batch, pack, surprise, take
from bytelatent.data.patcher import Patcher, patch_in_groups, patches_of
from bytelatent.data.pieces import Piece, cut, stream_of
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
    "patch_in_groups",
    "patches_of",
    "read_documents",
    "stream_of",
    "surprise",
    "take",
]
