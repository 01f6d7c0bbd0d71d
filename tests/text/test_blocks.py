"""Blocks: every document in exactly one, in whatever order they are read."""

import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.text import BadRow, DocumentBlock, open_blocks, read_documents, readers, tables
from tests.text.text_files import KINDS, TABLES, write

LONG = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tables, "BLOCK_ROWS", 3)


def in_blocks(file: Path, order: list[int] | None = None) -> list[list[tuple[int, bytes]]]:
    """Each block's rows and texts, read in an order; all of them."""
    reader = open_blocks(str(file))
    found = {}
    index = 0
    while order is None and (block := reader.read(index)) is not None:
        found[index] = block
        index += 1
    for index in order or []:
        block = reader.read(index)
        assert block is not None
        found[index] = block
    return [[(row, document.text) for row, document in found[i].documents] for i in sorted(found)]


@LONG
@given(st.sampled_from(KINDS), st.lists(st.binary(max_size=150), min_size=1, max_size=12), st.randoms())
def test_blocks_hold_each_document_once(
    tmp_path: Path, kind: str, documents: list[bytes], shuffle: random.Random
) -> None:
    file = write(tmp_path / f"a.{kind}", documents)
    rows = [(row, text) for row, text in enumerate(documents) if text]
    forward = in_blocks(file)
    assert [found for block in forward for found in block] == rows
    assert [(row, document.text) for row, document in read_documents(str(file))] == rows
    order = list(range(len(forward)))
    shuffle.shuffle(order)
    assert [[text for _, text in block] for block in in_blocks(file, order)] == [[t for _, t in b] for b in forward]
    count = open_blocks(str(file)).count()
    assert count == len(forward) if "." not in kind else count is None
    reader = open_blocks(str(file))
    assert reader.read(len(forward)) is None
    assert reader.read(len(forward) + 5) is None
    assert reader.read(0) is not None


@pytest.mark.parametrize("name", TABLES)
def test_row_groups_that_no_block_divides(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{name}"
    TABLES[name](file, pa.table({"text": [f"text {i}" for i in range(23)]}), 7)
    assert [len(block) for block in in_blocks(file)] == [3, 3, 1, 3, 3, 1, 3, 3, 1, 2]
    assert [len(block) for block in in_blocks(file, [2, 8, 1])] == [3, 1, 1]


def test_a_line_longer_than_blocks(tmp_path: Path) -> None:
    documents = [b"a", b"b" * 1000, b"c", b"d" * 500]
    for kind in KINDS[:3]:
        found = in_blocks(write(tmp_path / f"a.{kind}", documents))
        assert [text for block in found for _, text in block] == documents
        assert len(found) > 15


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("forward", [True, False])
def test_corrupted_lines_are_named_and_the_others_read(kind: str, forward: bool, tmp_path: Path) -> None:
    documents = [b"x" * 40 for _ in range(12)]
    file = write(tmp_path / "a.jsonl", documents)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1], lines[9] = b'{"text": "cut off\n', b'{"other": 1}\n'
    file.write_bytes(b"".join(lines))
    if kind != "jsonl":
        file = tmp_path / f"a.{kind}"
        whole = (tmp_path / "a.jsonl").read_bytes()
        if kind.endswith("gz"):
            import gzip

            file.write_bytes(gzip.compress(whole))
        else:
            with pa.CompressedOutputStream(str(file), "zstd") as out:
                out.write(whole)
    num_blocks = len(in_blocks(file))
    reader = open_blocks(str(file))
    order = range(num_blocks) if forward else range(num_blocks - 1, -1, -1)
    found = [reader.read(index) for index in order]
    assert sum(len(block.documents) for block in found if block) == 10
    lines_named = sorted(str(error) for block in found if block for error in block.bad_rows)
    assert ["line 10 has no text" in lines_named[0], "line 2 is not JSON" in lines_named[1]] == [True, True]
    with pytest.raises(BadRow, match="line 2 is not JSON"):
        list(read_documents(str(file)))


@pytest.mark.parametrize("name", TABLES)
def test_a_null_among_texts(name: str, tmp_path: Path) -> None:
    TABLES[name](tmp_path / f"a.{name}", pa.table({"text": ["a", None, "b", "c"]}), 4)
    block = open_blocks(str(tmp_path / f"a.{name}")).read(0)
    assert block is not None
    assert [row for row, _ in block.documents] == [0, 2]
    assert [str(error) for error in block.bad_rows] == [
        f"data: '{tmp_path}/a.{name}' row 1 has no text under 'text'; its columns: text"
    ]


@pytest.mark.parametrize("name", TABLES)
def test_a_column_of_numbers_is_no_text(name: str, tmp_path: Path) -> None:
    TABLES[name](tmp_path / f"a.{name}", pa.table({"text": [1, 2]}), 2)
    with pytest.raises(BadRow, match="holds no text in column 'text' but int64"):
        open_blocks(str(tmp_path / f"a.{name}")).read(0)


@pytest.mark.parametrize("name", TABLES)
def test_columns_of_other_meaning(name: str, tmp_path: Path) -> None:
    """`starts` of somebody else are left alone; `entropies` that are none are an error."""
    one, other = tmp_path / f"a.{name}", tmp_path / f"b.{name}"
    TABLES[name](one, pa.table({"text": ["ab", "c"], "starts": [7, 8], "id": [3, None]}), 2)
    found = [document for _, document in read_documents(str(one))]
    assert [(document.text, document.id, document.starts) for document in found] == [
        (b"ab", "3", None),
        (b"c", None, None),
    ]
    TABLES[name](other, pa.table({"text": ["ab"], "entropies": ["high"]}), 1)
    with pytest.raises(UserError, match="holds in column 'entropies' no lists of floats but string"):
        list(read_documents(str(other)))


@pytest.mark.parametrize("name", TABLES)
def test_a_cut_table_is_corrupted(name: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"a.{name}", [f"text {i} {i * 7919}".encode() for i in range(400)])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadRow, match="is not a whole"):
        in_blocks(file)


@pytest.mark.parametrize("cut", [1, 9, 20, 200])
def test_what_was_decompressed_is_read(cut: int, tmp_path: Path) -> None:
    """All of the last block, too, and the loss is said once."""
    texts = [f"text {i} {i * 7919}".encode() for i in range(400)]
    file = write(tmp_path / "a.jsonl.gz", texts)
    file.write_bytes(file.read_bytes()[:-cut])
    reader, found = open_blocks(str(file)), list[DocumentBlock]()
    while (block := reader.read(len(found))) is not None:
        found.append(block)
    read = [document.text for block in found for _, document in block.documents]
    assert read == texts[: len(read)]
    assert len(read) == 400 if cut < 20 else 300 < len(read) < 400
    (error,) = [error for block in found for error in block.bad_rows]
    assert "is not whole: after" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_over_fsspec(kind: str, tmp_path: Path) -> None:
    import fsspec

    documents = [f"text {i} ".encode() * (i + 1) for i in range(20)]
    local = write(tmp_path / f"a.{kind}", documents)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{tmp_path.name}/a.{kind}", local.read_bytes())
    found = [document.text for _, document in read_documents(f"memory://{tmp_path.name}/a.{kind}")]
    assert found == documents
    remote = open_blocks(f"memory://{tmp_path.name}/a.{kind}")
    here = open_blocks(str(local))
    assert remote.count() == here.count()
    for index in (3, 1, 0, 2):
        assert [d.text for _, d in remote.read(index).documents] == [d.text for _, d in here.read(index).documents]  # type: ignore[union-attr]
