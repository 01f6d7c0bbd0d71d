"""Text with the byte LM's entropies beside it, or with the patch starts of one patching mode, as Parquet.

A row is a document: `id`, `text` (any bytes) and either `entropies`, float16 nats, or `starts`, bits. Both have a value
for BOS and one for each byte: how hard the id that follows is to guess, or whether it starts a patch. The file's
metadata say what made them.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.text.documents import BadRow
from bytelatent.text.streams import import_pyarrow, open_file, readable

METADATA_KEY = b"bytelatent"
VERSION = 1
GROUP_ROWS = 1024
GROUP_BYTES = 8 << 20  # of text in a row group, unless one document is longer
MAX_TEXT_BYTES = 2**31 - 2  # in a document: Arrow counts a row's values in 32 bits
ZSTD_LEVEL = 3


class Stored(Settings):
    """What a file's entropies or starts come from.

    Attributes:
        byte_lm: fingerprint of the byte LM's weights.
        window: ids that the byte LM's attention sees; None for all.
        context: ids it read at once.
        dtype: precision of its matrix products.
        patching: the patching settings of the starts, as plain values; None where entropies are stored.
        reset_at_newline: whether its context was reset at newlines.
        source_bytes: size of the file that the text was read from, to notice that it changed.
    """

    version: int = VERSION
    byte_lm: str
    window: int | None = None
    context: int
    dtype: str
    patching: dict[str, Any] | None = None
    reset_at_newline: bool = False
    source_bytes: int | None = None

    def differences(self, other: Self) -> list[str]:
        """Each field in which `other` is not the same, with both values."""
        mine, others = self.plain(), other.plain()
        return [f"{name} is {mine[name]} there and {others[name]} now" for name in mine if mine[name] != others[name]]


def stored_in(metadata: dict[bytes, bytes] | None, file: str) -> Stored | None:
    """What the metadata of a Parquet file say; None for another file.

    Raises:
        BadRow: they are not what we write.
        UserError: a newer version of this package wrote them.
    """
    if metadata is None or METADATA_KEY not in metadata:
        return None
    try:
        values = json.loads(metadata[METADATA_KEY])
        version = values["version"]
        values["patching"] = values.pop("rule", None)  # its name in files
    except (ValueError, KeyError, TypeError):
        raise BadRow(file, "has metadata that cannot be read; make it again: blt entropies") from None
    if version != VERSION:
        raise UserError(f"data: '{file}' is of version {version} of this format; upgrade bytelatent to read it")
    try:
        return Stored.parse(values, where=file)
    except UserError as error:
        raise BadRow(file, f"has metadata that cannot be read: {error}") from None


def read_stored(file: str | Path) -> Stored | None:
    """What a file's entropies or starts come from; None for a Parquet file of another kind.

    Raises:
        BadRow: it cannot be read, or is not Parquet.
        UserError: see `stored_in`.
    """
    file = str(file)
    import_pyarrow(file)
    from pyarrow.parquet import read_schema

    with readable(file, "Parquet"), open_file(file) as stream:
        metadata = read_schema(stream).metadata
    return stored_in(metadata, file)


def stored_schema(stored: Stored) -> Any:
    """The Arrow schema of a file, its metadata included."""
    import pyarrow as pa

    if stored.patching is None:
        values = pa.field("entropies", pa.list_(pa.field("element", pa.float16(), nullable=False)), nullable=False)
    else:
        values = pa.field("starts", pa.binary(), nullable=False)
    row = [pa.field("id", pa.string(), nullable=False), pa.field("text", pa.binary(), nullable=False), values]
    values = stored.plain()
    values["rule"] = values.pop("patching")  # its name in files
    if not stored.reset_at_newline:  # as files were before there was such a reset
        del values["reset_at_newline"]
    return pa.schema(row, metadata={METADATA_KEY: json.dumps(values, sort_keys=True).encode()})


def pack_starts(starts: np.ndarray) -> bytes:
    """bool [bytes + 1] as bits, the first one the highest of its byte."""
    return np.packbits(starts).tobytes()


def unpack_starts(bits: bytes, num_bytes: int) -> np.ndarray:
    """The starts of a document, bool [num_bytes + 1].

    Raises:
        ValueError: there are more or fewer.
    """
    if len(bits) != (num_bytes + 8) // 8:
        raise ValueError(f"{8 * len(bits)} starts for {num_bytes} bytes")
    return np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=num_bytes + 1).view(bool)


@contextmanager
def stored_writer(path: str | Path, stored: Stored) -> Iterator["StoredWriter"]:
    """A file to write documents to; it appears, whole, when the block ends without an error.

    Raises:
        UserError: the file cannot be written, or the disk is full.
    """
    import_pyarrow(str(path))
    with whole_file(path) as aside, aside.open("wb") as stream:  # Arrow opens no file whose name is not UTF-8
        writer = StoredWriter(stream, stored)
        try:
            yield writer
            writer.write_group()
            writer.file.close()
        except BaseException:
            with suppress(Exception):  # a full disk takes the file's end no more than the rest
                writer.file.close()
            raise
        finally:
            writer.file.is_open = False  # or it would close itself once more, later, and complain


class StoredWriter:
    """What `stored_writer` gives."""

    def __init__(self, stream: BinaryIO, stored: Stored):
        from pyarrow.parquet import ParquetWriter

        self.stored, self.schema = stored, stored_schema(stored)
        # Texts and entropies hardly repeat; and statistics would hold whole texts.
        how = {"compression": "zstd", "compression_level": ZSTD_LEVEL, "use_dictionary": False}
        self.file = ParquetWriter(stream, self.schema, write_statistics=False, **how)
        self._rows: list[tuple[str, bytes, np.ndarray]] = []
        self._num_bytes = 0  # of text in them

    def add(self, id_: str, text: bytes, values: np.ndarray) -> None:
        """Append a document.

        Args:
            values: [bytes + 1] entropies in nats, or, as bool, starts.
        """
        assert values.shape == (len(text) + 1,), f"{values.shape} for {len(text)} bytes"
        assert (values.dtype == bool) == (self.stored.patching is not None), values.dtype
        if self._num_bytes + len(text) > GROUP_BYTES:
            self.write_group()
        self._rows.append((id_, text, values))
        self._num_bytes += len(text)
        if len(self._rows) == GROUP_ROWS:
            self.write_group()

    def write_group(self) -> None:
        """Write the documents that were added since the last group."""
        if not self._rows:
            return
        import pyarrow as pa

        ids, texts, values = zip(*self._rows, strict=True)
        self._rows, self._num_bytes = [], 0
        if self.stored.patching is None:
            ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
            flat = pa.array(np.concatenate(values).astype(np.float16))
            column = pa.ListArray.from_arrays(pa.array(ends), flat, type=self.schema.field("entropies").type)
        else:
            column = pa.array([pack_starts(starts) for starts in values], pa.binary())
        columns = [pa.array(ids, pa.string()), pa.array(texts, pa.binary()), column]
        self.file.write_table(pa.Table.from_arrays(columns, schema=self.schema), row_group_size=GROUP_ROWS)
