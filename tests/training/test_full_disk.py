"""A full disk: what waits for room, and what is done without."""

import errno
import io
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from bytelatent.errors import UserError
from bytelatent.files import find_corruption
from bytelatent.training import metrics, read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.training.checkpoint import manager
from bytelatent.training.checkpoint.manager import CheckpointManager
from tests.training.test_stopping import press
from tests.training.tiny_runs import (
    assert_equal_runs,
    byte_lm_run,
    checkpoints,
    command,
    finished,
    log_of,
    losses,
    settings,
    write_text,
)

FILLED = {"model": (manager.NATIVE, "write"), "state": (FileSystemWriter, "write_data"), "rest": (torch, "save")}


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, place: str, good: int, bad: int) -> None:
    """Let so many checkpoints be written, and then so many attempts fail."""
    monkeypatch.setattr(manager, "PAUSES", (0, 0))
    owner, name = FILLED[place]
    write, attempts = getattr(owner, name), []
    begin = CheckpointManager._write_once

    def begun(self: CheckpointManager, content: Any) -> None:
        attempts.append(1)
        begin(self, content)

    def full(*arguments: Any, **more: Any) -> Any:
        if good < len(attempts) <= good + bad:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments, **more)

    monkeypatch.setattr(CheckpointManager, "_write_once", begun)
    monkeypatch.setattr(owner, name, full)


@pytest.mark.parametrize("place", FILLED)
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path,
    text: Path,
    whole: Path,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    fill_the_disk(monkeypatch, place, good=1, bad=99)
    with pytest.raises(UserError, match=r"the disk is full: '.*step-00000012' was not written"):
        train(settings(byte_lm_run(run, text)))
    assert os.listdir(run / "checkpoints") == ["step-00000005"]
    assert find_corruption(run / "checkpoints" / "step-00000005") is None
    said = [line for line in caplog.messages if "step-00000010' was not written" in line]
    assert [line.rpartition("make room ")[2] for line in said] == [
        "(the next try is in 0 s)",
        "(the next try is in 0 s)",
        "(training continues without it)",
    ]
    monkeypatch.undo()
    train(settings(byte_lm_run(run, text)))
    assert_equal_runs(run, whole)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_full_for_a_while_costs_no_checkpoint(
    tmp_path: Path, text: Path, whole: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_the_disk(monkeypatch, "state", good=0, bad=2)
    run = train(settings(byte_lm_run(tmp_path / "run", text, checkpoint={"every": 5, "asynchronous": asynchronous})))
    assert checkpoints(run) == ["step-00000010", "step-00000012"]
    assert_equal_runs(run, whole)


def test_a_signal_ends_the_wait_for_room(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only one that comes: without it each pause is waited for, second by second."""
    fill_the_disk(monkeypatch, "state", good=2, bad=99)
    monkeypatch.setattr(manager, "PAUSES", (3, 60))
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert len(slept) < 9
        if len(slept) == 5:
            press(monkeypatch, 0.0)

    monkeypatch.setattr(manager, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(UserError, match=r"the disk is full: '.*step-00000012' was not written"):
        train(settings(byte_lm_run(tmp_path / "run", text)))
    assert slept == [1] * 5


def fill_the_disk_for_metrics(monkeypatch: pytest.MonkeyPatch, full: range) -> None:
    """Let rows be written to their half only, from some steps to others."""
    write = metrics.JsonLines.write

    class Scarce(io.FileIO):
        def write(self, data: Any) -> int:
            if step[0] not in full:
                return super().write(data)
            super().write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def written(self: metrics.JsonLines, row: dict[str, Any]) -> None:
        step[0] = row["step"]
        if not isinstance(self._file, Scarce):
            self._file = Scarce(self._path, "ab")
        write(self, row)

    step = [0]
    monkeypatch.setattr(metrics.JsonLines, "write", written)


def test_rows_wait_for_room(
    tmp_path: Path, text: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_the_disk_for_metrics(monkeypatch, range(3, 8))
    run = train(settings(byte_lm_run(tmp_path / "run", text)))
    shown = [line for line in log_of(caplog).splitlines() if "metrics.jsonl" in line]
    assert shown == [
        f"'{run / 'metrics.jsonl'}' cannot be written: No space left on device; its rows wait in memory, "
        "and training goes on"
    ]
    monkeypatch.undo()
    assert_equal_runs(run, whole)


def test_rows_that_wait_go_back_with_the_run(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of steps 4 and 5 stay, those of 6 and 7 are taken back with their steps."""
    cross_entropy, calls = loop.cross_entropy, []

    def broken(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(model, batch) * (float("nan") if len(calls) == 9 else 1.0)

    monkeypatch.setattr(loop, "cross_entropy", broken)
    fill_the_disk_for_metrics(monkeypatch, range(4, 8))
    run = train(settings(byte_lm_run(tmp_path / "run", text, faults={"on_nan": "rollback"})))
    assert [step for step, *_ in losses(run)] == list(range(1, 13))


def test_rows_that_found_no_room_are_said_at_the_end(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_the_disk_for_metrics(monkeypatch, range(9, 99))
    run = train(settings(byte_lm_run(tmp_path / "run", text)))
    assert checkpoints(run)[-1] == "step-00000012"
    line = "cannot be written: No space left on device; its rows from step 9 to step 12 are lost"
    assert log_of(caplog).splitlines()[-1] == f"'{run / 'metrics.jsonl'}' {line}"
    assert [step for step, *_ in losses(run)] == list(range(1, 9))
    assert (run / "metrics.jsonl").read_bytes().endswith(b"}\n")  # nothing of a row that found no room


def test_the_system_has_room_for_half_a_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real write that is cut short, and then fails."""
    lines = metrics.JsonLines(tmp_path / "metrics.jsonl")
    lines.resume_after(0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
    try:
        for step in range(1, 7):
            lines.write({"step": step})
        assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.write({"step": 7})
    lines.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": step} for step in range(1, 8)]
    assert len(log_of(caplog).splitlines()) == 1


def test_the_system_refuses_large_files(tmp_path: Path) -> None:
    """A real failure of a write inside safetensors, which has errors of its own."""
    text = write_text(tmp_path / "text.jsonl", seed=0)
    run = tmp_path / "run"
    train(settings(byte_lm_run(run, text, steps=5)))
    size = (run / "checkpoints" / "step-00000005" / "model.safetensors").stat().st_size
    ended = finished(command(byte_lm_run(run, text)), max_file=size // 2)
    assert ended.returncode != 0
    assert os.listdir(run / "checkpoints") == ["step-00000005"]
    assert find_corruption(run / "checkpoints" / "step-00000005") is None
