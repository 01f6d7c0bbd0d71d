"""A run that was cut off goes on as if nothing had happened, bit for bit."""

import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent.errors import UserError
from bytelatent.training import read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.training.run_setup import DATA_MAY_CHANGE, MAY_CHANGE, OPTIMIZER_MAY_CHANGE
from bytelatent.training.schedule import learning_rate
from bytelatent.training.settings import OptimizerSettings
from tests.processes import Command
from tests.training.tiny_runs import (
    assert_equal_runs,
    blt_run,
    byte_lm_run,
    checkpoints,
    command,
    environment,
    finished,
    log_of,
    losses,
    settings,
    weights,
    write_text,
)

# Trains as `python -m bytelatent.train` does, and kills itself in the middle of a step or of a checkpoint.
KILLS_ITSELF = """
import os, signal, sys
from bytelatent.commands import train
from bytelatent.training import trainer as loop
from bytelatent.training.checkpoint import manager

place, at = sys.argv[1], int(sys.argv[2])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if place == "step":
    inner = loop.cross_entropy
    calls = []
    def cross_entropy(model, batch):
        calls.append(1)
        if len(calls) == at:
            die()
        return inner(model, batch)
    loop.cross_entropy = cross_entropy
else:
    inner_write = manager.NATIVE.write
    calls = []
    def write(folder, model):
        inner_write(folder, model)
        calls.append(1)
        if len(calls) == at:
            die()
    manager.NATIVE.write = write
train.main(sys.argv[3:])
"""


class CutOffError(Exception):
    """Stands for the end of the process."""


def cut_off(values: dict[str, Any], after_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train so many steps, and stop there without a checkpoint."""

    def rate(step: int, progress: float, optimizer: OptimizerSettings) -> float:
        if step == after_step:
            raise CutOffError
        return learning_rate(step, progress, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", rate)
        with pytest.raises(CutOffError):
            train(settings(values))


def test_a_blt_that_is_killed_goes_on_bit_for_bit(tmp_path: Path, text: Path, byte_lm: Path) -> None:
    def values(run: Path) -> dict[str, Any]:
        return blt_run(run, text, byte_lm, steps=60, checkpoint={"every": 7}, data={"train": str(text)})

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(settings(values(whole)))
    process = Command(command(values(killed)), environment())
    until = time.monotonic() + 60
    while len(read_metrics(killed / "metrics.jsonl")) < 20 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left = losses(killed)
    assert 20 <= len(left) < 60
    again = finished(command(values(killed)))
    assert again.returncode == 0, again.stderr
    assert "calibrating" not in again.stdout
    assert again.stdout.splitlines()[-1] == str(killed)
    assert_equal_runs(killed, whole)


@pytest.mark.parametrize(("place", "at", "left", "rows"), [("step", 10, "step-00000005", 8), ("checkpoint", 2, "", 10)])
def test_a_byte_lm_that_is_killed_goes_on_bit_for_bit(
    tmp_path: Path, text: Path, whole: Path, place: str, at: int, left: str, rows: int
) -> None:
    killed = tmp_path / "killed"
    arguments = command(byte_lm_run(killed, text))
    ended = finished([sys.executable, "-c", KILLS_ITSELF, place, str(at), *arguments[3:]])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert checkpoints(killed)[-1] == (left or "step-00000005")
    assert len(read_metrics(killed / "metrics.jsonl")) == rows  # some after the checkpoint, to be written again
    train(settings(byte_lm_run(killed, text)))
    assert [step for step, *_ in losses(killed)] == list(range(1, 13))
    assert_equal_runs(killed, whole)


@pytest.mark.parametrize(
    "more",
    [
        {"data": {"shuffle_buffer": 1}},
        {"data": {"shuffle_buffer": 500}},  # more than there are pieces
        {"optimizer": {"lr": 3e-3, "warmup_steps": 3, "accumulation": 2}},
        {"data": {"context": 16, "batch_bytes": 40}},  # pieces are cut to fit
        {"data": {"batch_patches": 30}},
        {"dtype": "bfloat16"},
        {"optimizer": {"lr": 3e-3, "warmup_steps": 3, "accumulation": 2, "hash_gradients": "rows"}},
        {
            "optimizer": {"name": "muon", "warmup_steps": 3, "hash_gradients": "rows", "hash_weight_decay": 5.0}
            | {"lr_scale": {"hash_tables": 3.0}}
        },
        {"seed": 5, "validation": {"every": 4, "max_bytes": 500}},
    ],
    ids=str,
)
def test_whatever_the_settings(
    tmp_path: Path, text: Path, byte_lm: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "validation" in more:
        more["data"] = {"valid": str(write_text(tmp_path / "valid.jsonl", seed=1))}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings(blt_run(whole, text, byte_lm, **dict(more))))
    cut_off(blt_run(cut, text, byte_lm, **dict(more)), 8, monkeypatch)
    assert checkpoints(cut) == ["step-00000005"]
    assert losses(cut)[-1][0] == 8
    train(settings(blt_run(cut, text, byte_lm, **dict(more))))
    assert_equal_runs(cut, whole)


def test_weighted_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for seed in range(3):
        write_text(folder / f"{seed}.jsonl", seed, num_documents=4)  # short: several epochs, in several orders
    rare = write_text(tmp_path / "rare.jsonl", seed=9, num_documents=5)
    data = {"train": [{"path": str(folder), "weight": 3}, {"path": str(rare), "weight": 0.5}]}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(settings(byte_lm_run(whole, folder, steps=30, data=dict(data))))
    cut_off(byte_lm_run(cut, folder, steps=30, data=dict(data)), 22, monkeypatch)
    train(settings(byte_lm_run(cut, folder, steps=30, data=dict(data))))
    assert_equal_runs(cut, whole)


def test_steps_may_be_raised(tmp_path: Path, text: Path) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=6)))
    first = losses(run)
    train(settings(byte_lm_run(run, text, steps=11)))
    assert losses(run)[:6] == first
    assert [step for step, *_ in losses(run)] == list(range(1, 12))


def test_settings_that_cannot_be_tried_out_are_not_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=2)))
    before = (run / "settings.yaml").read_text()

    def too_large(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "cross_entropy", too_large)
        with pytest.raises(UserError, match=r"lower data\.batch_bytes"):
            train(settings(byte_lm_run(run, text, steps=3)))
    assert (run / "settings.yaml").read_text() == before
    train(settings(byte_lm_run(run, text, steps=3)))
    assert "\nsteps: 3\n" in (run / "settings.yaml").read_text()


def test_a_run_keeps_its_byte_lm(tmp_path: Path, text: Path, byte_lm: Path) -> None:
    run = train(settings(blt_run(tmp_path / "run", text, byte_lm, steps=2)))
    before = (run / "settings.yaml").read_text()
    with pytest.raises(UserError, match=rf"was begun with other settings \(entropy_model: {byte_lm}, now None\)"):
        train(settings({**blt_run(run, text, byte_lm, steps=3), "entropy_model": None}))
    assert (run / "settings.yaml").read_text() == before


def test_other_settings_are_said_in_a_line_each(tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=6)))
    assert "resumes with" not in log_of(caplog)
    more = {"checkpoint": {"every": 9}, "data": {"max_bad_rows": 3}, "validation": {"max_bytes": None}}
    more["optimizer"] = {"lr": 3e-3, "warmup_steps": 3, "accumulation": 2}
    train(settings(byte_lm_run(run, text, steps=7, **more)))
    assert "\nsteps: 7\n" in (run / "settings.yaml").read_text()
    lines = [line for line in log_of(caplog).splitlines() if line.startswith("resumes with")]
    assert lines == [
        "resumes with checkpoint.every: 9, before 5",
        "resumes with data.max_bad_rows: 3, before 100",
        "resumes with optimizer.accumulation: 2, before 1",
        "resumes with steps: 7, before 6",
        "resumes with validation.max_bytes: None, before 1000000",
    ]


def test_the_docs_list_what_may_differ() -> None:
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    listed = page.partition("A run that is resumed may have other ")[2].partition("One line")[0]
    assert set(re.findall(r"`([^`]+)`", listed)) == {
        *MAY_CHANGE,
        *(f"data.{name}" for name in DATA_MAY_CHANGE),
        *(f"optimizer.{name}" for name in OPTIMIZER_MAY_CHANGE),
    }


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"steps": 6}, "nothing is left to do: all 6 steps are done; more steps continue the run"),
        ({"steps": 4}, "nothing is left to do: 6 steps are done, and steps=4 asks for fewer"),
        (
            {"steps": None, "minutes": 1e-9},
            "nothing is left to do: the run's 1e-09 minutes are over; more minutes continue it",
        ),
    ],
)
def test_a_run_that_is_over_is_named_and_stays_as_it_is(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture, more: dict[str, Any], line: str
) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=6)))
    before = [(run / name).read_bytes() for name in ("metrics.jsonl", "settings.yaml")]
    assert "nothing is left" not in log_of(caplog)
    train(settings(byte_lm_run(run, text, **more)))
    assert log_of(caplog) == f"{line}\n"
    assert [(run / name).read_bytes() for name in ("metrics.jsonl", "settings.yaml")] == before
    assert checkpoints(run)[-1] == "step-00000006"


def test_settings_count_once_a_checkpoint_was_read(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=6)))
    before = (run / "settings.yaml").read_text()
    for place in (run / "checkpoints").iterdir():
        (place / "progress.pt").write_bytes(b"")
    log_of(caplog)
    with pytest.raises(UserError, match=r"no checkpoint of .* is whole"):
        train(settings(byte_lm_run(run, text, steps=7)))
    assert "resumes with" not in log_of(caplog)
    assert (run / "settings.yaml").read_text() == before


def test_another_seed_is_another_run(tmp_path: Path, text: Path) -> None:
    """What the comparisons above would see if a run were not the same."""
    one = train(settings(byte_lm_run(tmp_path / "one", text, steps=6)))
    other = train(settings(byte_lm_run(tmp_path / "other", text, steps=6, seed=1)))
    assert losses(one) != losses(other)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"seed": 3}, "seed: 0, now 3"),
        ({"optimizer": {"lr": 1e-3, "warmup_steps": 3}}, "optimizer.lr: 0.003, now 0.001"),
        ({"data": {"context": 32}}, "data.context: 64, now 32"),
        ({"dtype": "bfloat16"}, "dtype: float32, now bfloat16"),
    ],
)
def test_other_settings_are_refused_by_their_key(tmp_path: Path, text: Path, more: dict[str, Any], key: str) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=5)))
    with pytest.raises(UserError) as caught:
        train(settings(byte_lm_run(run, text, steps=9, **more)))
    assert f"({key})" in str(caught.value)
    assert len(losses(run)) == 5


def test_a_blt_in_the_folder_of_a_byte_lm_is_refused(tmp_path: Path, text: Path, byte_lm: Path) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=5)))
    with pytest.raises(UserError, match="was begun with other settings"):
        train(settings(blt_run(run, text, byte_lm)))


def test_before_the_first_checkpoint_settings_bind_nobody(
    tmp_path: Path, text: Path, byte_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake that was noticed at once is mended in the same folder."""
    other = train(settings(byte_lm_run(tmp_path / "other", text, steps=3, seed=8)))
    run = tmp_path / "run"
    cut_off(blt_run(run, text, other, seed=1), 3, monkeypatch)
    train(settings(blt_run(run, text, byte_lm)))
    assert_equal_runs(run, train(settings(blt_run(tmp_path / "whole", text, byte_lm))))
    assert (run / "calibration.json").read_text() == (tmp_path / "whole" / "calibration.json").read_text()


def test_other_files_are_refused(tmp_path: Path, text: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write_text(folder / "a.jsonl", 0)
    run = train(settings(byte_lm_run(tmp_path / "run", folder, steps=5)))
    write_text(folder / "b.jsonl", 1)
    with pytest.raises(UserError, match="are not those of the checkpoint"):
        train(settings(byte_lm_run(run, folder, steps=9)))


def test_a_run_that_ends_with_its_weights_only_cannot_be_continued(
    tmp_path: Path, text: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = byte_lm_run(tmp_path / "few", text, checkpoint={"every": 5, "last": "weights"})
    train(settings(few))
    *earlier, last = ((tmp_path / "few" / "checkpoints" / name) for name in checkpoints(tmp_path / "few"))
    held = [sorted(file.suffix for file in folder.rglob("*.*")) for folder in (earlier[-1], last)]
    assert ".distcp" in held[0]
    assert ".distcp" not in held[1]
    assert not list((last / "ranks").iterdir())
    assert weights(tmp_path / "few").keys() == weights(whole).keys()
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(tmp_path / "few").items())

    train(settings(few))  # nothing is left to do
    assert "nothing is left to do" in log_of(caplog)
    with pytest.raises(UserError, match=r"checkpoint\.last: .* ended after step 12 with its weights only"):
        train(settings({**few, "steps": 20}))
