"""Text that changed between two starts of a run is named before the first step."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest

from bytelatent.errors import UserError
from bytelatent.training import run_setup, train
from tests.training.crew import Crew
from tests.training.plans import train_as
from tests.training.plans import values as values_of_many
from tests.training.tiny_runs import assert_equal_runs, byte_lm_run, log_of, losses, settings, write_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of text."""
    place = tmp_path / "texts"
    place.mkdir()
    for seed, name in enumerate("abc"):
        write_text(place / f"{name}.jsonl", seed)
    return place


def values(run: Path, text: Path | str, steps: int, allow_changed: bool = False, **data: Any) -> dict[str, Any]:
    return byte_lm_run(run, Path(text), steps, data={"train": str(text), "allow_changed": allow_changed, **data})


def replaced(folder: Path) -> None:
    write_text(folder / "b.jsonl", seed=8)


def cut(folder: Path) -> None:
    file = folder / "b.jsonl"
    file.write_bytes(file.read_bytes()[:-300])


def edited(folder: Path) -> None:
    """One letter in the middle, at the same size and time."""
    file, before = folder / "b.jsonl", (folder / "b.jsonl").stat()
    content = bytearray(file.read_bytes())
    at = content.index(b"cat", len(content) // 2)
    content[at : at + 3] = b"dog"
    file.write_bytes(bytes(content))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


TIME = r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:.]+[+-][0-9:]+"


@pytest.mark.parametrize("change", [replaced, cut, edited])
def test_changed_text_is_named_before_the_first_step(
    tmp_path: Path, folder: Path, change: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(settings(values(tmp_path / "run", folder, 5)))
    size = (folder / "b.jsonl").stat().st_size
    change(folder)
    before = losses(run)
    with pytest.raises(UserError) as caught:
        train(settings(values(run, folder, 9)))
    now = (folder / "b.jsonl").stat().st_size
    said = rf"'{folder}/b\.jsonl' was {size:,} bytes, {TIME}, now {now:,} bytes, {TIME}"
    assert re.match(rf"data: the text of '{run}' has changed; .*: {said}; put it back", str(caught.value))
    assert "data.allow_changed=true" in str(caught.value)
    assert losses(run) == before
    log_of(caplog)
    train(settings(values(run, folder, 9, allow_changed=True)))
    assert re.search(rf"{said}; training continues with what is there now", log_of(caplog))
    assert len(losses(run)) == 9
    train(settings(values(run, folder, 10)))  # what it is now is what counts from now on
    assert len(losses(run)) == 10


def test_copied_and_touched_text_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was moved with its text, by relative paths."""
    whole, here, there = (tmp_path / name for name in ("whole", "here", "there"))
    for place in (whole, here):
        (place / "texts").mkdir(parents=True)
        write_text(place / "texts" / "a.jsonl", 0)
    for place, steps in ((whole, 9), (here, 5)):
        monkeypatch.chdir(place)
        train(settings(values(Path("run"), "texts", steps)))
    shutil.copytree(here, there, copy_function=shutil.copy)
    shutil.rmtree(here)
    monkeypatch.chdir(there)
    os.utime("texts/a.jsonl", (1e9, 1e9))
    log_of(caplog)
    train(settings(values(Path("run"), "texts", 9)))
    assert "text" not in log_of(caplog)
    assert [row[0] for row in losses(Path("run"))] == list(range(1, 10))


def test_files_that_came_and_went(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train(settings(values(tmp_path / "run", folder, 5)))
    (folder / "a.jsonl").rename(tmp_path / "elsewhere.jsonl")
    write_text(folder / "d.jsonl", 5)
    with pytest.raises(UserError, match=rf"'{folder}/d.jsonl' is new \([0-9,]+ bytes, .*'{folder}/a.jsonl' is gone"):
        train(settings(values(run, folder, 9)))
    log_of(caplog)
    train(settings(values(run, folder, 9, allow_changed=True)))
    said = log_of(caplog)
    assert f"data: the files of '{folder}' changed: a new epoch of them begins" in said
    assert f"'{folder}/d.jsonl' is new" in said
    assert len(losses(run)) == 9


def test_the_text_that_is_put_back_goes_on_bit_for_bit(tmp_path: Path, folder: Path) -> None:
    whole, run = (train(settings(values(tmp_path / name, folder, 5))) for name in ("whole", "run"))
    train(settings(values(whole, folder, 9)))
    before = (folder / "b.jsonl").read_bytes()
    replaced(folder)
    with pytest.raises(UserError, match="has changed"):
        train(settings(values(run, folder, 9)))
    (folder / "b.jsonl").write_bytes(before)
    train(settings(values(run, folder, 9)))
    assert_equal_runs(run, whole)


def test_held_out_text_counts_too(tmp_path: Path, text: Path) -> None:
    valid = write_text(tmp_path / "valid.jsonl", 1)
    run = train(settings(values(tmp_path / "run", text, 5, valid=str(valid))))
    write_text(valid, 2)
    with pytest.raises(UserError, match=r"valid\.jsonl' was"):
        train(settings(values(run, text, 9, valid=str(valid))))


def test_of_much_text_beginnings_and_ends_are_compared(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_setup, "READ_WHOLE", 1000)
    monkeypatch.setattr(run_setup, "EDGE", 200)
    run = train(settings(values(tmp_path / "run", folder, 5)))
    edited(folder)
    os.utime(folder / "b.jsonl", (1e9, 1e9))
    log_of(caplog)
    train(settings(values(run, folder, 6)))
    line = "data: same size, beginning and end, and so taken for the same text: "
    assert re.search(rf"{line}'{folder}/b.jsonl' was of {TIME}, now of 2001-09-0", log_of(caplog))
    file = folder / "b.jsonl"
    file.write_bytes(file.read_bytes()[:-150] + b"x" * 149 + b"\n")
    with pytest.raises(UserError, match="has changed"):
        train(settings(values(run, folder, 9)))


def test_text_elsewhere_is_known_by_its_size(tmp_path: Path, text: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/changed/a.jsonl", text.read_bytes())
    source = "memory://changed/*.jsonl"
    run = train(settings(values(tmp_path / "run", source, 5)))
    train(settings(values(run, source, 6)))
    fs.pipe("/changed/a.jsonl", text.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"'memory://.*a.jsonl' was [0-9,]+ bytes, .*, now 3,000 bytes"):
        train(settings(values(run, source, 9)))


def test_a_corrupted_listing_is_one_line(tmp_path: Path, text: Path) -> None:
    run = train(settings(values(tmp_path / "run", text, 5)))
    (run / "text.json").write_text("[{")
    with pytest.raises(UserError, match=r"text\.json'.* is corrupt"):
        train(settings(values(run, text, 9)))
    (run / "text.json").unlink()
    train(settings(values(run, text, 9)))
    assert json.loads((run / "text.json").read_text())[0]["size"] == text.stat().st_size


def test_two_ranks_log_it_once_and_go_on_together(crew: Crew, tmp_path: Path, folder: Path) -> None:
    def given(steps: int, allow_changed: bool = False) -> dict[str, Any]:
        data = {"train": str(folder), "allow_changed": allow_changed}
        return values_of_many(folder, tmp_path / "run", steps=steps, data=data)

    crew.run((2, train_as, given(4)))
    replaced(folder)
    write_text(folder / "d.jsonl", 5)
    [[first, second]] = crew.run((2, train_as, given(8)))
    assert sum("has changed" in line for line in first) == 1
    assert second == ["exit code 2"]
    [[first, second]] = crew.run((2, train_as, given(8, allow_changed=True)))
    assert sum("a new epoch of them begins" in line for line in first) == 1
    assert not second
    assert [row[0] for row in losses(tmp_path / "run")] == list(range(1, 9))


def test_nothing_is_compared_before_the_first_checkpoint(tmp_path: Path, folder: Path) -> None:
    run = tmp_path / "run"
    train(settings(values(run, folder, 5)))
    shutil.rmtree(run / "checkpoints")
    replaced(folder)
    train(settings(values(run, folder, 5)))
    assert_equal_runs(run, train(settings(values(tmp_path / "other", folder, 5))))
