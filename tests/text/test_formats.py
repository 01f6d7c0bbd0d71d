"""The table of formats is complete: each has cases that are read and one that is refused, by every command."""

from contextlib import suppress
from pathlib import Path

import pytest

from bytelatent.commands.generate import GenerateSettings, _rows
from bytelatent.errors import UserError
from bytelatent.model import ByteLM
from bytelatent.text import MAX_ROW_BYTES, BadRow, BlockReader, ReadOptions, find_files, open_blocks, read_documents
from bytelatent.text.formats import BINARY, FORMATS, JSONL, TEXT, is_named_as_text, kind_of, without_suffix
from bytelatent.text.streams import COMPRESSIONS
from tests.model.tiny import tiny_byte_lm
from tests.text.every_reader import READERS, with_entropies
from tests.text.test_every_reader import SOURCES
from tests.text.text_files import TABLES

REFUSED = {  # of each format: a file of which no document can be read
    "lines": ("a.jsonl", b"{broken\n", "line 1 is not JSON"),
    "json": ("a.json", b"[{broken\n]", "value 1 is not JSON"),
    "parquet": ("a.parquet", b"PAR1 cut short", "is not a whole Parquet file"),
    "text": ("a.txt", b"ab\0cd", "is binary data, which is not read as text"),
}


def format_of_case(kind: str, folder: Path) -> str | None:
    source = SOURCES[kind][0](folder)
    found = kind_of(str(source)).format if source.is_file() else None
    return None if found is None else found.name


def test_every_format_has_cases(tmp_path: Path) -> None:
    """`test_every_reader` reads each case by every command."""
    found = set()
    for number, kind in enumerate(SOURCES):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.add(format_of_case(kind, folder))
    assert found >= FORMATS.keys()
    assert REFUSED.keys() == FORMATS.keys()
    assert TABLES.keys() == {name for name, format in FORMATS.items() if format.magic}, "a writer for text_files.TABLES"


@pytest.fixture(scope="module")
def byte_lm() -> ByteLM:
    return tiny_byte_lm(window=6)


@pytest.mark.parametrize("name", FORMATS)
def test_what_cannot_be_read_is_refused_by_every_command(name: str, tmp_path: Path, byte_lm: ByteLM) -> None:
    file_name, content, message = REFUSED[name]
    source = tmp_path / "in" / file_name
    source.parent.mkdir()
    source.write_bytes(content)
    with pytest.raises(BadRow, match=message):
        list(read_documents(str(source)))
    for number, (command, reader) in enumerate({**READERS, "entropies": with_entropies(byte_lm)}.items()):
        found: list[bytes] = []
        with suppress(UserError):
            found = reader(str(source), tmp_path / f"out{number}", "text", MAX_ROW_BYTES)
        assert found == [], command


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_complete(name: str, tmp_path: Path) -> None:
    found = FORMATS[name]
    assert found.title
    assert found.expansion >= 1
    assert found.suffixes or found is TEXT
    assert not found.magic or not any(found.magic.startswith(magic) for magic in BINARY), (
        "BINARY lists what is not read"
    )
    for method in ("count", "read", "rows"):
        of_its_own = getattr(found.reader, method) is not getattr(BlockReader, method)
        assert of_its_own or (found, method) == (JSONL, "rows"), f"{found.reader.__name__}.{method}"
    for suffix in found.suffixes:
        assert is_named_as_text(f"a{suffix}") == found.suffix_decides
        assert without_suffix(f"a{suffix}") == without_suffix(f"a{suffix.upper()}").lower() == "a"
        for compression in COMPRESSIONS.values():
            assert (without_suffix(f"a{suffix}{compression.suffix}") == "a") == found.compressible


def test_rows_are_whole(tmp_path: Path) -> None:
    """For `blt prepare`: all keys or columns, and the text in bytes."""
    for number, kind in enumerate(SOURCES):
        folder = tmp_path / str(number)
        folder.mkdir()
        source, documents = SOURCES[kind][0](folder), SOURCES[kind][1]
        if not source.is_file() or kind_of(str(source)).format is JSONL:
            continue
        rows = list(open_blocks(str(source), ReadOptions(stored=False)).rows())
        assert [row["text"] for row in rows if not isinstance(row, BadRow)] == documents, kind


def test_messages_name_every_format(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab\0cd")
    with pytest.raises(UserError) as refused:
        find_files(str(tmp_path / "a"))
    assert all(found.title in str(refused.value) for found in FORMATS.values())


@pytest.mark.parametrize("name", FORMATS)
def test_the_docs_name_every_format(name: str) -> None:
    """In a row of the table of what is read, by a suffix or the title."""
    page = (Path(__file__).parents[2] / "docs" / "prepare.md").read_text(encoding="utf-8")
    rows = [row for row in page.partition("## What is read")[2].splitlines() if "| not read" not in row]
    names = [*FORMATS[name].suffixes, FORMATS[name].title.split()[0]]
    assert any(known in row.split("|")[1] for row in rows if row.startswith("| ") for known in names)


@pytest.mark.parametrize("name", FORMATS)
def test_prompts_of_generate(name: str, tmp_path: Path) -> None:
    """Prompts are read from JSONL; any other format with rows is refused in one line."""
    found = FORMATS[name]
    if found in (JSONL, TEXT):
        return
    file = tmp_path / f"a{found.suffixes[0]}"
    file.write_bytes(found.magic or b'[\n{"prompt": "a"}]')
    with pytest.raises(UserError, match="is not JSONL"):
        list(_rows(GenerateSettings(jsonl=str(file))))
