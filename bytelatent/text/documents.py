"""Documents out of rows: a JSON line, a Parquet row, or a file that is one text."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bytelatent.text.places import Damaged
from bytelatent.text.stored import unpack_starts
from bytelatent.vocab import to_bytes


@dataclass(frozen=True)
class Document:
    """A text, and what is stored with it: entropies in nats or patch starts, one for BOS and one for each byte."""

    text: bytes
    id: str | None = None
    entropies: np.ndarray | None = None  # float32 [bytes + 1]
    starts: np.ndarray | None = None  # bool [bytes + 1], whether the id that follows starts a patch


def from_json(line: bytes, text_key: str, where: str) -> Document:
    """The document of a JSON line.

    Raises:
        Damaged: it holds none; `where` names the row.
    """
    try:  # bytes that are no UTF-8 survive as surrogates and become themselves again in `to_bytes`
        values = json.loads(line.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:  # ValueError: a number of more digits than Python reads, too
        detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise Damaged(f"data: {where} is not JSON ({detail}); mend or remove it") from None
    if not isinstance(values, dict):
        raise Damaged(f"data: {where} is not a JSON object with the key '{text_key}'")
    text = values.get(text_key)
    if not isinstance(text, str):
        raise Damaged(f"data: {where} has no text under '{text_key}'; its keys: {', '.join(values)}")
    stored = values.get("entropies")
    try:
        entropies = None if stored is None else np.asarray(stored, dtype=np.float32)
    except (ValueError, TypeError):
        raise Damaged(f"data: {where} has entropies that are not a list of numbers") from None
    return _checked(to_bytes(text), _name(values.get("id")), entropies, None, where)


def from_table(table: Any, text_key: str, wheres: list[str]) -> Iterator[Document | Damaged]:
    """The documents of an Arrow table's rows, in order.

    Args:
        table: with a column `text_key` of strings or bytes, and perhaps `id`, `entropies` or `starts`.
        wheres: names each row.
    """
    texts = _bytes(table.column(text_key))
    ids = table.column("id").to_pylist() if "id" in table.column_names else [None] * len(texts)
    entropies = _lists(table.column("entropies")) if "entropies" in table.column_names else [None] * len(texts)
    starts = _bytes(table.column("starts")) if "starts" in table.column_names else [None] * len(texts)
    for text, name, floats, bits, where in zip(texts, ids, entropies, starts, wheres, strict=True):
        if text is None:
            yield Damaged(f"data: {where} has no text under '{text_key}'; its columns: {', '.join(table.column_names)}")
            continue
        try:
            yield _checked(text, _name(name), floats, None if bits is None else _unpacked(bits, text, where), where)
        except Damaged as error:
            yield error


def _checked(
    text: bytes, name: str | None, entropies: np.ndarray | None, starts: np.ndarray | None, where: str
) -> Document:
    if entropies is not None and entropies.shape != (len(text) + 1,):
        raise Damaged(
            f"data: {where} has {entropies.size} entropies for {len(text)} bytes; "
            "there should be one for BOS and one for each byte"
        )
    return Document(text, name, entropies, starts)


def _unpacked(bits: bytes, text: bytes, where: str) -> np.ndarray:
    try:
        return unpack_starts(bits, len(text))
    except ValueError as error:
        raise Damaged(f"data: {where} has {error}; there should be one for BOS and one for each byte") from None


def _name(value: Any) -> str | None:
    return None if value is None else str(value)


def _bytes(column: Any) -> list[bytes | None]:
    """A column of strings or bytes; strings are not decoded, so that bytes that are no UTF-8 survive."""
    import pyarrow

    return column.cast(pyarrow.large_binary()).to_pylist()


def _lists(column: Any) -> list[np.ndarray | None]:
    """A column of lists of numbers, as float32 arrays."""
    arrays: list[np.ndarray | None] = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy(zero_copy_only=False).astype(np.float32)
        ends = chunk.offsets.to_numpy()
        for row, missing in enumerate(chunk.is_null().to_pylist()):
            arrays.append(None if missing else values[ends[row] : ends[row + 1]])
    return arrays
