"""Runs whose folder others have written to, or a crash or a copy has corrupted."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bytelatent.commands.export import export_checkpoint
from bytelatent.errors import UserError
from bytelatent.training import train
from bytelatent.weights import load
from tests.training.test_faults import scaled
from tests.training.test_resume import cut_off
from tests.training.tiny_runs import (
    assert_equal_runs,
    blt_run,
    byte_lm_run,
    checkpoints,
    log_of,
    losses,
    settings,
)


@pytest.fixture
def begun(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, cut off after step 8, with a checkpoint after step 5."""
    cut_off(byte_lm_run(tmp_path / "run", text), 8, monkeypatch)
    return tmp_path / "run"


def go_on(run: Path, text: Path) -> None:
    train(settings(byte_lm_run(run, text)))


@pytest.mark.parametrize("keep_every", [None, 7])
def test_copies_of_checkpoints_are_nobodys(tmp_path: Path, text: Path, keep_every: int | None) -> None:
    """They are not gone on from, not removed, and do not push others out."""
    more = {"checkpoint": {"every": 2, "keep": 2, "keep_every": keep_every}}
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=4, **more)))
    copies = ["step-00000002.bak", "step-00000002_best", "step-best"]
    for name in copies:
        shutil.copytree(run / "checkpoints" / "step-00000002", run / "checkpoints" / name)
    (run / "checkpoints" / "step-latest").symlink_to("step-00000002")
    before = losses(run)
    train(settings(byte_lm_run(run, text, steps=8, **more)))
    assert losses(run)[:4] == before
    assert checkpoints(run) == sorted([*copies, "step-00000006", "step-00000008", "step-latest"])
    assert load(run).source.startswith(f"{run / 'checkpoints' / 'step-00000008'} (")
    with pytest.raises(UserError, match=r"has no checkpoint after step 77; it has 6, 8$"):
        export_checkpoint(str(run), 77, str(tmp_path / "out"))
    export_checkpoint(str(run), None, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["origin"]["training_bytes"] == losses(run)[-1][1]


def test_only_a_copy_binds_no_settings(tmp_path: Path, text: Path, begun: Path) -> None:
    (begun / "checkpoints" / "step-00000005").rename(begun / "checkpoints" / "step-best")
    train(settings(byte_lm_run(begun, text, steps=2, seed=3)))
    assert checkpoints(begun) == ["step-00000002", "step-best"]


@pytest.mark.parametrize("line", [b'{"step": 2, "bi\0\n', b'{"note": "hi"}\n', b"[1]\n", b"\xff\xfe\n"])
def test_a_corrupted_line_costs_no_other(
    text: Path, begun: Path, whole: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = begun / "metrics.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*rows[:2], line, *rows[2:], b'{"step": 9, "cut o']))
    go_on(begun, text)
    aside = begun / "metrics.jsonl.damaged"
    shown = f"'{path}': no row of metrics is in line 3; moved to '{aside}'"
    assert [said for said in log_of(caplog).splitlines() if "no row" in said] == [shown]
    assert aside.read_bytes() == line
    assert_equal_runs(begun, whole)


def lead_nowhere(place: Path) -> None:
    place.symlink_to(place.parent / "gone")


def make_a_file(place: Path) -> None:
    place.write_text("")


@pytest.mark.parametrize("spoil", [lead_nowhere, make_a_file])
def test_a_place_that_takes_no_checkpoints_is_refused_at_once(
    tmp_path: Path, text: Path, spoil: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    spoil(run / "checkpoints")
    calls = scaled(monkeypatch, {})
    remove = rf"cannot take checkpoints: .*remove '{run / 'checkpoints'}', or use another run=FOLDER"
    with pytest.raises(UserError, match=remove):
        go_on(run, text)
    assert not calls
    assert sorted(os.listdir(run)) == [".lock", "checkpoints"]


def test_checkpoints_may_lead_elsewhere(tmp_path: Path, text: Path, whole: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "large").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "large")
    go_on(run, text)
    assert sorted(os.listdir(tmp_path / "large")) == ["step-00000010", "step-00000012"]
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("name", [".nfs0001", "00001.pt"])
def test_a_file_beside_those_of_the_ranks_is_ignored(text: Path, begun: Path, whole: Path, name: str) -> None:
    (begun / "checkpoints" / "step-00000005" / "ranks" / name).touch()
    go_on(begun, text)
    assert_equal_runs(begun, whole)


def test_a_corrupted_file_of_a_rank_makes_a_checkpoint_corrupt(text: Path, begun: Path) -> None:
    (begun / "checkpoints" / "step-00000005" / "ranks" / "00000.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"is corrupt \(ranks/00000.pt is not as it was written\)"):
        go_on(begun, text)


def test_all_corrupt_is_one_error_everywhere(tmp_path: Path, text: Path, begun: Path) -> None:
    (begun / "checkpoints" / "step-00000005" / "progress.pt").unlink()
    shown = set()
    for call in (
        lambda: go_on(begun, text),
        lambda: export_checkpoint(str(begun), None, str(tmp_path / "out")),
        lambda: load(begun),
    ):
        with pytest.raises(
            UserError, match=r"no checkpoint of .*progress.pt is missing.*remove them to start again"
        ) as no:
            call()
        shown.add(str(no.value))
    assert len(shown) == 1
    shutil.rmtree(begun / "checkpoints")
    for call in (lambda: export_checkpoint(str(begun), None, str(tmp_path / "out")), lambda: load(begun)):
        with pytest.raises(UserError, match="has no checkpoint yet; train it further: blt train"):
            call()


@pytest.mark.parametrize("damage", [b"", b'{"threshold": 1', b"\xff"])
def test_a_corrupted_calibration_is_one_line(
    tmp_path: Path, text: Path, byte_lm: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    cut_off(blt_run(run, text, byte_lm), 6, monkeypatch)
    found = (run / "calibration.json").read_bytes()
    (run / "calibration.json").write_bytes(damage)
    with pytest.raises(
        UserError, match=r"calibration.json' is corrupt; remove it, and the same command calibrates again"
    ):
        train(settings(blt_run(run, text, byte_lm)))
    (run / "calibration.json").unlink()
    train(settings(blt_run(run, text, byte_lm)))
    assert (run / "calibration.json").read_bytes() == found
    assert losses(run)[-1][0] == 12


@pytest.mark.parametrize("damage", ["", "{", "steps: many\n"])
def test_corrupted_settings_name_the_way_out(text: Path, begun: Path, whole: Path, damage: str) -> None:
    (begun / "settings.yaml").write_text(damage)
    load(begun)  # what a model needs is with its weights
    with pytest.raises(UserError, match=r"settings.yaml.*remove it and give the same ones again, or use another run="):
        go_on(begun, text)
    (begun / "settings.yaml").unlink()
    go_on(begun, text)
    assert_equal_runs(begun, whole)
