"""Text into batches: documents, pieces, packing, the loader."""

from bytelatent.data.loader import Loader, PrefetchLoader, batches_once, held_out_batches
from bytelatent.data.packing import Batch, Piece, fill_batch, pack, split_document, stream_of
from bytelatent.data.patcher import Patcher, StoredCheck, groups_of, patch_in_groups, patches_of
from bytelatent.data.settings import DataSettings, SourceSettings

__all__ = [
    "Batch",
    "DataSettings",
    "Loader",
    "Patcher",
    "Piece",
    "PrefetchLoader",
    "SourceSettings",
    "StoredCheck",
    "batches_once",
    "fill_batch",
    "groups_of",
    "held_out_batches",
    "pack",
    "patch_in_groups",
    "patches_of",
    "split_document",
    "stream_of",
]
