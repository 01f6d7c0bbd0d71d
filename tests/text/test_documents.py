"""Documents out of files."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.text import BadRow, BadRows, find_files, read_documents
from tests.text.text_files import KINDS, jsonl, logged, write, write_stored

TEXTS = [b"one", "zwei \u00e9 \U0001f600 \u2028 \x85".encode(), b'a\nb\r\n\x00\\"c', b"\xff\xfe raw \x80\xc3", b"x"]


def texts(file: Path, **where: int | str) -> list[bytes]:
    return [document.text for _, document in read_documents(str(file), **where)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_survives(kind: str, tmp_path: Path) -> None:
    """Bytes that are no UTF-8, line ends inside a text, a document of one byte."""
    assert texts(write(tmp_path / f"a.{kind}", TEXTS)) == TEXTS


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=5))
def test_any_bytes_in_jsonl(tmp_path: Path, documents: list[bytes]) -> None:
    assert texts(write(tmp_path / "a.jsonl", documents)) == documents


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a", "a.bin"])
def test_plain_text_is_one_document(name: str, tmp_path: Path) -> None:
    """In any encoding without zero bytes, with line ends and the controls of terminals."""
    data = bytes(range(32, 256)) * 2 + b"\t\r\n\f\x1b[0m"
    assert texts(write(tmp_path / name, [data])) == [data]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_file_and_empty_texts_are_left_out(kind: str, tmp_path: Path) -> None:
    documents = [b"", b"one", b"", b"three", b"four"]
    file = str(write(tmp_path / f"a.{kind}", documents))
    assert [(row, d.text) for row, d in read_documents(file)] == [(1, b"one"), (3, b"three"), (4, b"four")]


def test_parquet_of_many_row_groups(tmp_path: Path) -> None:
    documents = [f"text {i}" for i in range(700)]
    pq.write_table(pa.table({"text": documents}), tmp_path / "a.parquet", row_group_size=100)
    read = list(read_documents(str(tmp_path / "a.parquet")))
    assert [(row, d.text.decode()) for row, d in read] == list(enumerate(documents))


def test_blank_lines_and_several_compressed_parts(tmp_path: Path) -> None:
    lines = b"\n  \n" + jsonl([b"one"]) + b"\n" + jsonl([b"two"]).rstrip(b"\n")
    (tmp_path / "a.jsonl").write_bytes(lines)
    assert texts(tmp_path / "a.jsonl") == [b"one", b"two"]
    for kind in ("gz", "zst"):
        part = write(tmp_path / f"a.jsonl.{kind}", [b"one", b"two"]).read_bytes()
        (tmp_path / f"b.jsonl.{kind}").write_bytes(part + part)
        assert texts(tmp_path / f"b.jsonl.{kind}") == [b"one", b"two"] * 2


def test_text_key(tmp_path: Path) -> None:
    for kind in KINDS:
        assert texts(write(tmp_path / f"a.{kind}", TEXTS, key="content"), text_key="content") == TEXTS


def test_stored_entropies(tmp_path: Path) -> None:
    stored = [[0.1, 0.2, 0.3], [4.0, 5.0]]
    for file in (
        write_stored(tmp_path / "a.parquet", [b"ab", b"c"], stored),
        tmp_path / "a.jsonl",
    ):
        if file.suffix == ".jsonl":
            file.write_text('{"text": "ab", "entropies": [0.1, 0.2, 0.3]}\n{"text": "c", "entropies": [4, 5]}\n')
        read = [document.entropies for _, document in read_documents(str(file))]
        for values, expected in zip(read, stored, strict=True):
            assert values is not None
            assert values.dtype == np.float32
            assert values.tolist() == np.array(expected, dtype=np.float32).tolist()


def test_ten_megabytes_without_a_line_end(tmp_path: Path) -> None:
    data = bytes(range(33, 123)) * 120_000
    assert len(data) > 10_000_000
    for kind in ("txt", "jsonl", "jsonl.zst"):
        assert texts(write(tmp_path / f"a.{kind}", [data])) == [data]


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "inner/c.txt", ".hidden", ".git/d.txt", "inner/.e.txt"):
        write(tmp_path / name, [b"x"])
    named = {name: str(tmp_path / name) for name in ("a.jsonl", "b.txt", "inner/c.txt")}
    assert find_files(str(tmp_path)) == list(named.values())
    assert find_files(str(tmp_path / "b.txt")) == [named["b.txt"]]
    assert find_files(str(tmp_path / "*.txt")) == [named["b.txt"]]
    assert find_files(str(tmp_path / "**" / "*.txt")) == [named["b.txt"], named["inner/c.txt"]]


def test_find_files_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", [b"x"])
    assert find_files("~/a.txt") == [str(tmp_path / "a.txt")]


def test_nothing_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, message in {
        "missing": "does not exist",
        "*.none": "does not exist",
        "empty": "holds no files",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            find_files(str(tmp_path / path))
        assert path in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "two"', r"line 2 is not JSON \(Expecting"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 2 has no text"),
        (b'["text"]', "line 2 is not a JSON object with the key 'text'"),
        (b'{"body": "x", "id": 3}', "line 2 has no text under 'text'; its keys: body, id"),
        (b'{"text": 3}', "line 2 has no text"),
        (b'{"text": null}', "line 2 has no text"),
        (b'{"text": "abc", "entropies": [1, 2, 3]}', "line 2 has 3 entropies for 3 bytes"),
        (b'{"text": "abc", "entropies": [[1, 2, 3, 4]]}', "line 2 has 4 entropies for 3 bytes"),
        (b'{"text": "abc", "entropies": "high"}', "line 2 has entropies that are not a list of numbers"),
        (b'{"text": "abc", "entropies": [[1], [1, 2]]}', "line 2 has entropies that are not a list of numbers"),
        (b'{"text": "abc", "entropies": ["1", "1", "1", "1"]}', "line 2 has entropies that are not a list of numbers"),
        (b'{"text": "abc", "entropies": [1, true, 1, null]}', "line 2 has entropies that are not a list of numbers"),
        (b'{"text": "abc", "entropies": [true, true, true, true]}', "line 2 has entropies that are not a list of num"),
        (b'{"text": "abc", "entropies": [1e39, 1, 1, 1]}', "line 2 has an entropy that is negative or not finite"),
    ],
)
def test_broken_line(line: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        texts(file)
    assert f"'{file}'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_column(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [b"x"], key="body")
    with pytest.raises(UserError, match="has no column 'text'; its columns: id, body"):
        texts(file)


def test_wrong_number_of_stored_entropies(tmp_path: Path) -> None:
    file = write_stored(tmp_path / "a.parquet", [b"ab", b"cd"], [[1, 2, 3], [1, 2]])
    with pytest.raises(UserError, match=r"row 1 has 2 entropies for 2 bytes; there should be one for BOS"):
        texts(file)


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("parquet", 0.0), *((kind, kept) for kind in ("jsonl.gz", "jsonl.zst", "parquet") for kept in (0.1, 0.5, 0.98))],
)
def test_truncated_file(kind: str, kept: float, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    whole = write(tmp_path / f"a.{kind}", [random.bytes(200).hex().encode() for _ in range(300)])
    data = whole.read_bytes()
    whole.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=r"is not whole|cannot be read|not a whole") as caught:
        texts(whole)
    assert f"'{whole}'" in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_file_of_another_kind(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{kind}"
    file.write_bytes(b"these are no compressed bytes at all " * 20)
    with pytest.raises(UserError, match="line 1 is not JSON" if "jsonl" in kind else "not a whole Parquet file"):
        texts(file)


def test_corrupted_gzip(tmp_path: Path) -> None:
    """Bits that turned over inside, so that decompression itself fails."""
    file = write(tmp_path / "a.jsonl.gz", [b"x" * 1000])
    data = bytearray(file.read_bytes())
    data[10:14] = b"\xff\xff\xff\xff"
    file.write_bytes(data)
    with pytest.raises(UserError, match="is not whole: after 0 decompressed bytes"):
        texts(file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_of_more_digits_than_python_reads(name: str, tmp_path: Path) -> None:
    rows = [b'{"number": ' + b"9" * 10_000 + b', "text": "first"}', b'{"text": "second"}']
    (tmp_path / name).write_bytes(b"\n".join(rows) if name == "a.jsonl" else b"[" + b",\n".join(rows) + b"]")
    assert texts(tmp_path / name) == [b"first", b"second"]


@pytest.mark.parametrize("length", [1, 3 << 20])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b'{"text": oops}', "Expecting value"),
        (b'{"text": "a ] } \\" b", "x": }', "Expecting value"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "text": "b"}', "nested too deeply"),
    ],
)
def test_a_bad_value_costs_itself_alone(value: bytes, reason: str, length: int, tmp_path: Path) -> None:
    """In an array, also where it is longer than what is read at once."""
    long = value.replace(b'{"', b'{"y": "' + b"}" * length + b'", "', 1)
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, ' + long + b',\n{"text": "c"}]')
    with logged() as said:
        found = list(read_documents(str(tmp_path / "a.json"), bad_rows=BadRows(1)))
    assert [(row, document.text) for row, document in found] == [(0, b"a"), (2, b"c")]
    (line,) = said
    assert "value 2 is not JSON" in line
    assert reason in line


def test_a_value_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, {"text": "b, "x": 1},\n{"text": "c"}]')
    bad = BadRows(1)
    found = list(read_documents(str(tmp_path / "a.json"), bad_rows=bad))
    assert [document.text for _, document in found][:1] == [b"a"]
    assert bad.count == 1


def test_two_columns_of_entropies(tmp_path: Path) -> None:
    columns = [pa.array(["ab"]), pa.array([[1.0] * 3]), pa.array([[1.0] * 3])]
    pq.write_table(pa.table(columns, names=["text", "entropies", "entropies"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has 2 columns 'entropies'"):
        texts(tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", stored=False) == [b"ab"]


@pytest.mark.parametrize("begin", [b"ORCHIDS", b"FEA1 of 3", b"GIF89 was", b"Obj\x01", b"ARROW1"])
def test_texts_that_begin_as_binary_files_do(begin: bytes, tmp_path: Path) -> None:
    text = begin + b" grow on trees." * 9
    (tmp_path / "a.txt").write_bytes(text)
    assert texts(tmp_path / "a.txt") == [text]


def test_a_reason_with_an_apostrophe_is_not_shortened_before_what_was_lost() -> None:
    lost = "is not whole: after 524,288 decompressed bytes the rest of 303,455 bytes cannot be read"
    with logged() as said:
        BadRows(1)(BadRow("a.jsonl.zst", f"{lost}: the data doesn't match; {'more ' * 30}"))
        BadRows(1)(BadRow(f"{'long/' * 40}a.jsonl.zst", f"{lost}: the data doesn't match"))
    assert len(said) == 2
    assert all(lost in line and "a.jsonl.zst'" in line and len(line) <= 200 for line in said)


@pytest.mark.parametrize("end", ["", ",", ",\n "])
def test_an_array_cut_short_between_its_values(end: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(f'[{{"text": "a"}}, {{"text": "b"}}{end}')
    with logged() as said:
        found = [document.text for _, document in read_documents(str(tmp_path / "a.json"), bad_rows=BadRows(1))]
    assert found == [b"a", b"b"]
    assert "is not whole: its array has no end after 2 values" in said[0]
