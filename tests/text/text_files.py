"""Documents written into files of every kind."""

import gzip
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bytelatent.text.documents import forget_logged

# A writer of each binary format: a path, an Arrow table, and the rows of a group. Cases of all of them follow from it.
TABLES: dict[str, Callable[[Path, Any, int], None]] = {
    "parquet": lambda path, table, rows: pq.write_table(table, path, row_group_size=rows),
}
KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", *TABLES]


@contextmanager
def logged() -> Iterator[list[str]]:
    """The messages that are logged in the block."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("bytelatent")
    logger.addHandler(handler)
    forget_logged()
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def jsonl(documents: Sequence[bytes], key: str = "text") -> bytes:
    """One JSON object a line; bytes that are no UTF-8 stand in it as they are."""
    lines = [
        json.dumps({"id": i, key: text.decode("utf-8", errors="surrogateescape")}, ensure_ascii=False)
        for i, text in enumerate(documents)
    ]
    return "".join(f"{line}\n" for line in lines).encode("utf-8", errors="surrogateescape")


def write(path: Path, documents: Sequence[bytes], key: str = "text") -> Path:
    """Write documents as the name's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if writer := TABLES.get(path.suffix[1:]):
        table = pa.table({"id": range(len(documents)), key: pa.array(documents, pa.binary())})
        writer(path, table, max(len(documents), 1))
    elif path.name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(jsonl(documents, key))
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(jsonl(documents, key)))
    elif path.name.endswith(".jsonl"):
        path.write_bytes(jsonl(documents, key))
    else:
        assert len(documents) == 1
        path.write_bytes(documents[0])
    return path


def write_stored(path: Path, documents: Sequence[bytes], entropies: Sequence[Sequence[float]]) -> Path:
    """Parquet with entropies beside the text."""
    stored = pa.array([list(values) for values in entropies], pa.list_(pa.float32()))
    pq.write_table(pa.table({"text": pa.array([text.decode() for text in documents]), "entropies": stored}), path)
    return path
