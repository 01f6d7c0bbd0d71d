"""Compressed files: whole, cut short, damaged, followed by something else, and far larger than they look."""

import bz2
import gzip
import lzma
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.prepare.plan import InputFile, Unit
from bytelatent.prepare.scatter import BadRowRecord, LineReader
from bytelatent.text import BadRows, ReadOptions, read_documents
from bytelatent.text.streams import TextReader, compression_of
from tests.text.test_every_reader import CASES, zstd
from tests.text.text_files import logged

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}
LINES = b"".join(b'{"text":"row %d %d"}\n' % (row, row * 7919) for row in range(20_000))


def read(data: bytes) -> tuple[bytes, str | None]:
    """What is read of compressed bytes, and what is said to be lost."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with TextReader(file.name, compression_of(data)) as stream:
            return stream.read(), stream.unread


@pytest.mark.parametrize("how", PACK)
def test_whole_files(how: str) -> None:
    packed = PACK[how](LINES)
    assert compression_of(packed) == how
    assert read(packed) == (LINES, None)
    assert read(packed + packed) == (LINES * 2, None)
    assert read(packed + b"\0" * 100_000) == (LINES, None)  # padding
    assert read(PACK[how](b"")) == (b"", None)
    assert compression_of(b"BZh9 is how this text begins") is None


@pytest.mark.parametrize("how", PACK)
def test_something_else_behind(how: str) -> None:
    text, damage = read(PACK[how](LINES) + b"garbage")
    assert text == LINES
    assert (
        damage
        == f"is not whole: after {len(LINES):,} decompressed bytes its last 7 bytes are not read: they are no {how}"
    )


@pytest.mark.parametrize("how", PACK)
@pytest.mark.parametrize("cut", [1, 5, 20, 1000])
def test_a_file_cut_short(how: str, cut: int) -> None:
    packed = PACK[how](LINES)[:-cut]
    text, damage = read(packed)
    assert LINES.startswith(text)
    blocks = {"gzip": 8000, "xz": 8000, "bzip2": len(LINES), "zstd": 1 << 17}  # what only comes whole
    assert len(text) >= len(LINES) - blocks[how] - 7 * cut
    assert damage == (
        f"is not whole: after {len(text):,} decompressed bytes the rest of {len(packed):,} bytes of {how} cannot be "
        "read: it is cut short"
    )


def test_gzip_gives_all_before_a_wrong_sum() -> None:
    """Python's own object loses a small file as a whole."""
    packed = bytearray(gzip.compress(b'{"text":"a"}\n' * 5))
    packed[-6] ^= 255
    text, damage = read(bytes(packed))
    assert text == b'{"text":"a"}\n' * 5
    assert "incorrect data check" in str(damage)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(PACK)), st.binary(max_size=3000), st.data())
def test_any_change_of_a_byte(how: str, text: bytes, data: st.DataObject) -> None:
    packed = bytearray(PACK[how](text))
    packed[data.draw(st.integers(min(10, len(packed) - 1), len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    if compression_of(bytes(packed)) == how:
        found, damage = read(bytes(packed))
        assert found == text or damage is not None or how == "zstd"  # which has no checksum here


def test_a_long_window() -> None:
    found = [document.text for _, document in read_documents(str(CASES / "long31.jsonl.zst"))]
    assert len(found) == 200_000
    assert found[:2] == [b"row 1", b"row 2"] or found[:2] == [b"row 0", b"row 1"]


def test_zstd_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES))
    with pytest.raises(UserError, match=r"a\.jsonl\.zst' needs the package .*zstd; run: pip install 'bytelatent"):
        list(read_documents(str(tmp_path / "a.jsonl.zst")))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.xz", "a.json.gz", "zeros.jsonl.gz", "a.jsonl"])
def test_memory_stays_flat(name: str, tmp_path: Path) -> None:
    """A row of 64 MB, in some kB."""
    byte = b"\0" if name.startswith("zeros") else b"a"
    pack = {"gz": gzip.GzipFile, "xz": lzma.LZMAFile}.get(name.rpartition(".")[2], open)
    file = tmp_path / name
    with pack(file, "wb") as out:
        out.write(b'[{"text": "b"},\n{"text": "' if ".json." in name else b'{"text": "b"}\n')
        for _ in range(32):
            out.write(byte * (2 << 20))
        out.write(b'\n{"text": "c"}\n')
    kind, compression = {"json": ("json", "gzip"), "txt": ("text", "xz")}.get(name.split(".")[1], ("packed", "gzip"))
    kind, compression = ("lines", None) if name == "a.jsonl" else (kind, compression)
    corrupt = BadRowRecord(10)
    reader = LineReader(
        [InputFile(str(file), name, file.stat().st_size, 0, kind, compression)],
        ReadOptions(max_row_bytes=1 << 20),
        None,
        corrupt,
        1 << 30,
        lambda count: None,
    )
    bad = BadRows(10)
    tracemalloc.start()
    try:
        found = [d.text for _, d in read_documents(str(file), bad_rows=bad, max_row_bytes=1 << 20)]
        size = file.stat().st_size
        made = sum(len(rows.kept) for rows in reader.read(Unit(kind, [0], 0, size, size)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20
    assert found == {"txt": [], "json": [b"b"]}.get(name.split(".")[1], [b"b", b"c"])
    assert made == len(found)
    assert bad.count == len(corrupt.places) == 1
    assert "max_row_bytes (1,048,576)" in corrupt.places[0]


@pytest.mark.parametrize("bracket", [b"[", b'{"a":'])
def test_brackets_without_an_end(bracket: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.json.gz"
    with gzip.open(file, "wb", compresslevel=1) as out:
        out.write(b'[{"text": "b"},\n')
        for _ in range(24):
            out.write(bracket * (1 << 20))
    bad = BadRows(1)
    begin = time.process_time()
    assert [d.text for _, d in read_documents(str(file), bad_rows=bad)] == [b"b"]
    assert bad.count == 1
    assert time.process_time() - begin < 5


def test_random_bytes_are_never_a_traceback(tmp_path: Path) -> None:
    """Of every kind, by prepare's reader and by the others', with the same documents."""
    chance = random.Random(0)
    for number in range(150):
        data = chance.randbytes(chance.randrange(200))
        if number % 3 == 0:
            data = gzip.compress(data)[: chance.randrange(1, 200)]
        name = chance.choice(["a.jsonl", "a.json", "a.parquet", "a.txt", "a.jsonl.gz", "a"])
        (tmp_path / name).write_bytes(data)
        with logged() as said:
            list(read_documents(str(tmp_path / name), bad_rows=BadRows(1000)))
        assert all(line.isprintable() for line in said)
