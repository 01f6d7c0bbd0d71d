"""Any bytes in files of any kind, cut anywhere: never a traceback, and the same documents wherever they are read."""

import gzip
import json
import lzma
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.prepare.plan import find_inputs, units_of
from bytelatent.prepare.scatter import BadRowRecord, LineReader
from bytelatent.terminal import safe
from bytelatent.text import BadRows, ReadOptions, read_documents
from bytelatent.text.documents import MAX_LINE
from bytelatent.text.formats import kind_of
from tests.text.every_reader import evaluated, trained_on
from tests.text.text_files import logged

Reader = Callable[[str, Path, str, int], list[bytes]]
SETTINGS = settings(max_examples=150, deadline=None)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)
# Lines that hold a text, JSON of any other kind, and bytes that are none; half surrogates as JSON writes them.
TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
ROW = st.one_of(
    TEXT.map(lambda text: json.dumps({"text": text}).encode()),
    st.binary(max_size=12).map(
        lambda text: json.dumps({"text": text.decode("utf-8", "surrogateescape")}, ensure_ascii=False).encode(
            "utf-8", "surrogateescape"
        )
    ),
    st.dictionaries(st.sampled_from(["text", "id", "entropies"]), JSON, max_size=3).map(
        lambda row: json.dumps(row).encode()
    ),
    JSON.map(lambda value: json.dumps(value, indent=1).encode()),
    st.binary(max_size=20),
)
LINES = st.tuples(
    st.sampled_from([b"", b"\xef\xbb\xbf"]), st.lists(ROW, max_size=8), st.sampled_from([b"\n", b"\r\n", b",\n"])
).map(lambda parts: parts[0] + parts[2].join(parts[1]))
PACK = st.sampled_from([bytes, gzip.compress, lzma.compress])
NAME = st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.txt", "a"])


@st.composite
def parquet(draw: st.DrawFn) -> bytes:
    texts = draw(st.lists(st.none() | st.binary(max_size=20), max_size=8))
    kinds = [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())]
    columns = {
        "text": pa.array(texts, pa.binary()).cast(draw(st.sampled_from(kinds))),
        "id": pa.array([draw(st.integers(-(2**62), 2**62)) for _ in texts], pa.timestamp("ns", "No/Where")),
        "entropies": pa.array([draw(st.floats(width=32)) for _ in texts], pa.float32()),
    }
    out = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), out, row_group_size=draw(st.integers(1, 4)))
    return out.getvalue().to_pybytes()


@st.composite
def corrupted(draw: st.DrawFn, whole: bytes) -> bytes:
    """As it is, cut, with other bytes in it, or with something behind it."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 2))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    end = draw(st.integers(0, len(data)) | st.just(len(data)))
    return bytes(data[:end]) + draw(st.sampled_from([b"", b"", b"garbage"]))


@SETTINGS
@given(st.data(), NAME, PACK, LINES, st.sampled_from([40, 1 << 20]))
def test_lines(
    data: st.DataObject, name: str, pack: Callable[[bytes], bytes], lines: bytes, max_row_bytes: int
) -> None:
    check(name, data.draw(corrupted(pack(lines))), max_row_bytes)


@SETTINGS
@given(st.data(), parquet(), st.sampled_from([10, 1 << 20]))
def test_tables(data: st.DataObject, table: bytes, max_row_bytes: int) -> None:
    content = data.draw(corrupted(table))
    check("a.parquet", content, max_row_bytes, same=content.startswith(table))


def check(name: str, content: bytes, max_row_bytes: int, same: bool = True) -> None:
    """
    Args:
        same: all readers give the same documents. Arrow does not notice every wrong byte inside a Parquet file, and
            then gives what lies in memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        if kind_of(str(file)).format is None:  # nobody reads it
            return
        bad = BadRows(10_000)
        with logged() as said:
            documents = read_documents(str(file), bad_rows=bad, stored=False, max_row_bytes=max_row_bytes)
            read = [document.text for _, document in documents]
        assert all(len(line) <= MAX_LINE and line == safe(line) and "\n" not in line for line in said)
        list(read_documents(str(file), bad_rows=BadRows(10_000)))  # what is stored is looked at, too
        found = [
            prepared(file, Path(folder), max_row_bytes),
            or_nothing(trained_on, file, max_row_bytes),
            or_nothing(evaluated, file, max_row_bytes),
        ]
        assert found == [read] * 3 or not same


def prepared(file: Path, folder: Path, max_row_bytes: int) -> list[bytes]:
    """What prepare's reader makes of a file, read as the others read its lines."""
    files = find_inputs([str(file)], folder / "out")
    options = ReadOptions(stored=False, max_row_bytes=max_row_bytes)
    corrupt = BadRowRecord(10_000)
    reader = LineReader(files, options, None, corrupt, 1 << 30, lambda count: None)
    lines = []
    for unit in units_of(files):
        for rows in reader.read(unit):
            ends = [0, *rows.ends.tolist()]
            lines += [bytes(rows.data[ends[line] : ends[line + 1]]) for line in rows.kept]
    assert all(place == safe(place) and "\n" not in place for place in corrupt.places)
    made = folder / "made.jsonl"
    made.write_bytes(b"".join(lines))
    documents = read_documents(str(made), bad_rows=BadRows(10_000), stored=False)
    return [document.text for _, document in documents]


def or_nothing(reader: Reader, file: Path, max_row_bytes: int) -> list[bytes]:
    with suppress(UserError):  # that there is no text
        return reader(str(file), file.parent / "out", "text", max_row_bytes)
    return []
