"""Traces of steps, by setting and by a file."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent.files import find_corruption
from bytelatent.training import train
from bytelatent.training import trainer as loop
from bytelatent.training.profiling.steps import Profiler
from bytelatent.training.settings import ProfileSettings
from tests.training.tiny_runs import assert_equal_runs, byte_lm_run, settings

STEP = "Optimizer.step#AdamW.step"


def steps_in(folder: Path) -> int:
    """The optimizer's steps that a trace holds."""
    assert find_corruption(folder) is None
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    return sum(event["name"] == STEP and event["ph"] == "X" for event in events)


def test_a_trace_by_setting(tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile = {"from_step": 3, "steps": 2, "memory": True}
    run = train(settings(byte_lm_run(tmp_path / "run", text, profile=profile)))
    assert [place.name for place in (run / "profiles").iterdir()] == ["step-00000003"]
    assert steps_in(run / "profiles" / "step-00000003") == 2
    assert "aten::mm" in (run / "profiles" / "step-00000003" / "operations.txt").read_text()
    assert f"a trace from step 3 on is in '{run / 'profiles' / 'step-00000003'}'" in caplog.messages
    assert_equal_runs(run, train(settings(byte_lm_run(tmp_path / "other", text))))


def test_a_trace_by_a_file(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, cross_entropy, calls = tmp_path / "run", loop.cross_entropy, []

    def asking(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:  # in the fourth step: the first call is a trial
            (run / "profile").touch()
        return cross_entropy(*arguments)

    monkeypatch.setattr(loop, "cross_entropy", asking)
    train(settings(byte_lm_run(run, text)))
    assert [place.name for place in (run / "profiles").iterdir()] == ["step-00000005"]
    assert steps_in(run / "profiles" / "step-00000005") == 3
    assert not (run / "profile").exists()


def test_a_trace_of_a_run_that_ends(tmp_path: Path, text: Path) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=4, profile={"from_step": 3, "steps": 100})))
    assert steps_in(run / "profiles" / "step-00000003") == 2


def test_a_trace_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profiles").write_text("a file where the folder should be")
    with Profiler(tmp_path, ProfileSettings(steps=1), torch.device("cpu")) as profiler:
        (tmp_path / "profile").touch()
        profiler.before(1)
        profiler.before(2)
    [message] = caplog.messages
    assert message.startswith("no trace of step 1: ")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["profiles"]


def test_another_profiler_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("busy")

    monkeypatch.setattr(torch.profiler.profile, "start", refuse)
    with Profiler(tmp_path, ProfileSettings(from_step=1), torch.device("cpu")) as profiler:
        for step in (1, 2, 3):
            profiler.before(step)
    assert caplog.messages == ["no trace of step 1: busy"]
