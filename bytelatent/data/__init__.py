"""Text into batches: documents, pieces, packing, the loader."""

from bytelatent.data.ahead import ReadAhead
from bytelatent.data.loader import Loader, batches_once
from bytelatent.data.packing import Batch, pack, take
from bytelatent.data.patcher import Patcher, groups_of, patch_in_groups, patches_of
from bytelatent.data.pieces import Piece, cut, stream_of
from bytelatent.data.settings import DataSettings, SourceSettings
from bytelatent.data.stored import StoredCheck

__all__ = [
    "Batch",
    "DataSettings",
    "Loader",
    "Patcher",
    "Piece",
    "ReadAhead",
    "SourceSettings",
    "StoredCheck",
    "batches_once",
    "cut",
    "groups_of",
    "pack",
    "patch_in_groups",
    "patches_of",
    "stream_of",
    "take",
]
