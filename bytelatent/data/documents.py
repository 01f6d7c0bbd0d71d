"""Documents out of files: JSONL, Parquet and plain text."""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bytelatent.errors import UserError
from bytelatent.vocab import to_bytes

JSONL = (".jsonl", ".ndjson", ".jsonl.zst", ".jsonl.gz")
PARQUET = (".parquet",)


@dataclass(frozen=True)
class Document:
    """A text, and where stored the byte LM's entropies: nats, one for BOS and one for each byte."""

    text: bytes
    entropies: np.ndarray | None = None


def find_files(path: str) -> list[str]:
    """The files of a source, sorted: a file, a folder (all files below it, hidden ones not), or a glob.

    Raises:
        UserError: there are none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return [str(place)]
    if place.is_dir():
        found = [
            str(file)
            for file in sorted(place.rglob("*"))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(place).parts)
        ]
        if not found:
            raise UserError(f"data: the folder '{path}' holds no files")
        return found
    found = sorted(name for name in glob.glob(str(place), recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"data: '{path}' does not exist; give a file, a folder or a pattern such as 'text/*.jsonl'")
    return found


def read_documents(file: str, text_key: str = "text", first_row: int = 0) -> Iterator[tuple[int, Document]]:
    """The documents of a file with their rows, empty ones left out.

    JSONL (also .zst and .gz) and Parquet hold one a row; any other file is one document, its bytes as they are.

    Args:
        text_key: the key or column that holds the text.
        first_row: rows before this one are passed over.

    Raises:
        UserError: the file cannot be read or a row holds no text; the file and row are named.
    """
    if file.endswith(PARQUET):
        rows = _parquet_rows(file, text_key, first_row)
    elif file.endswith(JSONL):
        rows = _jsonl_rows(file, text_key, first_row)
    else:
        rows = _plain_text(file, first_row)
    try:
        for row, document in rows:
            if document.text:
                yield row, document
    except OSError as error:
        raise UserError(f"data: '{file}' cannot be read: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:  # gzip's own, for a file that ends early or is damaged
        raise UserError(f"data: '{file}' is not a whole gzip file: {error}") from None


def _plain_text(file: str, first_row: int) -> Iterator[tuple[int, Document]]:
    if first_row == 0:
        yield 0, Document(Path(file).read_bytes())


def _jsonl_rows(file: str, text_key: str, first_row: int) -> Iterator[tuple[int, Document]]:
    with _open(file) as lines:
        for row, line in enumerate(lines):
            if row < first_row or not line.strip():
                continue
            try:  # bytes that are no UTF-8 survive as surrogates and become themselves again in `to_bytes`
                values = json.loads(line.decode("utf-8", errors="surrogateescape"))
            except (ValueError, RecursionError) as error:  # ValueError: a number of more digits than Python reads, too
                detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise UserError(f"data: '{file}' line {row + 1} is not JSON ({detail}); mend or remove it") from None
            if not isinstance(values, dict):
                raise UserError(f"data: '{file}' line {row + 1} is not a JSON object with the key '{text_key}'")
            yield row, _document(values, text_key, f"'{file}' line {row + 1}")


def _parquet_rows(file: str, text_key: str, first_row: int) -> Iterator[tuple[int, Document]]:
    pyarrow = _pyarrow(file)
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        names = table.schema_arrow.names
        if text_key not in names:
            raise UserError(f"data: '{file}' has no column '{text_key}'; its columns: {', '.join(names)}")
        columns = [name for name in (text_key, "entropies") if name in names]
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            if row + batch.num_rows <= first_row:
                row += batch.num_rows
                continue
            for values in batch.to_pylist():
                if row >= first_row:
                    yield row, _document(values, text_key, f"'{file}' row {row}")
                row += 1
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data: '{file}' is not a whole Parquet file: {' '.join(str(error).split())}") from None


def _document(values: dict[str, Any], text_key: str, where: str) -> Document:
    text = values.get(text_key)
    if not isinstance(text, str | bytes):
        raise UserError(f"data: {where} has no text under '{text_key}'; its keys: {', '.join(values)}")
    data = to_bytes(text)
    stored = values.get("entropies")
    if stored is None:
        return Document(data)
    try:
        entropies = np.asarray(stored, dtype=np.float32)
    except (ValueError, TypeError):
        raise UserError(f"data: {where} has entropies that are not a list of numbers") from None
    if entropies.shape != (len(data) + 1,):
        raise UserError(
            f"data: {where} has {entropies.size} entropies for {len(data)} bytes; "
            "there should be one for BOS and one for each byte"
        )
    return Document(data, entropies)


def _open(file: str) -> BinaryIO:
    if file.endswith(".gz"):
        return io.BufferedReader(gzip.open(file, "rb"))  # type: ignore[arg-type]
    if file.endswith(".zst"):
        stream = _pyarrow(file).input_stream(file, compression="zstd")
        return io.BufferedReader(stream)  # type: ignore[arg-type]
    return open(file, "rb")


def _pyarrow(file: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"data: '{file}' needs the package pyarrow; run: pip install 'bytelatent[data]'") from None
    return pyarrow
