"""What each command reads of a source: the same documents, through its own reader."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from bytelatent.commands.demo_stages import _own
from bytelatent.commands.options import DemoSettings
from bytelatent.data import DataSettings, Loader, Piece, batches_once
from bytelatent.data.entropies import EntropySettings, store_entropies
from bytelatent.errors import UserError
from bytelatent.model import ByteLM
from bytelatent.text import BadRows, find_files, read_documents
from bytelatent.training.calibration import sample_pieces
from bytelatent.vocab import BOS, decode
from bytelatent.weights import fingerprint
from tests.prepare.folders import made_here, outputs

LIMIT = 10_000
CONTEXT = 1 << 20


def prepared(source: str, out: Path, key: str, max_row_bytes: int) -> list[bytes]:
    """As training then reads them."""
    more = {"text_key": key, "max_bad_rows": LIMIT, "max_row_bytes": max_row_bytes, "validation": 0, "chunks": 1}
    folder = made_here(out, source, **more)
    files = [str(folder / name) for name in outputs(folder)]
    return [text for file in files for _, text in _read(file, key, max_row_bytes)]


def deduplicated(source: str, out: Path, key: str, max_row_bytes: int) -> list[bytes]:
    more = {"text_key": key, "max_bad_rows": LIMIT, "max_row_bytes": max_row_bytes, "validation": 0, "chunks": 1}
    folder = made_here(out, source, dedup=True, **more)
    files = [str(folder / name) for name in outputs(folder)]
    return [text for file in files for _, text in _read(file, key, max_row_bytes)]


def _read(file: str, key: str, max_row_bytes: int) -> list[tuple[int, bytes]]:
    documents = read_documents(file, key, bad_rows=BadRows(LIMIT), stored=False, max_row_bytes=max_row_bytes)
    return [(row, document.text) for row, document in documents]


def trained_on(source: str, out: Path, key: str, max_row_bytes: int) -> list[bytes]:
    """The documents of the first epoch."""
    data = _settings(source, key, max_row_bytes)
    reader = Loader(data, 0).sources[0]
    found = []
    while True:
        pieces = next(reader)
        if reader.position.epoch > 0:
            return found
        found.append(_text(pieces))


def evaluated(source: str, out: Path, key: str, max_row_bytes: int) -> list[bytes]:
    data = _settings(source, key, max_row_bytes)
    find_files(source)
    batches = batches_once(data.train, CONTEXT, CONTEXT, bad_rows=BadRows(LIMIT), max_row_bytes=max_row_bytes)
    found = []
    for batch in batches:
        ids = batch.stream.ids.numpy()
        found += [decode(part) for part in np.split(ids, np.flatnonzero(ids == BOS))[1:]]
    return found


def with_entropies(byte_lm: ByteLM) -> Callable[[str, Path, str, int], list[bytes]]:
    def read(source: str, out: Path, key: str, max_row_bytes: int) -> list[bytes]:
        how = {"text_key": key, "max_bad_rows": LIMIT, "max_row_bytes": max_row_bytes}
        settings = EntropySettings(context=64, batch_bytes=64, dtype="float32", **how)
        with suppress(UserError):  # that nothing of a file could be read, once the others are done
            store_entropies(byte_lm, fingerprint(byte_lm), [source], out, settings)
        return [document.text for file in find_files(str(out)) for _, document in read_documents(file)]

    return read


def calibrated_on(source: str, out: Path, key: str, max_row_bytes: int) -> list[bytes]:
    data = _settings(source, key, max_row_bytes)
    pieces = sample_pieces(data.train, 1 << 30, CONTEXT, bad_rows=BadRows(LIMIT), max_row_bytes=max_row_bytes)
    return [decode(piece.ids) for piece in pieces]


def in_demo(source: str, out: Path, key: str, max_row_bytes: int) -> list[bytes]:
    settings = DemoSettings(text=source, text_key=key, max_row_bytes=max_row_bytes)
    return [text for _, text in _own(settings, BadRows(LIMIT))]


def _settings(source: str, key: str, max_row_bytes: int) -> DataSettings:
    return DataSettings.parse(
        {
            "train": [{"path": source, "text_key": key}],
            "context": CONTEXT,
            "batch_bytes": CONTEXT,
            "shuffle_buffer": 1,
            "max_bad_rows": LIMIT,
            "max_row_bytes": max_row_bytes,
        }
    )


def _text(pieces: Sequence[Piece]) -> bytes:
    return b"".join(decode(piece.ids) for piece in pieces)


READERS = {
    "prepare": prepared,
    "prepare --dedup": deduplicated,
    "train": trained_on,
    "eval": evaluated,
    "calibrate": calibrated_on,
    "demo": in_demo,
}
