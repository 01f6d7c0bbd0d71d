"""Every kind of file gives the same documents to every command."""

import bz2
import gzip
import json
import lzma
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bytelatent.errors import UserError
from bytelatent.model import ByteLM
from bytelatent.text import MAX_ROW_BYTES
from tests.model.tiny import tiny_byte_lm
from tests.text.every_reader import READERS, with_entropies
from tests.text.text_files import TABLES, jsonl

CASES = Path(__file__).parent / "cases"
TEXTS = ["one", "zwei \u00e9 \U0001f600 \u2028", 'a\nb\r\n\x00\\"c', "a b c", "x"]
BYTES = [text.encode() for text in TEXTS] + [b"\xff\xfe raw \x80\xc3", b"\xed\xa0\xbd half \xff"]
MARK = b"\xef\xbb\xbf"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return out.getvalue().to_pybytes()


def file(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def table(name: str, columns: dict[str, Any], format: str = "") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        TABLES[format or name.partition(".")[2]](folder / name, pa.table(columns), 3)
        return folder / name

    return make


def case(name: str) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copy(CASES / name, folder))


LINES = jsonl(BYTES)
ARRAY = json.dumps([{"id": 1, "text": text} for text in TEXTS], indent=1).encode()
ODD = {"when": pa.array([1] * len(TEXTS), pa.timestamp("ns", "Mars/Phobos")), "n": [{"a": b"\xff"}] * len(TEXTS)}
NOTE, ZSTD_NOTE = b"hello plain text that was compressed. ", b"hello zstd plain text. "

SOURCES: dict[str, tuple[Callable[[Path], Path], list[bytes]]] = {
    "jsonl": (file("a.jsonl", LINES), BYTES),
    "upper case": (file("A.JSONL", LINES), BYTES),
    "ndjson": (file("a.ndjson", LINES), BYTES),
    "a mark": (file("a.jsonl", MARK + LINES), BYTES),
    "of Windows": (file("a.jsonl", LINES.replace(b"\n", b"\r\n")), BYTES),
    "gz": (file("a.jsonl.gz", gzip.compress(LINES)), BYTES),
    "GZ, a mark": (file("a.JsonL.GZ", gzip.compress(MARK + LINES)), BYTES),
    "zst": (file("a.jsonl.zst", zstd(LINES)), BYTES),
    "xz": (file("a.jsonl.xz", lzma.compress(LINES)), BYTES),
    "bz2": (file("a.jsonl.bz2", bz2.compress(LINES)), BYTES),
    "two members": (file("a.jsonl.bz2", bz2.compress(LINES) + bz2.compress(LINES)), BYTES * 2),
    "not as it is named": (file("a.jsonl.xz", gzip.compress(LINES)), BYTES),
    "plain, named gz": (file("a.jsonl.gz", LINES), BYTES),
    "gz, not named so": (file("a.jsonl", gzip.compress(LINES)), BYTES),
    "lines named json": (file("a.json", LINES), BYTES),
    "an array": (file("a.json", ARRAY), [text.encode() for text in TEXTS]),
    "an array in gz": (file("a.json.gz", gzip.compress(MARK + ARRAY)), [text.encode() for text in TEXTS]),
    "an array on a line": (file("a.json", json.dumps(json.loads(ARRAY)).encode()), [text.encode() for text in TEXTS]),
    "objects of several lines": (file("a.json", b'{\n"text": "a"\n}\n{\n"text": "b\xff"\n}'), [b"a", b"b\xff"]),
    "text": (file("a.txt", MARK + "caf\u00e9".encode("latin-1")), [b"caf\xe9"]),
    "text without an ending": (file("README", b"read me"), [b"read me"]),
    "text in xz": (file("a.md.xz", lzma.compress(b"read me")), [b"read me"]),
    "note.txt.gz": (case("note.txt.gz"), [NOTE * 20]),
    "note.txt.zst": (case("note.txt.zst"), [ZSTD_NOTE * 50]),
    "lines.json": (case("lines.json"), [b"row %d" % row for row in range(50)]),
    "pretty.json.gz": (case("pretty.json.gz"), [b"pretty printed"]),
    "bom.jsonl": (case("bom.jsonl"), [b"first row", b"second row"]),
    "ns.parquet": (case("ns.parquet"), [b"a b c", b"d e f"]),
    "tz.parquet": (case("tz.parquet"), [b"a b c", b"d e f"]),
    "badutf8.parquet": (case("badutf8.parquet"), [b"a\xffb", b"cde"]),
    "dict.parquet": (case("dict.parquet"), [b"a b c", b"d e f", b"a b c"]),
    "surrid.jsonl": (case("surrid.jsonl"), [b"row one", b"row two"]),
    "x.jsonl.xz": (case("x.jsonl.xz"), [b"a"] * 20),
    "plain.jsonl.gz": (case("plain.jsonl.gz"), [b"a"]),
    "trail.jsonl.gz": (case("trail.jsonl.gz"), [b"a"]),
    "mixsurr.jsonl": (case("mixsurr.jsonl"), [b"half \xed\xa0\xbd and raw \xff"]),
    "entnan.jsonl": (case("entnan.jsonl"), [b"ab"]),
    "a number of entropies": (file("a.jsonl", b'{"text":"a","entropies":3.2}\n'), [b"a"]),
}

COLUMNS: dict[str, dict[str, Any]] = {
    "strings": {"text": TEXTS},
    "a dictionary": {"text": pa.array(TEXTS).dictionary_encode()},
    "odd columns": {**ODD, "text": TEXTS, "id": ODD["n"]},
    "large strings": {"text": pa.array(TEXTS, pa.large_string())},
}
for format in TABLES:
    texts = [text.encode() for text in TEXTS]
    SOURCES[format] = table(f"a.{format}", {"text": pa.array(BYTES, pa.binary())}), BYTES
    SOURCES[f"{format} without an ending"] = table("a", COLUMNS["strings"], format), texts
    SOURCES |= {f"{name} in {format}": (table(f"a.{format}", columns), texts) for name, columns in COLUMNS.items()}

READ_BY_CALIBRATION = {"entnan.jsonl", "a number of entropies"}  # where entropies are read, these are bad rows


def folder_of_everything(place: Path) -> Path:
    """Text of several kinds, what is none, links in a circle, a pipe, and a name that is no UTF-8."""
    inner = place / "notes" / "inner"
    inner.mkdir(parents=True)
    (place / "notes" / "a.txt").write_bytes(b"a note")
    (place / "notes" / "picture.png").write_bytes(PNG)
    (place / "notes" / "table.csv").write_bytes(b"text\na\n")
    (place / "notes" / "table.arrow").write_bytes(b"ARROW1\0\0")
    (place / "notes" / "binary").write_bytes(b"ab\0cd")
    (place / "notes" / "manifest.json").write_text(json.dumps({"format": 1, "request": {}}, indent=1))
    (place / "notes" / ".hidden").write_bytes(b"hidden")
    (inner / "b.jsonl").write_bytes(jsonl([b"in a folder"]))
    (inner / "circle").symlink_to(place / "notes")
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "c.txt").write_bytes(b"behind a link")
    (place / "notes" / "link").symlink_to(place / "elsewhere")
    (place / "notes" / "second link").symlink_to(place / "elsewhere")
    os.mkfifo(place / "notes" / "pipe.jsonl")
    (place / "notes" / "broken").symlink_to(place / "nowhere")
    with open(os.fsencode(place / "notes") + b"/caf\xe9.txt", "wb") as odd:
        odd.write(b"a name in another encoding")
    return place / "notes"


SOURCES["a folder"] = (
    folder_of_everything,
    [b"a note", b"in a folder", b"behind a link", b"a name in another encoding"],
)
SOURCES["a glob"] = (
    lambda place: folder_of_everything(place) / "**",
    [b"a note", b"in a folder", b"behind a link", b"a name in another encoding"],
)


@pytest.fixture(scope="module")
def byte_lm() -> ByteLM:
    return tiny_byte_lm(window=6)


@pytest.mark.parametrize("kind", SOURCES)
def test_the_same_documents(kind: str, tmp_path: Path, byte_lm: ByteLM) -> None:
    make, expected = SOURCES[kind]
    (tmp_path / "in").mkdir()
    source = make(tmp_path / "in")
    for number, (name, reader) in enumerate({**READERS, "entropies": with_entropies(byte_lm)}.items()):
        if name == "calibrate" and kind in READ_BY_CALIBRATION:
            with pytest.raises(UserError, match="could be read"):
                reader(str(source), tmp_path / f"out{number}", "text", MAX_ROW_BYTES)
            continue
        found = reader(str(source), tmp_path / f"out{number}", "text", MAX_ROW_BYTES)
        wanted = sorted(set(expected)) if "dedup" in name else sorted(expected)
        assert sorted(found) == wanted, name


def test_another_key(tmp_path: Path, byte_lm: ByteLM) -> None:
    for number, (name, reader) in enumerate({**READERS, "entropies": with_entropies(byte_lm)}.items()):
        found = reader(str(CASES / "content.jsonl"), tmp_path / f"out{number}", "content", MAX_ROW_BYTES)
        assert found == [b"hello world"], name


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", *(f"a.{name}" for name in TABLES), "folder"])
def test_rows_that_are_too_long(name: str, compressed: bool, tmp_path: Path, byte_lm: ByteLM) -> None:
    texts = [b"first", b"x" * 2000, b"third", b"y" * 3000, b"z"]
    source = tmp_path / "in" / name
    source.parent.mkdir()
    pack = gzip.compress if compressed else bytes
    if writer := TABLES.get(source.suffix[1:]):
        writer(source, pa.table({"text": texts}), len(texts))
    elif name == "folder":
        source.mkdir()
        for number, text in enumerate(texts):
            (source / f"{number}.txt").write_bytes(pack(text))
    else:
        array = json.dumps([{"text": text.decode()} for text in texts], indent=1).encode()
        source.write_bytes(pack(jsonl(texts) if name == "a.jsonl" else array))
    for number, (reader_name, reader) in enumerate({**READERS, "entropies": with_entropies(byte_lm)}.items()):
        found = reader(str(source), tmp_path / f"out{number}", "text", 1000)
        assert sorted(found) == [b"first", b"third", b"z"], reader_name
