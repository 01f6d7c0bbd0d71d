"""Several ranks, reading processes, and what a change of their numbers leaves of the documents."""

import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bytelatent.data import Batch, DataSettings, Loader, Patcher, SourceSettings
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.text import readers, tables
from bytelatent.training.checkpoint.manager import arrays_to_tensors, tensors_to_arrays
from bytelatent.vocab import decode
from tests.data.test_loader import same
from tests.processes import forked_readers
from tests.text.text_files import KINDS, logged, write

PROPERTY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 200)
    monkeypatch.setattr(tables, "BLOCK_ROWS", 3)


def name(number: int) -> bytes:
    """A document of 12 to 24 bytes that is known by its first four."""
    return f"{number:04d}".encode() + b"." * (8 + number % 13)


def sources(folder: Path, sizes: list[int], kinds: list[str]) -> tuple[DataSettings, set[bytes]]:
    """One source of files of so many documents each; a piece holds a whole document, a batch about four."""
    numbers = itertools.count()
    documents: set[bytes] = set()
    for file, (size, kind) in enumerate(zip(sizes, itertools.cycle(kinds), strict=False)):
        texts = [name(next(numbers)) for _ in range(size)]
        documents.update(texts)
        write(folder / f"{file}.{kind}", texts)
    train = [SourceSettings(path=str(folder))]
    return DataSettings(train=train, context=64, batch_bytes=64, shuffle_buffer=3), documents


def drawn(loader: Loader, batches: int) -> list[Batch]:
    return [next(loader) for _ in range(batches)]


def decode_stream(batches: list[Batch]) -> list[bytes]:
    """The documents whose last id is predicted in the batches."""
    ids = [target for batch in batches for target in batch.targets.tolist() if target != -100]
    ends = [at for at, target in enumerate(ids) if target == 2]
    begins = [0, *(end + 1 for end in ends)]
    return [decode(ids[begin:end]) for begin, end in zip(begins, ends, strict=False)]


def waiting(loader: Loader) -> list[bytes]:
    """Documents that were read and not yet given out, whole or in part."""
    return [decode(piece.ids) for piece in [*loader.ready, *loader.buffer]]


def world_of(settings: DataSettings, world: int, seed: int = 0) -> list[Loader]:
    return [Loader(settings, seed, rank=rank, world_size=world) for rank in range(world)]


FILES = st.lists(st.integers(0, 14), min_size=1, max_size=5).filter(any)
A_KIND = st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    return (tmp_path / str(number) for number in itertools.count())


@PROPERTY
@given(sizes=FILES, kinds=A_KIND, world=st.integers(1, 5))
def test_ranks_read_each_document_once_an_epoch(
    folders: Iterator[Path], sizes: list[int], kinds: list[str], world: int
) -> None:
    """Whatever the numbers of files, blocks and ranks: no need to divide."""
    data, documents = sources(next(folders), sizes, kinds)
    seen: Counter[tuple[int, bytes]] = Counter()
    epochs = 3
    for loader in world_of(data, world):
        reader = loader.sources[0]
        while True:
            [piece] = next(reader)
            if reader.position.epoch >= epochs:
                break
            seen[reader.position.epoch, decode(piece.ids)] += 1
    assert seen == Counter((epoch, text) for epoch in range(epochs) for text in documents)


@PROPERTY
@given(
    sizes=FILES,
    kinds=A_KIND,
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    steps=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    again=st.integers(0, 3),
)
@example(sizes=[1], kinds=["jsonl.gz"], before=2, after=4, steps=[0, 1, 0, 0], again=0)  # ranks far apart in epochs
def test_a_change_of_ranks_loses_and_repeats_nothing(
    folders: Iterator[Path], sizes: list[int], kinds: list[str], before: int, after: int, steps: list[int], again: int
) -> None:
    """Ranks that stand at different places, dealt to another number and (`again` > 0) to a third one."""
    data, documents = sources(next(folders), sizes, kinds)
    loaders = world_of(data, before)
    begun: Counter[bytes] = Counter()
    for loader, number in zip(loaders, steps, strict=False):
        begun.update(decode_stream(drawn(loader, number)))
    for world in [after, again] if again else [after]:
        states = [tensors_to_arrays(arrays_to_tensors(loader.state_dict())) for loader in loaders]
        loaders = world_of(data, world)
        lines = {loader.redistribute(list(reversed(states))) for loader in loaders}
        assert len(lines) == 1
        assert f"of {len(states)} ranks is divided among {world}" in lines.pop()
    last = max(loader.sources[0].position.epoch for loader in loaders)
    # Read on to the end of every epoch that was begun: each document came as often as there were epochs.
    total = Counter(begun)
    for loader in loaders:
        reader = loader.sources[0]
        total.update(text for text in waiting(loader) if text in documents)
        while True:
            [piece] = next(reader)
            if not reader.left and reader.position.epoch > last:
                break
            total[decode(piece.ids)] += 1
    # Of a document that a batch's end cut in two the rest waits, and the whole was not counted as given out.
    rests = [text for loader in loaders for text in waiting(loader) if text not in documents]
    missing = Counter(dict.fromkeys(documents, last + 1))
    missing.subtract(total)
    assert all(count >= 0 for count in missing.values())
    assert missing.total() == len(rests)
    assert all(any(text.endswith(rest) for text in missing.elements()) for rest in rests)


@PROPERTY
@given(sizes=FILES, kinds=A_KIND, world=st.integers(1, 3), rank=st.integers(0, 2), done=st.integers(0, 25))
def test_resumes_at_any_step(
    folders: Iterator[Path], sizes: list[int], kinds: list[str], world: int, rank: int, done: int
) -> None:
    data, _ = sources(next(folders), sizes, kinds)
    rank = rank % world
    loader = Loader(data, 5, rank=rank, world_size=world)
    drawn(loader, done)
    state = tensors_to_arrays(arrays_to_tensors(loader.state_dict()))
    resumed = Loader(data, 5, rank=rank, world_size=world)
    resumed.load_state_dict(state)
    assert all(map(same, drawn(loader, 8), drawn(resumed, 8)))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[SourceSettings]:
    """Two sources of every kind of file, of one and of many blocks as they are in use."""
    folder = tmp_path_factory.mktemp("many")
    for source in range(2):
        for file, kind in enumerate(KINDS):
            texts = [bytes([97 + (i * j) % 26 for j in range(2000)]) for i in range(1200 if file == source else 5)]
            write(folder / str(source) / f"{file}.{kind}", texts)
    return [SourceSettings(path=str(folder / str(source)), weight=1.0 + source) for source in range(2)]


def with_workers(many: list[SourceSettings], workers: int) -> DataSettings:
    return DataSettings(
        train=many, context=1500, batch_bytes=40_000, batch_patches=12_000, shuffle_buffer=40, workers=workers
    )


def test_any_number_of_reading_processes_gives_the_same_batches(
    many: list[SourceSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when one that read with another number goes on, or a process is killed."""
    monkeypatch.undo()  # processes of their own read blocks as large as in use
    forked_readers(monkeypatch)
    patcher = Patcher(PatchSettings(mode="static", patch_size=4))
    alone = Loader(with_workers(many, 0), 1, patcher)
    expected = drawn(alone, 60)
    with Loader(with_workers(many, 1), 1, patcher) as one:
        assert all(map(same, drawn(one, 25), expected))
        state = one.state_dict()
    with Loader(with_workers(many, 2), 1, patcher) as two:
        two.load_state_dict(state)
        assert all(map(same, drawn(two, 10), expected[25:]))
        assert two.pool._pool is not None
        os.kill(next(iter(two.pool._pool._processes)), signal.SIGKILL)
        assert all(map(same, drawn(two, 25), expected[35:]))


def test_processes_begin_after_a_parquet_file_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    write(tmp_path / "a.parquet", [name(i) for i in range(20)])
    data = DataSettings(train=[SourceSettings(path=str(tmp_path))], context=64, batch_bytes=64, workers=1)
    with Loader(data, 0) as loader:
        assert all(map(same, drawn(loader, 4), drawn(Loader(data.model_copy(update={"workers": 0}), 0), 4)))


def test_processes_end_with_the_one_that_trains(many: list[SourceSettings], tmp_path: Path) -> None:
    """Even if that one is killed."""
    import subprocess
    import sys
    import time

    program = f"""
if __name__ == "__main__":
    from bytelatent.data import DataSettings, Loader
    loader = Loader(DataSettings(train=[{{"path": {many[0].path!r}}}], batch_bytes=4000, workers=1), 0)
    next(loader)
    print(*loader.pool._pool._processes, flush=True)
    import time
    time.sleep(60)
"""
    (tmp_path / "program.py").write_text(program)
    with subprocess.Popen([sys.executable, str(tmp_path / "program.py")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":  # dead, and nobody's child
            return
        time.sleep(0.1)
    raise AssertionError("the reading process lives on")


def corrupted_source(folder: Path) -> DataSettings:
    """Three lines of one file, and a whole other file."""
    write(folder / "0.jsonl", [name(i) for i in range(40)])
    lines = (folder / "0.jsonl").read_bytes().splitlines(keepends=True)
    cut = b"{torn\n"
    (folder / "0.jsonl").write_bytes(b"".join([*lines[:3], cut, cut, *lines[3:30], cut, *lines[30:]]))
    write(folder / "1.parquet", [name(40)])
    (folder / "1.parquet").write_bytes((folder / "1.parquet").read_bytes()[:-9])
    train = [SourceSettings(path=str(folder))]
    return DataSettings(train=train, context=64, batch_bytes=64, shuffle_buffer=1, max_bad_rows=4)


def test_corrupted_rows_and_files_are_passed_over_up_to_a_limit(tmp_path: Path) -> None:
    data = corrupted_source(tmp_path)
    with logged() as said:
        loader = Loader(data, 0)
        found = Counter(decode_stream(drawn(loader, 60)))
    assert set(found) >= {name(i) for i in range(40)}
    epochs = loader.sources[0].position.epoch
    assert epochs >= 2
    assert len(said) == 4  # once, and not in each epoch
    for line in (
        "0.jsonl' line 4 is",
        "0.jsonl' line 5 is",
        "0.jsonl' line 33 is",
        "1.parquet' is not a whole Parquet",
    ):
        assert sum(line in text for text in said) == 1
    assert all(f"passed over ({number} of at most 4)" in line for number, line in enumerate(said, 1))
    for limit in range(4):
        with pytest.raises(UserError, match=r"is not JSON|is not a whole Parquet") as error:
            drawn(Loader(data.model_copy(update={"max_bad_rows": limit}), 0), 60)
        assert (f"; {limit} bad rows or files of" in str(error.value)) == (limit > 0)


def test_the_count_of_corrupted_rows_goes_on(tmp_path: Path) -> None:
    data = corrupted_source(tmp_path)
    loader = Loader(data, 0)
    for _ in range(40):
        next(loader)
        resumed = Loader(data, 0)
        resumed.load_state_dict(tensors_to_arrays(arrays_to_tensors(loader.state_dict())))
        found, expected = ((s.bad_epoch, s.bad_rows.count) for s in (resumed.sources[0], loader.sources[0]))
        assert found == expected
        expected = loader.sources[0].state_dict()
        state = resumed.sources[0].state_dict()
        assert state == expected


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", [name(1)])
    (tmp_path / "1.parquet").write_bytes((tmp_path / "1.parquet").read_bytes()[:-9])
    data = DataSettings(train=[SourceSettings(path=str(tmp_path))], context=64, batch_bytes=64, shuffle_buffer=1)
    with pytest.raises(UserError, match="holds no text that can be read"):
        next(Loader(data, 0))


def test_states_that_do_not_belong_together(tmp_path: Path) -> None:
    data, _ = sources(tmp_path, [5, 5], ["jsonl"])
    two = world_of(data, 2)
    with pytest.raises(UserError, match="that of rank 1 of 2, and this is rank 0 of 1"):
        Loader(data, 0).load_state_dict(two[1].state_dict())
    with pytest.raises(UserError, match="should be the positions of 2 ranks, not 1"):
        Loader(data, 0).redistribute([two[0].state_dict()])
