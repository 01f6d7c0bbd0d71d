"""Batches without end, and where they go on after a checkpoint."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bytelatent.data import Batch, DataSettings, Loader, Patcher, Piece, SourceSettings, batches_once
from bytelatent.data.reading import PieceReader, ReaderPool
from bytelatent.data.source import SourceReader
from bytelatent.errors import UserError
from bytelatent.model.loss import IGNORED
from bytelatent.patching import PatchSettings
from bytelatent.text import BadRows
from bytelatent.training.checkpoint.manager import arrays_to_tensors, tensors_to_arrays
from bytelatent.vocab import decode
from tests.model.tiny import tiny_byte_lm
from tests.text.text_files import KINDS, logged, write


def text(number: int, size: int = 12) -> bytes:
    return f"{number:04d}".encode() + bytes(97 + (number * 7 + i * i) % 26 for i in range(size + number % 9))


@pytest.fixture
def sources(tmp_path: Path) -> list[SourceSettings]:
    """One source of each kind of file, of two files each."""
    for place, kind in enumerate([*KINDS, "txt"]):
        for part in range(2):
            first = 100 * place + 10 * part
            documents = [text(first + i) for i in range(1 if kind == "txt" else 5)]
            write(tmp_path / kind.replace(".", "-") / f"{part}.{kind}", documents)
    return [SourceSettings(path=str(folder)) for folder in sorted(tmp_path.iterdir())]


def same(a: Batch, b: Batch) -> bool:
    streams = (tensor.equal(b.stream.tensors[name]) for name, tensor in a.stream.tensors.items())
    alike = type(a.stream) is type(b.stream) and a.stream.num_documents == b.stream.num_documents
    return alike and all(streams) and a.targets.equal(b.targets)


PATCHINGS = {"none": None, "static": PatchSettings(mode="static", patch_size=4), "space": PatchSettings(mode="space")}


@pytest.mark.parametrize("patching", [*PATCHINGS, "entropy"])
@pytest.mark.parametrize("done", [0, 1, 7, 40])
def test_goes_on_bit_for_bit(sources: list[SourceSettings], patching: str, done: int) -> None:
    """40 batches go several times through every source."""
    patcher = None
    if patching == "entropy":
        patcher = Patcher(PatchSettings(mode="entropy", threshold=5.2), tiny_byte_lm())
    elif PATCHINGS[patching] is not None:
        patcher = Patcher(PATCHINGS[patching])
    settings = DataSettings(
        train=sources, context=20, batch_bytes=48, batch_patches=24 if patcher else None, shuffle_buffer=5
    )
    loader = Loader(settings, seed=3, patcher=patcher)
    for _ in range(done):
        next(loader)
    stored = io.BytesIO()
    torch.save(arrays_to_tensors(loader.state_dict()), stored)
    following = [next(loader) for _ in range(12)]
    stored.seek(0)
    resumed = Loader(settings, seed=3, patcher=patcher)
    resumed.load_state_dict(tensors_to_arrays(torch.load(stored, weights_only=True)))
    assert all(same(next(resumed), batch) for batch in following)
    fresh = Loader(settings, seed=3, patcher=patcher)
    assert all(same(next(fresh), batch) for batch in following) == (done == 0)


def reader_of(path: Path, seed: int) -> SourceReader:
    return SourceReader(
        SourceSettings(path=str(path)), 0, ReaderPool([PieceReader("text", 1000, None, 1 << 20)], 0), seed
    )


def read(reader: SourceReader) -> bytes:
    return b"".join(decode(piece.ids) for piece in next(reader))


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_once_an_epoch(kind: str, tmp_path: Path) -> None:
    for part in range(3):
        write(tmp_path / f"{part}.{kind}", [text(10 * part + i) for i in range(4)])
    reader = reader_of(tmp_path, seed=0)
    epochs = [[read(reader) for _ in range(12)] for _ in range(4)]
    everything = sorted(text(10 * part + i) for part in range(3) for i in range(4))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1  # the files in another order


@pytest.mark.parametrize("done", range(1, 14))
def test_reader_goes_on_at_every_place(done: int, tmp_path: Path) -> None:
    """Also at a file's and an epoch's end, and with empty documents between."""
    for part, kind in enumerate(["jsonl.zst", "parquet", "jsonl"]):
        write(tmp_path / f"{part}.{kind}", [b"", text(10 * part), b"", text(10 * part + 1), b""])
    reader = reader_of(tmp_path, seed=1)
    for _ in range(done):
        next(reader)
    state = reader.state_dict()
    following = [read(reader) for _ in range(13)]
    resumed = reader_of(tmp_path, seed=1)
    resumed.load_state_dict(state)
    assert [read(resumed) for _ in range(13)] == following


def test_weights_are_shares_of_documents(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / f"{name}.jsonl", [name.encode() * 5] * 3)
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    train = [SourceSettings(path=str(tmp_path / f"{name}.jsonl"), weight=w) for name, w in weights.items()]
    loader = Loader(DataSettings(train=train, context=16, batch_bytes=600, shuffle_buffer=8), seed=0)
    counts: Counter[str] = Counter()
    for _ in range(20):
        counts.update(chr(target - 4) for target in next(loader).targets.tolist() if target >= 4)
    total = sum(counts.values())
    # About 2000 documents: a share's standard deviation is below 0.012.
    assert all(counts[name] / total == pytest.approx(weight / 8, abs=0.04) for name, weight in weights.items())


def test_shapes_never_change(sources: list[SourceSettings]) -> None:
    settings = DataSettings(train=sources, context=20, batch_bytes=48, batch_patches=9, shuffle_buffer=5)
    loader = Loader(settings, seed=0, patcher=Patcher(PatchSettings(mode="static", patch_size=3)))
    for _ in range(20):
        batch = next(loader)
        assert len(batch.stream.ids) == len(batch.targets) == 48
        assert batch.stream.patch_document.shape == (9,)  # type: ignore[attr-defined]
        assert 0 < batch.num_patches < 9


def test_batches_of_any_patch_size_hold_as_many_bytes(tmp_path: Path) -> None:
    write(tmp_path / "text.jsonl", [b"some text of a hundred bytes " * 4] * 9)
    train = [SourceSettings(path=str(tmp_path / "text.jsonl"))]
    for size, slots in ((2, 300), (4, 150), (8, 75)):
        settings = DataSettings(train=train, context=200, batch_bytes=480, patch_bytes=size, shuffle_buffer=5)
        loader = Loader(settings, seed=0, patcher=Patcher(PatchSettings(mode="static", patch_size=size)))
        for batch in (next(loader) for _ in range(5)):
            assert (batch.num_targets, batch.stream.patch_document.shape) == (480, (slots,))  # type: ignore[attr-defined]
    tokens = DataSettings(train=train, tokenizer="x.json", context=200, batch_bytes=480, patch_bytes=4)
    assert (next(Loader(tokens, seed=0)).num_targets, tokens.patch_slots) == (120, None)


def test_seeds_differ(sources: list[SourceSettings]) -> None:
    settings = DataSettings(train=sources, context=20, batch_bytes=200, shuffle_buffer=5)
    assert same(next(Loader(settings, seed=0)), next(Loader(settings, seed=0)))
    assert not same(next(Loader(settings, seed=0)), next(Loader(settings, seed=1)))


def test_other_files_than_the_checkpoints(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.txt", [b"one"])
    settings = DataSettings(train=[SourceSettings(path=str(tmp_path / "a"))], batch_bytes=10)
    state = Loader(settings, seed=0).state_dict()
    write(tmp_path / "a" / "1.txt", [b"two"])
    with pytest.raises(UserError, match="are not those of the checkpoint"):
        Loader(settings, seed=0).load_state_dict(state)
    two = DataSettings(train=[SourceSettings(path=str(tmp_path / "a"))] * 2)
    with pytest.raises(UserError, match="number of sources"):
        Loader(two, seed=0).load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_every_document_is_empty(kind: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{kind}", [b"", b""])
    with pytest.raises(UserError, match="holds no text that can be read"):
        next(Loader(DataSettings(train=[SourceSettings(path=str(tmp_path))]), seed=0))


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*nowhere' does not exist"):
        Loader(DataSettings(train=[SourceSettings(path=str(tmp_path / "nowhere"))]), seed=0)


@pytest.mark.parametrize("context", [7, 100])
def test_validation_reads_every_document_once(sources: list[SourceSettings], context: int) -> None:
    batches = list(batches_once(sources, context, 50, Patcher(PatchSettings(mode="space"))))
    predicted = [target for batch in batches for target in batch.targets.tolist()]
    documents = [text(100 * place + 10 * part + i) for place in (0, 1, 2, 3, 4) for part in (0, 1) for i in range(5)]
    documents = [d for d in documents if int(d[:4]) < 400 or int(d[:4]) % 10 == 0]
    order = {"jsonl": 0, "jsonl-gz": 1, "jsonl-zst": 2, "parquet": 3, "txt": 4}
    assert [Path(source.path).name for source in sources] == list(order)
    assert predicted == [i for d in documents for i in [*(b + 4 for b in d), 2]]
    assert sum(batch.num_bytes for batch in batches) == sum(map(len, documents))


def test_validation_in_one_shape(sources: list[SourceSettings]) -> None:
    patcher, slots = Patcher(PatchSettings(mode="space")), 9
    once = list(batches_once(sources, 16, 20, patcher))
    padded = list(batches_once(sources, 16, 20, patcher, slots=slots, padded=True))
    assert len({len(batch.targets) for batch in once}) > 1
    assert {(len(batch.targets), batch.stream.num_patches) for batch in padded} == {(20, slots)}  # type: ignore
    predicted, expected = (
        [t for batch in some for t in batch.targets.tolist() if t != IGNORED] for some in (padded, once)
    )
    assert predicted == expected
    assert sum(batch.num_targets for batch in padded) == len(expected)


@pytest.mark.parametrize("max_bytes", [None, 7_000])
def test_a_long_document_is_patched_a_batch_at_a_time(tmp_path: Path, max_bytes: int | None) -> None:
    """Memory is that of a batch, whatever the length of a document."""
    sizes: list[int] = []

    class Watched(Patcher):
        def __call__(self, pieces: Sequence[Piece]) -> list[Piece]:
            sizes.append(sum(map(len, pieces)))
            return super().__call__(pieces)

    (tmp_path / "long.txt").write_bytes(b"word " * 2_000)
    batches = list(
        batches_once([SourceSettings(path=str(tmp_path))], 64, 256, Watched(PatchSettings(mode="space")), max_bytes)
    )
    assert sum(batch.num_bytes for batch in batches) == (max_bytes or 10_000)
    assert max(sizes) < 256 + 64


def test_validation_names_what_it_passes_over(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_bytes(b"a note")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with logged() as said:
        list(batches_once([SourceSettings(path=str(tmp_path))], 16, 16, bad_rows=BadRows(0)))
    assert [line.partition("passed over, ")[2] for line in said] == ["a PNG image: 'picture.png'"]


@pytest.mark.parametrize("max_bytes", [1, 30, 31, 1000])
def test_validation_of_so_many_bytes(sources: list[SourceSettings], max_bytes: int) -> None:
    once = list(batches_once(sources, 16, 20))
    some = list(batches_once(sources, 16, 20, max_bytes=max_bytes))
    everything = [t for batch in once for t in batch.targets.tolist() if t >= 4]
    read = [t for batch in some for t in batch.targets.tolist() if t >= 4]
    assert read == everything[:max_bytes]
    assert 31 < len(everything) < 1000
