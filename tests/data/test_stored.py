"""Training batches from stored entropies and stored starts, and what does not belong together."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from bytelatent.data import DataSettings, Loader, Patcher, StoredCheck, batches_once
from bytelatent.data.entropies import EntropySettings, store_entropies
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.text import Stored, read_documents
from bytelatent.text.stored import read_stored
from bytelatent.weights import fingerprint
from tests.data.test_loader import same
from tests.model.tiny import tiny_byte_lm
from tests.processes import forked_readers
from tests.text.text_files import write

CONTEXT = 50
PATCHING = PatchSettings(mode="entropy", threshold=5.2)
PATCHINGS = [
    PATCHING,
    PatchSettings(mode="entropy", threshold=0.01, monotonicity=True, max_patch_length=7),
    PatchSettings(mode="entropy", threshold=5.2, reset_at_newline=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text plain, with entropies, and with the starts of two modes; some longer than the context."""
    folder = tmp_path_factory.mktemp("stored")
    draw = np.random.default_rng(0)
    texts = [draw.bytes(int(size)) for size in draw.integers(1, 160, size=60)]
    source = str(write(folder / "text" / "a.jsonl", texts))
    byte_lm = tiny_byte_lm(window=6)
    asked = EntropySettings(context=CONTEXT, batch_bytes=256, dtype="float32")
    store_entropies(byte_lm, fingerprint(byte_lm), [source], folder / "entropies", asked)
    reset = asked.model_copy(update={"reset_at_newline": True})
    store_entropies(byte_lm, fingerprint(byte_lm), [source], folder / "reset", reset)
    for number, patching in enumerate(PATCHINGS):
        with_patching = asked.model_copy(update={"patching": patching})
        store_entropies(byte_lm, fingerprint(byte_lm), [source], folder / f"starts{number}", with_patching)
    return folder


def settings(source: Path | str, **changes: object) -> DataSettings:
    values = {"train": str(source), "context": CONTEXT, "batch_bytes": 128, "batch_patches": 64, "shuffle_buffer": 5}
    return DataSettings.parse({**values, **changes})


def live(patching: PatchSettings = PATCHING) -> Patcher:
    byte_lm = tiny_byte_lm(window=6)
    return Patcher(patching, byte_lm, fingerprint=fingerprint(byte_lm))


@pytest.mark.parametrize("number", range(len(PATCHINGS)))
@pytest.mark.parametrize("with_byte_lm", [True, False])
def test_batches_from_stored_starts_are_those_of_the_live_byte_lm(
    folder: Path, number: int, with_byte_lm: bool
) -> None:
    patching = PATCHINGS[number]
    expected = Loader(settings(folder / "text"), 3, live(patching))
    stored = Loader(settings(folder / f"starts{number}"), 3, live(patching) if with_byte_lm else Patcher(patching))
    assert all(same(next(stored), next(expected)) for _ in range(40))


@pytest.mark.parametrize("kind", ["entropies", "reset"])
def test_batches_from_stored_entropies_are_those_of_the_live_byte_lm(folder: Path, kind: str) -> None:
    """The threshold lies between two float16 numbers, so rounding moves no patch unless an entropy is as near."""
    [file] = (folder / kind).glob("*.parquet")
    values = np.concatenate([document.entropies for _, document in read_documents(str(file))])  # type: ignore[misc]
    gaps = np.sort(np.unique(values))
    middle = gaps[len(gaps) // 2 : len(gaps) // 2 + 2]
    patching = PatchSettings(mode="entropy", threshold=float(middle.mean()), reset_at_newline=kind == "reset")
    expected = Loader(settings(folder / "text"), 3, live(patching))
    stored = Loader(settings(folder / kind), 3, Patcher(patching))
    patches = 0
    for _ in range(40):
        batch = next(stored)
        assert same(batch, next(expected))
        patches += batch.num_patches
    assert patches > 300


@pytest.mark.parametrize("kind", ["entropies", "starts0"])
def test_stored_batches_go_on_and_need_no_byte_lm_in_reading_processes(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked_readers(monkeypatch)
    data = settings(folder / kind)
    loader = Loader(data, 1, Patcher(PATCHING))
    for _ in range(9):
        next(loader)
    assert all(piece.entropies is None for piece in loader.buffer)  # they take four times the text's memory
    state = loader.state_dict()
    following = [next(loader) for _ in range(9)]
    with Loader(data.model_copy(update={"workers": 1}), 1, Patcher(PATCHING)) as resumed:
        resumed.load_state_dict(state)
        assert all(same(next(resumed), batch) for batch in following)


@pytest.mark.parametrize("kind", ["entropies", "starts0"])
@pytest.mark.parametrize("patching", [None, PatchSettings(mode="space"), PatchSettings(mode="static", patch_size=3)])
def test_modes_that_need_none_leave_what_is_stored(folder: Path, kind: str, patching: PatchSettings | None) -> None:
    patcher = None if patching is None else Patcher(patching)
    patches = {} if patching else {"batch_patches": None}
    expected, found = (Loader(settings(folder / name, **patches), 2, patcher) for name in ("text", kind))
    assert all(same(next(found), next(expected)) for _ in range(10))
    once = [list(batches_once(settings(folder / name).train, CONTEXT, 100, patcher)) for name in ("text", kind)]
    assert len(once[0]) == len(once[1]) > 5
    assert all(map(same, *once))


def test_validation_uses_what_is_stored(folder: Path) -> None:
    of_text = list(batches_once(settings(folder / "text").train, CONTEXT, 100, live()))
    of_starts = list(batches_once(settings(folder / "starts0").train, CONTEXT, 100, Patcher(PATCHING)))
    assert len(of_text) > 5
    assert all(map(same, of_text, of_starts))
    cut = list(batches_once(settings(folder / "starts0").train, CONTEXT, 100, Patcher(PATCHING), max_bytes=333))
    assert sum(batch.num_bytes for batch in cut) == 333


def complaint(source: Path | str, patcher: Patcher) -> str:
    loader = Loader(settings(source), 0, patcher)
    with pytest.raises(UserError) as error:
        list(itertools.islice(loader, 5))
    with pytest.raises(UserError, match=str(error.value).split("'")[0]):
        list(batches_once(settings(source).train, CONTEXT, 100, patcher))
    return str(error.value)


def test_what_does_not_belong_together(folder: Path) -> None:
    other = tiny_byte_lm(seed=1, window=6)
    assert "another byte LM" in complaint(
        folder / "entropies", Patcher(PATCHING, other, fingerprint=fingerprint(other))
    )
    wide = tiny_byte_lm(window=7)
    assert "a window of 6 ids; entropy_model has 7" in complaint(
        folder / "entropies", Patcher(PATCHING, wide, fingerprint=fingerprint(wide))
    )
    assert "with reset_at_newline=False, and patching has reset_at_newline=True" in complaint(
        folder / "entropies", Patcher(PATCHINGS[2])
    )
    line = complaint(folder / "starts0", Patcher(PATCHING.model_copy(update={"threshold": 5.3})))
    assert "threshold=5.2" in line
    assert "threshold=5.3" in line
    assert "needs a byte LM or entropies stored" in complaint(folder / "text", Patcher(PATCHING))


@pytest.mark.parametrize("change", [{"byte_lm": "x"}, {"window": 9}, {"dtype": "bfloat16"}])
def test_files_that_were_not_made_alike(folder: Path, change: dict[str, object]) -> None:
    [file] = (folder / "entropies").glob("*.parquet")
    stored = read_stored(file)
    assert isinstance(stored, Stored)
    check = StoredCheck(Patcher(PATCHING))
    check(stored, "a.parquet")
    check(stored.model_copy(update={"source_bytes": 1}), "b.parquet")
    [(name, _)] = change.items()
    with pytest.raises(UserError, match=rf"'c.parquet' and 'a.parquet' were not made alike \({name}: "):
        check(stored.model_copy(update=change), "c.parquet")
