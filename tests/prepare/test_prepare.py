import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.prepare import PrepareSettings, executors, plan, prepare, scatter, verify
from tests.prepare.folders import lines, made, made_here, manifest, outputs, rows, texts
from tests.text.text_files import KINDS, write

DOCUMENTS = [f"document {i} ".encode() * (i % 9 + 1) for i in range(300)] + [
    b"\xff\xfe\xf0",
    "ä\u2028€\ud7ff".encode(),
    b" ",
]


@pytest.mark.parametrize("kind", [*KINDS, "json.gz", "ndjson"])
def test_every_document_of_every_format_comes_out_once(tmp_path: Path, kind: str, many_parts: None) -> None:
    if kind == "ndjson":
        write(tmp_path / "a.jsonl", DOCUMENTS).rename(tmp_path / "a.ndjson")
    elif kind == "json.gz":
        write(tmp_path / "a.jsonl.gz", DOCUMENTS).rename(tmp_path / "a.json.gz")
    else:
        write(tmp_path / f"a.{kind}", DOCUMENTS)
    out = made_here(tmp_path / "out", tmp_path / f"a.{kind}")
    assert Counter(texts(out)) == Counter(DOCUMENTS)
    assert manifest(out)["documents"] == len(DOCUMENTS)
    assert verify(out) == []


def test_a_mix_of_formats_in_a_folder(tmp_path: Path, many_parts: None) -> None:
    wanted: list[bytes] = []
    for number, kind in enumerate([*KINDS, "txt"]):
        some = [DOCUMENTS[-3]] if kind == "txt" else [b"%s %d" % (text, number) for text in DOCUMENTS]
        write(tmp_path / "in" / "deep" / f"{number}.{kind}", some)
        wanted += some
    out = made(tmp_path / "out", tmp_path / "in", chunks=3)
    assert Counter(texts(out)) == Counter(wanted)
    row = json.loads(next(line for line in lines(out) if b"4.txt" in line))
    assert row["id"] == str(Path("deep") / "4.txt")
    assert row["text"].encode("utf-8", "surrogateescape") == DOCUMENTS[-3]
    assert sorted(outputs(out)) == ["in.chunk.00.jsonl", "in.chunk.01.jsonl", "in.chunk.02.jsonl", "in.val.jsonl"]
    assert not (out / ".prepare").exists()


def test_lines_pass_through_unchanged(tmp_path: Path, many_parts: None) -> None:
    given = [
        b'{ "text" : "a"  ,"n":1.00}',
        b' {"text":"\xff"} ',
        b'{"text":"b"}\r',
        b"{}",
        b'{"text": "' + b"y" * 3000 + b'"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b"\n\n".join(given)
    )  # a mark at the head, no newline at the end
    out = made_here(tmp_path / "out", tmp_path / "a.jsonl")
    assert sorted(lines(out)) == sorted(line + b"\n" for line in given)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 1500), min_size=2, max_size=60),
    unit=st.integers(1, 3000),
    read=st.integers(1, 900),
    newline=st.booleans(),
)
def test_units_and_blocks_divide_a_file_without_loss(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], unit: int, read: int, newline: bool
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    wanted = [b'{"text": "%d%s"}' % (i, b"z" * size) for i, size in enumerate(sizes)]
    (folder / "a.jsonl").write_bytes(b"\n".join(wanted) + b"\n" * newline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "UNIT_BYTES", unit)
        patch.setattr(scatter, "READ_BYTES", read)
        out = made_here(folder / "out", folder / "a.jsonl")
    assert sorted(lines(out)) == sorted(line + b"\n" for line in wanted)


def test_the_output_depends_on_neither_workers_nor_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "UNIT_BYTES", 4000)
    monkeypatch.setattr(plan, "TASK_BYTES", 9000)
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows(2000)))
    write(tmp_path / "b.jsonl.zst", DOCUMENTS)
    whole = outputs(made(tmp_path / "whole", tmp_path, chunks=5, name="n", workers=1))
    monkeypatch.setattr(scatter, "READ_BYTES", 700)
    monkeypatch.setattr(executors, "MAX_RUN_BYTES", 9000)
    monkeypatch.setattr(executors, "MAX_RANGE_BYTES", 6000)
    source = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.zst"]
    assert outputs(made(tmp_path / "two", *source, chunks=5, name="n", workers=2)) == whole
    monkeypatch.setattr(executors, "BINS_IN_RANGE", 0.1)  # no bin fits: every document is read where it stands
    monkeypatch.setattr(executors, "MAX_RANGE_BYTES", 2000)
    assert outputs(made_here(tmp_path / "little", *source, chunks=5, name="n")) == whole
    assert outputs(made_here(tmp_path / "other", *source, chunks=5, name="n", seed=7)) != whole


def test_the_shuffle_is_uniform(tmp_path: Path) -> None:
    """Every document is equally often at every place, and follows every other equally often."""
    count, seeds = 8, 400
    (tmp_path / "a.jsonl").write_bytes(b"".join(b'{"text": "%d"}\n' % i for i in range(count)))
    places, pairs = np.zeros((count, count)), np.zeros((count, count))
    for seed in range(seeds):
        out = made_here(tmp_path / f"{seed}", tmp_path / "a.jsonl", chunks=1, seed=seed, validation=0)
        order = [int(text) for text in texts(out)]
        places[order, range(count)] += 1
        pairs[order[:-1], order[1:]] += 1
    assert chi_square(places, seeds / count) < 100  # 49 degrees of freedom: 100 is met once in 50,000
    apart = ~np.eye(count, dtype=bool)
    assert chi_square(pairs[apart], seeds / count) < 115  # 55 degrees or fewer


def chi_square(seen: np.ndarray, expected: float) -> float:
    return float(((seen - expected) ** 2 / expected).sum())


def test_the_shuffle_reaches_across_the_whole_input(tmp_path: Path, many_parts: None) -> None:
    """Documents of one place in the input are spread over the output, and neighbours part."""
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows(3000)))
    order = np.array([int(text.split()[0]) for text in texts(made_here(tmp_path / "out", tmp_path / "a.jsonl"))])
    tenths = np.histogram2d(order, np.arange(3000), bins=10)[0]
    assert chi_square(tenths, 30) < 160  # 81 degrees of freedom
    assert (np.abs(np.diff(order)) == 1).sum() < 15  # 2 expected
    assert abs(np.corrcoef(order, np.arange(3000))[0, 1]) < 0.1


def test_chunks_are_equal_within_a_document(tmp_path: Path, many_parts: None) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows(1500, size=90)))
    out = made_here(tmp_path / "out", tmp_path / "a.jsonl", chunks=101)
    found = outputs(out)
    held_out = found.pop("a.val.jsonl").splitlines()
    assert len(held_out) == 15
    assert list(found)[:2] == ["a.chunk.000.jsonl", "a.chunk.001.jsonl"]
    assert len(found) == 101
    total = sum(map(len, found.values()))
    assert max(abs(len(data) - total / 101) for data in found.values()) <= 115
    trained = set(b"".join(found.values()).splitlines())
    assert not trained & set(held_out)
    assert len(trained) + len(held_out) == 1500
    start = 0
    for number, data in enumerate(found.values()):
        for line in data.splitlines(keepends=True):
            assert start * 101 // total == number
            start += len(line)
    assert [output["documents"] for output in manifest(out)["outputs"]] == [
        15,
        *(d.count(b"\n") for d in found.values()),
    ]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_duplicates_are_removed_as_the_slow_way_does(tmp_path: Path, kind: str, many_parts: None) -> None:
    chance = random.Random(3)
    some = [b"text %d" % chance.randrange(150) for _ in range(600)]
    write(tmp_path / f"a.{kind}", some[:400])
    write(tmp_path / f"b.{kind}", some[400:])
    out = made_here(tmp_path / "out", tmp_path, dedup=True, name="n")
    ids = {}
    for number, text in enumerate(some):
        ids.setdefault(text, number if number < 400 else number - 400)
    found = {row["text"].encode(): row["id"] for row in map(json.loads, lines(out))}
    assert found == ids  # the first of each is the one that is kept
    assert len(lines(out)) == len(ids)
    assert manifest(out)["duplicates"] == 600 - len(ids)
    assert outputs(
        made(tmp_path / "2", tmp_path / f"a.{kind}", tmp_path / f"b.{kind}", dedup=True, name="n")
    ) == outputs(out)


def test_a_document_longer_than_a_chunk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No chunk is empty, or it is said where their number was given."""
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows(6)) + b'{"text": "%s"}\n' % (b"y" * 5000))
    found = outputs(made_here(tmp_path / "out", tmp_path / "a.jsonl", validation=0))
    assert 1 < len(found) < 7
    assert all(found.values())
    assert "chunks are empty" not in caplog.text
    found = outputs(made(tmp_path / "given", tmp_path / "a.jsonl", validation=0, chunks=6))
    empty = [name for name, data in found.items() if not data]
    assert len(found) == 6
    [line] = [line for line in caplog.messages if "chunks are empty" in line]
    assert line == (
        f"{len(empty)} of 6 chunks are empty, the first '{empty[0]}': a document is longer than a chunk; "
        "give fewer --chunks, or leave it out"
    )


def test_verify_finds_what_changed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows(100)))
    out = made_here(tmp_path / "out", tmp_path / "a.jsonl", chunks=4)
    assert verify(out) == []
    chunk = out / "a.chunk.01.jsonl"
    data = bytearray(chunk.read_bytes())
    data[10] ^= 1
    chunk.write_bytes(data)
    (out / "a.chunk.02.jsonl").unlink()
    (out / "a.chunk.03.jsonl").write_bytes(b"{}\n")
    wrong = verify(out)
    assert [line.split()[0] for line in wrong] == ["a.chunk.01.jsonl", "a.chunk.02.jsonl", "a.chunk.03.jsonl"]
    with pytest.raises(UserError, match=r"no manifest\.json"):
        verify(tmp_path)


def test_one_document_and_none(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(b'{"text": "a"}')
    assert outputs(made_here(tmp_path / "out", tmp_path / "one.jsonl")) == {"one.chunk.00.jsonl": b'{"text": "a"}\n'}
    for name, data in {"empty.jsonl": b"", "blank.jsonl": b"\n \n"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="no documents"):
            made(tmp_path / f"out-{name}", tmp_path / name)


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"".join(rows(20)))
    for number, (wrong, match) in enumerate(
        [
            ({"chunks": 21}, "--chunks: 21"),
            ({"validation": 20}, "--validation: 20 of 20"),
            ({"text_key": "content"}, "--text-key: .*has no 'content'; its keys: text"),
            ({"memory": 0.05}, r"--memory: 0\.05 GB are too little; the least is \d"),
            ({"name": "a/b"}, "--name"),
            ({"executor": "ray"}, "pip install ray"),
        ]
    ):
        with pytest.raises(UserError, match=match):
            made(tmp_path / f"{number}", tmp_path / "a.jsonl", **wrong)
    with pytest.raises(UserError, match="does not exist"):
        made(tmp_path / "out", tmp_path / "missing")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no files"):
        made(tmp_path / "out", tmp_path / "nothing")


def test_the_least_memory_named_is_enough() -> None:
    with pytest.raises(UserError, match="the least is") as caught:
        executors.divide_memory(0.2, 2, own_bytes=100_000_000)
    least = float(str(caught.value).split("the least is ")[1].split(",")[0])
    assert executors.divide_memory(least, 2, own_bytes=100_000_000).workers == 2
    with pytest.raises(UserError):
        executors.divide_memory(least - 0.02, 2, own_bytes=100_000_000)


def test_a_finished_folder_is_left_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(b"".join(rows(50)))
    made(out, source)
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    made(out, source, workers=1, memory=3)  # neither changes what comes out
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    with pytest.raises(UserError, match="prepared otherwise: seed 42 -> 1"):
        made(out, source, seed=1)
    source.write_bytes(b"".join(rows(51)))
    with pytest.raises(UserError, match="added or changed"):
        made(out, source)
    source.unlink()
    assert prepare(PrepareSettings(source=[str(source)], out=out)) == out


def test_files_of_other_work_are_not_overwritten(tmp_path: Path) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(b"".join(rows(5)))
    out.mkdir()
    (out / "a.chunk.07.jsonl").write_bytes(b"precious")
    with pytest.raises(UserError, match="is there already"):
        made(out, source)
    assert (out / "a.chunk.07.jsonl").read_bytes() == b"precious"
    with pytest.raises(UserError, match="holds the input"):
        made(tmp_path, source)
