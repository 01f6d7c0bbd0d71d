"""Entropies stored beside text: what the live patcher computes, in order, whole, and the same every time."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from bytelatent.commands import entropies as entry
from bytelatent.commands.entropies import Share, line_about, part_of
from bytelatent.commands.options import EntropiesSettings
from bytelatent.data import Patcher, pack, split_document
from bytelatent.data.entropies import EntropySettings, Summary, batches_of_shard, store_entropies
from bytelatent.data.shards import LOCK, Shard, divide_shards, lock_offset, lock_shards, shards_of
from bytelatent.errors import Interrupted, UserError
from bytelatent.model import ByteLM, Stream, pack_rows
from bytelatent.patching import PatchSettings, next_starts
from bytelatent.progress import Progress
from bytelatent.text import Document, read_documents
from bytelatent.text.stored import StoredWriter, read_stored
from bytelatent.vocab import encode
from bytelatent.weights import Config, fingerprint, save
from tests.data import killed_runs
from tests.model.tiny import tiny_byte_lm
from tests.text.text_files import logged, write

PATCHING = PatchSettings(mode="entropy", threshold=5.12)  # nats; the tiny model's entropies lie around it
CONTEXT, BATCH = 8, 20
PROPERTY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def byte_lm() -> ByteLM:
    return tiny_byte_lm(window=6)


class Recorder:
    """The byte LM's entropies in float32, and the streams they are of."""

    def __init__(self, byte_lm: ByteLM):
        self.byte_lm = byte_lm
        self.streams: list[Stream] = []
        self.entropies: list[np.ndarray] = []  # of each stream, without its padding

    def __call__(self, stream: Stream) -> Tensor:
        entropies = self.byte_lm.entropies(stream)
        self.streams.append(stream)
        self.entropies.append(entropies[stream.document >= 0].numpy().copy())
        return entropies


def quick(context: int = CONTEXT, batch_bytes: int = BATCH, **more: Any) -> EntropySettings:
    return EntropySettings(context=context, batch_bytes=batch_bytes, **{"dtype": "float32", **more})


def store(byte_lm: ByteLM, sources: Sequence[Path], out: Path, asked: EntropySettings, **more: Any) -> Summary:
    return store_entropies(byte_lm, fingerprint(byte_lm), [str(source) for source in sources], out, asked, **more)


def documents_in(file: Path) -> list[Document]:
    return [document for _, document in read_documents(str(file))]


def in_order(documents: Sequence[Document], values: np.ndarray) -> list[np.ndarray]:
    """Flat values, one for BOS and one for each byte, document by document."""
    return np.split(values, np.cumsum([len(document.text) + 1 for document in documents]))[:-1]


def bytes_below(folder: Path) -> dict[str, bytes]:
    """Every file but the lock; a leftover would be among them."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != LOCK}


# Around the edges of a piece and of a batch: a piece holds BOS, too.
SIZES = st.sampled_from([0, 1, *range(CONTEXT - 2, CONTEXT + 2), *range(BATCH - 2, BATCH + 2), 2 * CONTEXT, 3 * BATCH])
TEXTS = st.lists(SIZES.flatmap(lambda size: st.binary(min_size=size, max_size=size)), max_size=8)


@PROPERTY
@given(TEXTS, st.integers(1, 8), st.booleans())
def test_every_document_comes_back(
    tmp_path: Path, byte_lm: ByteLM, texts: list[bytes], more: int, static_shapes: bool
) -> None:
    source = write(tmp_path / "text.parquet", texts)
    recorder = Recorder(byte_lm)
    asked = quick(batch_bytes=CONTEXT + more)
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    summary = store(byte_lm, [source], out, asked, entropies_of=recorder, static_shapes=static_shapes)
    found = documents_in(out / "text.parquet")
    kept = [(str(row), text) for row, text in enumerate(texts) if text]
    assert [(document.id, document.text) for document in found] == kept
    flat = np.concatenate([*recorder.entropies, np.zeros(0, np.float32)])
    assert flat.size == sum(len(text) + 1 for _, text in kept) == summary.num_ids
    for document, expected in zip(found, in_order(found, flat), strict=True):
        np.testing.assert_array_equal(document.entropies, expected.astype(np.float16).astype(np.float32))
    for stream in recorder.streams:
        sizes = torch.unique_consecutive(stream.document[stream.document >= 0], return_counts=True)[1]
        assert max(sizes.tolist()) <= CONTEXT
        assert stream.ids.numel() == asked.batch_bytes if static_shapes else stream.ids.numel() <= asked.batch_bytes
    assert summary.num_documents == len(found)
    assert summary.num_bytes == sum(len(text) for _, text in kept)
    if kept:
        assert summary.mean_entropy == pytest.approx(flat.mean(), rel=1e-5)


@PROPERTY
@given(TEXTS)
def test_starts_are_decided_before_rounding(tmp_path: Path, byte_lm: ByteLM, texts: list[bytes]) -> None:
    source = write(tmp_path / "text.parquet", texts)
    recorder = Recorder(byte_lm)
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    store(byte_lm, [source], out, quick(patching=PATCHING), entropies_of=recorder)
    found = documents_in(out / "text.parquet")
    flat = np.concatenate([*recorder.entropies, np.zeros(0, np.float32)])
    for document, entropies in zip(found, in_order(found, flat), strict=True):
        ids = torch.from_numpy(encode(document.text, eos=False))
        position = torch.arange(len(ids)) % CONTEXT
        expected = next_starts(ids, torch.from_numpy(entropies), position, PATCHING)
        assert document.starts is not None
        assert document.starts.tolist() == expected.tolist()


def test_a_threshold_between_an_entropy_and_its_rounding(tmp_path: Path, byte_lm: ByteLM) -> None:
    source = write(tmp_path / "text.parquet", [b"a" * 5, b"b" * 2])
    just_below = torch.tensor(5.1195)
    assert PATCHING.threshold is not None
    assert float(just_below) < PATCHING.threshold < float(just_below.half())
    more: dict[str, Any] = {"entropies_of": lambda stream: just_below.expand(stream.ids.shape)}
    store(byte_lm, [source], tmp_path / "out", quick(patching=PATCHING), **more)
    for document in documents_in(tmp_path / "out" / "text.parquet"):
        assert document.starts is not None
        assert document.starts.tolist() == [True] + [False] * len(document.text)  # the first byte always starts one


def test_they_are_what_the_patcher_computes(tmp_path: Path, byte_lm: ByteLM) -> None:
    """A document at a time, as in training with the same context; before they are rounded, to 1e-5."""
    draw = np.random.default_rng(0)
    texts = [draw.bytes(size) for size in (1, 7, 8, 40, 100, 3)]
    source = write(tmp_path / "text.jsonl", texts)
    recorder = Recorder(byte_lm)
    store(byte_lm, [source], tmp_path / "entropies", quick(), entropies_of=recorder)
    store(byte_lm, [source], tmp_path / "starts", quick(patching=PATCHING))
    beside = documents_in(tmp_path / "entropies" / "text.parquet")
    decided = []
    rows = zip(
        texts,
        beside,
        in_order(beside, np.concatenate(recorder.entropies)),
        documents_in(tmp_path / "starts" / "text.parquet"),
        strict=True,
    )
    for text, stored, unrounded, with_starts in rows:
        patched = Patcher(PATCHING, byte_lm)(list(split_document(Document(text), CONTEXT)))
        live = np.concatenate([piece.entropies for piece in patched if piece.entropies is not None])
        starts = np.concatenate([piece.next_starts for piece in patched if piece.next_starts is not None])
        np.testing.assert_allclose(unrounded, live, atol=1e-5)
        np.testing.assert_allclose(stored.entropies, live, atol=2**-9 + 1e-5)  # half a step of float16 at 4 to 8 nats
        assert with_starts.starts is not None
        assert with_starts.starts.tolist() == starts.tolist()
        decided += starts[1:].tolist()
    assert 0.1 < np.mean(decided) < 0.9  # the threshold lies among the entropies


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("patching", [None, PATCHING])
def test_a_gpu_stores_the_same(tmp_path: Path, patching: PatchSettings | None) -> None:
    byte_lm = tiny_byte_lm(window=6, dim=32)  # FlexAttention wants heads of 16
    draw = np.random.default_rng(0)
    source = write(tmp_path / "text.parquet", [draw.bytes(int(size)) for size in draw.integers(1, 900, size=60)])
    asked = quick(context=256, batch_bytes=1024, patching=patching)
    summary = store(byte_lm, [source], tmp_path / "cpu", asked)
    on_gpu = byte_lm.cuda()
    store(on_gpu, [source], tmp_path / "gpu", asked)
    store(on_gpu, [source], tmp_path / "again", asked)
    assert bytes_below(tmp_path / "again") == bytes_below(tmp_path / "gpu")
    here, there = (documents_in(tmp_path / name / "text.parquet") for name in ("cpu", "gpu"))
    assert [(a.id, a.text) for a in here] == [(b.id, b.text) for b in there]
    if patching is None:
        for a, b in zip(here, there, strict=True):
            np.testing.assert_allclose(a.entropies, b.entropies, atol=0.02)
    else:
        differ = sum(int((a.starts != b.starts).sum()) for a, b in zip(here, there, strict=True))
        assert differ < 0.02 * summary.num_ids


def test_batches_are_full_and_padded_as_in_training(tmp_path: Path) -> None:
    texts = [b"a" * 30, b"b" * 5, b"c" * 6, b"d"]
    source = write(tmp_path / "text.parquet", texts)
    shard = Shard(str(source), "text", source.stat().st_size)
    size = 2 * CONTEXT
    loads = list(batches_of_shard(shard, quick(batch_bytes=size), size))
    assert [load.num_ids for load in loads] == [8 + 8, 8 + 7, 6 + 7 + 2]
    assert [[id_ for id_, _ in load.documents] for load in loads] == [[], ["0"], ["1", "2", "3"]]
    pieces = [piece for text in texts for piece in split_document(Document(text), CONTEXT)]
    for load, expected in zip(loads, (pieces[:2], pieces[2:4], pieces[4:]), strict=True):
        wanted = pack(expected, size).stream
        assert load.stream.ids.tolist() == wanted.ids.tolist()
        assert load.stream.document.tolist() == wanted.document.tolist()
        assert load.stream.position.tolist() == wanted.position.tolist()
    assert loads[-1].position == shard.size


def test_rows_without_an_id_get_one(tmp_path: Path, byte_lm: ByteLM) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two", "id": 7}\n')
    (tmp_path / "in" / "a.py").write_text("print()\n")
    (tmp_path / "in" / "a.md").write_text("# Title\n")
    store(byte_lm, [tmp_path / "in"], tmp_path / "out", quick())
    assert sorted(bytes_below(tmp_path / "out")) == ["a.md.parquet", "a.py.parquet", "deep/a.parquet"]
    assert [document.id for document in documents_in(tmp_path / "out" / "deep" / "a.parquet")] == ["deep/a/0", "7"]
    assert [document.id for document in documents_in(tmp_path / "out" / "a.py.parquet")] == ["a.py/0"]


def test_what_the_file_says(tmp_path: Path, byte_lm: ByteLM) -> None:
    source = write(tmp_path / "text.jsonl.gz", [b"some text"])
    store(byte_lm, [source], tmp_path / "out", quick(patching=PATCHING))
    stored = read_stored(tmp_path / "out" / "text.parquet")
    assert stored is not None
    assert stored.plain() == {
        "version": 1,
        "byte_lm": fingerprint(byte_lm),
        "window": 6,
        "context": CONTEXT,
        "dtype": "float32",
        "patching": PATCHING.plain(),
        "reset_at_newline": False,
        "source_bytes": source.stat().st_size,
    }
    assert stored.patching is not None
    assert PatchSettings.parse(stored.patching) == PATCHING


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of files of several kinds and sizes."""
    draw = np.random.default_rng(1)
    folder = tmp_path / "text"
    for number, kind in enumerate(["jsonl", "jsonl.zst", "parquet", "jsonl.gz", "txt"]):
        texts = [draw.bytes(int(size)) for size in draw.integers(1, 60, size=3 * number + 2)]
        write(folder / f"{number}.{kind}", texts if kind != "txt" else texts[:1])
    return folder


def test_two_ranks_write_what_one_writes(tmp_path: Path, text: Path, byte_lm: ByteLM) -> None:
    whole = store(byte_lm, [text], tmp_path / "whole", quick())
    parts = [store(byte_lm, [text], tmp_path / "parts", quick(), rank=rank, world_size=2) for rank in (0, 1)]
    assert len(bytes_below(tmp_path / "whole")) == 5
    assert bytes_below(tmp_path / "parts") == bytes_below(tmp_path / "whole")
    assert sum(part.num_bytes for part in parts) == whole.num_bytes
    assert all(part.num_shards > 0 and part.num_skipped == 0 for part in parts)


def test_it_goes_on_where_it_was(tmp_path: Path, text: Path, byte_lm: ByteLM) -> None:
    out, progress = tmp_path / "out", Progress("entropies", bar=False)
    store(byte_lm, [text], out, quick())
    before = bytes_below(out)
    (out / "2.parquet").unlink()
    (out / ".2.parquet.4711.part").write_bytes(b"left by a killed process")
    (out / ".other.parquet.4711.part").write_bytes(b"not ours")
    seen = Recorder(byte_lm)
    with logged() as lines:
        summary = store(byte_lm, [text], out, quick(), entropies_of=seen, progress=progress)
    assert lines == ["4 of 5 files are done already"]
    assert (summary.num_shards, summary.num_skipped) == (5, 4)
    assert (
        sum(map(len, seen.entropies))
        == summary.num_ids
        == sum(len(d.text) + 1 for d in documents_in(text / "2.parquet"))
    )
    assert progress.total == progress.done == (text / "2.parquet").stat().st_size
    (out / ".other.parquet.4711.part").unlink()
    assert bytes_below(out) == before
    nothing = store(byte_lm, [text], out, quick())
    assert nothing.num_skipped == 5
    assert nothing.mean_entropy is None


def test_other_files_are_not_overwritten(tmp_path: Path, text: Path, byte_lm: ByteLM) -> None:
    out = tmp_path / "out"
    store(byte_lm, [text], out, quick())
    before = bytes_below(out)
    ways = [
        (tiny_byte_lm(seed=1, window=6), quick(), "byte_lm is .* there and .* now"),
        (byte_lm, quick(context=9), "context is 8 there and 9 now"),
        (byte_lm, quick(patching=PATCHING), "patching is None there and {.*'threshold': 5.12.*} now"),
        (byte_lm, quick(dtype="bfloat16"), "dtype is float32 there and bfloat16 now"),
    ]
    for model, asked, difference in ways:
        way_out = "remove it to make it again, or choose another --out"
        message = rf"out/\d.*parquet' was made with other settings: {difference}; {way_out}"
        with pytest.raises(UserError, match=message):
            store(model, [text], out, asked)
    with (text / "0.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"0\.parquet' was made with other settings: source_bytes is"):
        store(byte_lm, [text], out, quick())
    assert bytes_below(out) == before
    write(out / "0.parquet", [b"a table of somebody's"])
    with pytest.raises(UserError, match=r"0\.parquet' was not written by blt entropies"):
        store(byte_lm, [text], out, quick())


def test_killed_at_any_moment(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    for name in "abc":
        write(tmp_path / "text" / f"{name}.parquet", [draw.bytes(30) for _ in range(25)])
    command = [sys.executable, "-m", "tests.data.killed_runs", str(tmp_path / "text"), str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # some were killed in the middle of a file
    killed_runs.store(str(tmp_path / "text"), tmp_path / "undisturbed")
    assert len(bytes_below(tmp_path / "undisturbed")) == 3
    assert bytes_below(tmp_path / "killed") == bytes_below(tmp_path / "undisturbed")


@pytest.fixture
def threads_end() -> Any:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_an_error_of_the_device_ends_the_job(tmp_path: Path, text: Path, byte_lm: ByteLM, threads_end: None) -> None:
    calls = []

    def failing(stream: Stream) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return byte_lm.entropies(stream)

    with pytest.raises(RuntimeError, match="out of memory"):
        store(byte_lm, [text / "3.jsonl.gz"], tmp_path / "out", quick(), entropies_of=failing)
    assert bytes_below(tmp_path / "out") == {}


def test_an_error_of_the_writer_ends_the_job(
    tmp_path: Path, text: Path, byte_lm: ByteLM, threads_end: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StoredWriter, "add", failing)
    with pytest.raises(UserError, match=r"the disk is full: .*parquet' was not written"):
        store(byte_lm, [text], tmp_path / "out", quick())
    assert bytes_below(tmp_path / "out") == {}


def test_an_error_of_the_reader_ends_the_job(tmp_path: Path, byte_lm: ByteLM, threads_end: None) -> None:
    good = '{"text": "a text of some length"}\n'
    (tmp_path / "a.jsonl").write_text(good * 40)
    (tmp_path / "b.jsonl").write_text(good * 20 + "{broken\n" + good)
    with pytest.raises(UserError, match=r"b\.jsonl' line 21 is not JSON"):
        store(byte_lm, [tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", quick(max_bad_rows=0))
    assert "b.parquet" not in bytes_below(tmp_path / "out")


def test_rows_without_text_are_named_and_left_out(tmp_path: Path, byte_lm: ByteLM) -> None:
    rows = ['{"text": "one"}', '{"id": 1}', '{"text": "two"}', "{broken", '{"text": null}', '{"text": "three"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with logged() as said:
        store(byte_lm, [tmp_path / "a.jsonl"], tmp_path / "out", quick(max_bad_rows=3))
    assert [(d.id, d.text) for d in documents_in(tmp_path / "out" / "a.parquet")] == [
        ("a/0", b"one"),
        ("a/2", b"two"),
        ("a/5", b"three"),
    ]
    assert [f"passed over ({n} of at most 3)" in line for n, line in enumerate(said, 1)] == [True] * 3
    assert ["line 2 " in said[0], "line 4 " in said[1], "line 5 " in said[2]] == [True] * 3
    with pytest.raises(UserError, match=r"2 bad rows or files were passed over already \(--max-bad-rows\)"):
        store(byte_lm, [tmp_path / "a.jsonl"], tmp_path / "strict", quick(max_bad_rows=2))


def test_each_call_logs_bad_rows_for_itself(tmp_path: Path, byte_lm: ByteLM) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{broken\n')
    with logged() as said:
        for out in ("first", "second"):
            store(byte_lm, [tmp_path / "a.jsonl"], tmp_path / out, quick(max_bad_rows=3))
    assert sum("line 2 is not JSON" in line for line in said) == 2


def test_a_source_that_changed_but_for_its_size(tmp_path: Path, byte_lm: ByteLM) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "abc"}\n')
    store(byte_lm, [source], tmp_path / "out", quick())
    assert store(byte_lm, [source], tmp_path / "out", quick()).num_skipped == 1
    source.write_text('{"text": "xyz"}\n')
    written = (tmp_path / "out" / "a.parquet").stat().st_mtime_ns
    os.utime(source, ns=(written + 1000, written + 1000))
    with pytest.raises(UserError, match=r"a.jsonl' has changed since '.*a.parquet' was written"):
        store(byte_lm, [source], tmp_path / "out", quick())


def test_entropies_that_are_no_numbers_are_not_stored(tmp_path: Path, text: Path, byte_lm: ByteLM) -> None:
    def broken(stream: Stream) -> Tensor:
        return torch.full(stream.ids.shape, float("nan"))

    with pytest.raises(UserError, match="not finite"):
        store(byte_lm, [text], tmp_path / "out", quick(), entropies_of=broken)
    assert bytes_below(tmp_path / "out") == {}


def test_padding_does_not_count(tmp_path: Path, byte_lm: ByteLM) -> None:
    source = write(tmp_path / "a.parquet", [b"short"])

    def wild(stream: Stream) -> Tensor:
        return torch.where(stream.document < 0, float("nan"), 1.0)

    summary = store(byte_lm, [source], tmp_path / "out", quick(), entropies_of=wild)
    assert summary.mean_entropy == 1.0


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 6))
def test_shards_are_dealt_evenly(sizes: list[int], world: int) -> None:
    shards = [Shard(f"{n}.jsonl", str(n), size) for n, size in enumerate(sizes)]
    ranks = divide_shards(shards, world)
    assert sorted((s for rank in ranks for s in rank), key=lambda s: int(s.name)) == shards
    loads = [sum(shard.size for shard in rank) for rank in ranks]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert all([s.size for s in rank] == sorted((s.size for s in rank), reverse=True) for rank in ranks)
    assert divide_shards(shards[::-1], world) == ranks


def test_names_that_meet(tmp_path: Path) -> None:
    for name in ("x/a.jsonl", "y/a.jsonl", "x/a.parquet"):
        write(tmp_path / name, [b"text"])
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"x/a\.jsonl' and '.*y/a\.jsonl' would both become 'a.parquet'"):
        shards_of([str(tmp_path / "*" / "a.jsonl")], out)
    with pytest.raises(UserError, match=r"x/a\.jsonl' and '.*x/a\.parquet' would both become"):
        shards_of([str(tmp_path / "x")], out)
    (tmp_path / "x" / "a.parquet").unlink()
    assert [shard.name for shard in shards_of([str(tmp_path)], tmp_path.parent / "out")] == ["x/a", "y/a"]
    twice = [str(tmp_path / "x" / "a.jsonl"), str(tmp_path / "x" / "*.jsonl")]
    assert [shard.name for shard in shards_of(twice, out)] == ["a"]
    with pytest.raises(UserError, match="is inside the source"):
        shards_of([str(tmp_path)], out)


HOLDER = """
import fcntl, sys
lock = open(sys.argv[1], "wb")
fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_shard_is_written_by_one_process(tmp_path: Path) -> None:
    a, b = Shard("a.jsonl", "a", 1), Shard("b.jsonl", "b", 1)
    command = [sys.executable, "-c", HOLDER, str(tmp_path / LOCK), str(lock_offset(a))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with lock_shards(tmp_path, [b]):
            pass
        with (
            pytest.raises(UserError, match=r"a\.parquet' is being written by another process"),
            lock_shards(tmp_path, [b, a]),
        ):
            pass
        other.kill()
    with lock_shards(tmp_path, [a, b]):
        pass


@pytest.mark.parametrize(
    ("rank", "world", "environment", "part"),
    [
        (None, None, {}, Share(0, 1)),
        (2, 4, {"RANK": "1", "WORLD_SIZE": "8"}, Share(2, 4)),
        (None, None, {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "SLURM_NTASKS": "2"}, Share(9, 16, 1)),
        (
            None,
            None,
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
            Share(3, 4, 1),
        ),
        (None, None, {"SLURM_NTASKS": "4"}, Share(0, 1)),  # salloc's shell
        (None, None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Share(0, 1)),  # a batch script
        (None, None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Share(0, 1)),
        (
            None,
            None,
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "3"},
            Share(2, 3),
        ),
        (
            None,
            None,
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_STEP_ID": "1",
                "SLURM_PROCID": "2",
                "SLURM_NTASKS": "4",
            },
            Share(6, 8),
        ),
    ],
)
def test_parts(rank: int | None, world: int | None, environment: dict[str, str], part: Share) -> None:
    assert part_of(rank, world, environment) == part


@pytest.mark.parametrize(
    ("rank", "world", "environment", "message"),
    [
        (1, None, {}, "belong together"),
        (4, 4, {}, "rank 4 of 4: ranks are numbered from 0"),
        (None, None, {"RANK": "one", "WORLD_SIZE": "2"}, "RANK: 'one' is no number"),
        (
            None,
            None,
            {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "3"},
            "give --rank and --world",
        ),
    ],
)
def test_parts_that_cannot_be(rank: int | None, world: int | None, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        part_of(rank, world, environment)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match=r"context \(9\) is more than batch_bytes \(8\)"):
        quick(context=9, batch_bytes=8)
    with pytest.raises(ValidationError, match="patching mode 'space' needs no byte LM"):
        quick(patching=PatchSettings(mode="space"))


@pytest.fixture
def model(tmp_path: Path, byte_lm: ByteLM) -> Path:
    folder = tmp_path / "byte_lm"
    folder.mkdir()
    save(folder, byte_lm, Config(model=byte_lm.settings, context=64))
    return folder


def command(text: Path, model: Path, out: str, **more: Any) -> Summary:
    values: dict[str, Any] = {"context": 64, "text_key": "text"}
    values |= {"max_bad_rows": 100, "max_row_bytes": 1 << 20}
    values |= {"text": [str(text)], "model": str(model), "out": out, "device": "cpu", "dtype": "float32"}
    return entry.store_beside(EntropiesSettings.parse(values | more))


def test_the_command(tmp_path: Path, text: Path, model: Path, byte_lm: ByteLM) -> None:
    summary = command(text, model, str(tmp_path / "out"))
    expected = store(byte_lm, [text], tmp_path / "expected", quick(context=64, batch_bytes=16_384))
    assert bytes_below(tmp_path / "out") == bytes_below(tmp_path / "expected")
    line = line_about(summary, "out")
    assert line.startswith(f"{expected.num_bytes:,} bytes in ")
    assert line.endswith(f"mean entropy {expected.mean_entropy:.4f} nats -> out")
    assert line_about(command(text, model, str(tmp_path / "out")), "out") == "nothing left to do: 5 files stand in out"
    assert "more processes than files" in line_about(command(text, model, str(tmp_path), rank=7, world=8), "out")


def test_ctrl_c_shows_how_to_go_on(
    tmp_path: Path, text: Path, model: Path, threads_end: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(byte_lm: ByteLM, stream: Stream) -> Tensor:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ByteLM, "entropies", stopped)
        with pytest.raises(Interrupted, match=r"no file of '.*out' is finished yet; the same command begins again"):
            command(text, model, str(out))
    assert bytes_below(out) == {}
    command(text, model, str(out), rank=0, world=5)
    monkeypatch.setattr(ByteLM, "entropies", stopped)
    with pytest.raises(Interrupted, match=r"finished files are in '.*out'; the same command resumes"):
        command(text, model, str(out))
    assert len(bytes_below(out)) == 1


def test_modes_of_the_command(tmp_path: Path, text: Path, model: Path) -> None:
    command(text, model, str(tmp_path / "one"), starts=5.12)
    command(text, model, str(tmp_path / "other"), patching="mode=entropy, threshold=5.12")
    assert bytes_below(tmp_path / "one") == bytes_below(tmp_path / "other")
    stored = read_stored(tmp_path / "one" / "0.parquet")
    assert stored is not None
    assert stored.patching == PATCHING.plain()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": 1.0, "patching": "threshold=1"}, "both name patching settings"),
        ({"patching": "treshold=1"}, "--patching: treshold: unknown key; did you mean 'threshold'"),
        ({"patching": "mode=space"}, "patching mode 'space' needs no byte LM"),
        ({"batch_bytes": 10}, r"context \(64\) is more than batch_bytes \(10\)"),
        ({"dtype": "float16"}, "dtype"),
        ({"text_key": "body"}, "body"),
        ({"out": "s3://bucket/out"}, "must be a folder on this machine"),
        ({"text": Path("no/such/text")}, "'no/such/text' does not exist"),
        ({"model": Path("no/such/model")}, "'no/such/model' is not a folder"),
        ({"out": "/proc/no/such"}, "cannot be written"),
    ],
)
def test_bad_input_of_the_command(
    tmp_path: Path, text: Path, model: Path, change: dict[str, Any], message: str
) -> None:
    values: dict[str, Any] = {"text": text, "model": model, "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=message):
        command(**values | change)
    left = bytes_below(tmp_path / "out").keys() if (tmp_path / "out").exists() else set()
    assert left <= ({"4.txt.parquet"} if "text_key" in change else set())  # a file without keys


def test_streams_are_as_they_were_made(byte_lm: ByteLM) -> None:
    """The reference of this file's properties: a piece in a batch has the entropies it has alone."""
    rows = [torch.from_numpy(encode(text, eos=False)) for text in (b"one text", b"x", b"another one")]
    together = byte_lm.entropies(pack_rows(rows))
    alone = torch.cat([byte_lm.entropies(pack_rows([row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
