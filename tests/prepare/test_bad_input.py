"""Corrupt rows, torn files, full disks and folders nobody may write to."""

import gzip
import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bytelatent.errors import UserError
from bytelatent.prepare import run as running
from tests.prepare.folders import lines, made, made_here, manifest, rows, texts
from tests.text.text_files import write


def test_corrupt_lines_are_left_out_and_named(tmp_path: Path, many_parts: None) -> None:
    good = rows(500)
    bad = [b"no json\n", b'{"text": "torn\n', b'["text"]\n', b"\x00\x01\n"]
    mixed = [*good[:300], bad[0], b"\n", *good[300:], *bad[1:]]
    (tmp_path / "a.jsonl").write_bytes(b"".join(mixed))
    out = made_here(tmp_path / "out", tmp_path / "a.jsonl", max_bad_rows=4)
    assert sorted(lines(out)) == sorted(good)
    found = manifest(out)["corrupt"]
    assert found["rows"] == 4
    place = f"'{tmp_path / 'a.jsonl'}' at byte {len(b''.join(good[:300]))}"
    assert f"{place} is not a JSON object" in found["places"]
    with pytest.raises(UserError, match="more than 3 rows are bad"):
        made(tmp_path / "2", tmp_path / "a.jsonl", max_bad_rows=3)


def test_the_limit_is_for_all_tasks_together(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(b"bad\n" + b"".join(rows(3)))
    with pytest.raises(UserError, match="more than 1 rows are bad"):
        made_here(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.jsonl", max_bad_rows=1)


def test_rows_without_text_are_corrupt_where_they_are_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": 1}\n{"other": "b"}\n{broken}\n')
    pq.write_table(pa.table({"text": ["b", None, "c"], "n": [1, 2, 3]}), tmp_path / "b.parquet")
    out = made_here(tmp_path / "out", tmp_path / "a.jsonl", tmp_path / "b.parquet", dedup=True)
    assert sorted(texts(out)) == [b"a", b"b", b"c"]
    assert manifest(out)["corrupt"]["rows"] == 4
    with pytest.raises(UserError, match="has no column 'body'; its columns: text, n"):
        made(tmp_path / "2", tmp_path / "b.parquet", text_key="body")


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_cut_file_is_one_corrupt_row_and_what_was_before_stays(tmp_path: Path, kind: str, many_parts: None) -> None:
    chance = random.Random(0)
    some = [b"%d %s" % (i, bytes(chance.choices(b"abcdefgh", k=400))) for i in range(300)]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.jsonl", [b"whole"])
    cut = write(tmp_path / "in" / f"b.{kind}", some)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    out = made_here(tmp_path / "out", tmp_path / "in")
    found = sorted(set(texts(out)) - {b"whole"})
    assert manifest(out)["corrupt"]["rows"] == 1
    assert re.search("is not (a )?whole", manifest(out)["corrupt"]["places"][0])
    assert found == sorted(some[: len(found)])
    if kind == "jsonl.gz":
        assert len(found) > 100
    made_again = made_here(tmp_path / "2", tmp_path / "in")
    assert lines(made_again) == lines(out)


def test_parquet_columns_of_all_kinds_become_json(tmp_path: Path) -> None:
    import datetime
    import decimal

    table = {
        "text": pa.array([b"ok", b"\xff"], pa.binary()),
        "when": pa.array([datetime.datetime(2024, 1, 2), None]),
        "price": pa.array([decimal.Decimal("1.50"), None]),
        "nested": [{"a": [1, 2]}, {"a": []}],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    out = made_here(tmp_path / "out", tmp_path / "a.parquet", validation=0)
    found = sorted((json.loads(line) for line in lines(out)), key=lambda row: len(row["text"] + str(row["when"])))
    assert found[1] == {"text": "ok", "when": "2024-01-02T00:00:00", "price": "1.50", "nested": {"a": [1, 2]}}
    assert sorted(texts(out)) == [b"ok", b"\xff"]


def test_a_line_too_long_for_the_memory(tmp_path: Path, many_parts: None) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows(9)) + b'{"text": "' + b"x" * 9000 + b'"}\n')
    with pytest.raises(UserError, match=r"--memory: too little for a line"):
        made(tmp_path / "out", tmp_path / "a.jsonl")


def test_a_folder_nobody_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows(9)))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .* is a file"):
        made(tmp_path / "file", tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"--out: .*cannot be written"):
        made(tmp_path / "file" / "out", tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"--out: .*cannot be written"):
        made(Path("/proc/prepared"), tmp_path / "a.jsonl")


def test_an_input_nobody_may_read_or_that_shrank(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(rows(9))))
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "a.jsonl.gz")
    (tmp_path / "gone.jsonl").unlink()
    with pytest.raises(UserError, match="does not exist"):
        made(tmp_path / "out", tmp_path / "gone.jsonl")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.name != "posix"
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no right to mount")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("megabytes", [9, 6])  # too much for the first pass, for the second
def test_a_full_disk(tmp_path: Path, small_disk: Path, megabytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(b'{"text": "%04d%s"}\n' % (i, b"x" * 990) for i in range(megabytes * 1000)))
    with pytest.raises(UserError, match=r"--out: the disk of .* has 8\.\d MB left and this takes 1\d\.\d MB, "):
        made(small_disk / "out", source)
    monkeypatch.setattr(running, "_check_free", lambda *_: None)  # as where the size is not known before
    with pytest.raises(UserError, match=r"--out: the disk of .* is full; make room"):
        made(small_disk / "out", source)
    assert not list((small_disk / "out").glob("*.jsonl"))
    if megabytes == 6:
        subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
        assert sorted(lines(made(small_disk / "out", source))) == sorted(source.read_bytes().splitlines(keepends=True))
