"""What a run does when something goes wrong, setting by setting."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent.errors import STOPPED, Interrupted, UserError
from bytelatent.files import find_corruption
from bytelatent.training import faults, read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.training.checkpoint.manager import CheckpointManager, TrainState
from bytelatent.training.distributed import ranks
from bytelatent.training.faults import loss_problem
from bytelatent.weights import load, load_byte_lm, save
from bytelatent.weights import safetensors_io as tensors
from tests.training.tiny_runs import (
    assert_equal_runs,
    blt_run,
    byte_lm_run,
    checkpoints,
    command,
    finished,
    log_of,
    losses,
    settings,
    weights,
)


def scaled(monkeypatch: pytest.MonkeyPatch, factors: dict[int, float]) -> list[int]:
    """Multiply the losses of some forward passes, counted from 0 for the trial before the first step."""
    cross_entropy, calls = loop.cross_entropy, []

    def other(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(model, batch) * factors.get(len(calls) - 1, 1.0)

    monkeypatch.setattr(loop, "cross_entropy", other)
    return calls


def test_a_step_without_its_update(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scaled(monkeypatch, {6: float("nan")})
    kept: list[list[torch.Tensor]] = []
    step = loop.Trainer.train_step

    def watched(trainer: loop.Trainer) -> Any:
        row = step(trainer)
        kept.append([parameter.detach().clone() for parameter in trainer.state.model.parameters()])
        return row

    monkeypatch.setattr(loop.Trainer, "train_step", watched)
    run = train(settings(byte_lm_run(tmp_path / "run", text, faults={"on_nan": "skip"})))
    moved = [any(not torch.equal(*pair) for pair in zip(*two, strict=True)) for two in pairwise(kept)]
    assert [number + 2 for number, changed in enumerate(moved) if not changed] == [6]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "skipped" in row] == [6]
    assert rows[5]["bits_per_byte"] is None
    line = "the loss is not finite at step 6 (loss nan, gradient norm nan): its update is left out"
    assert line in log_of(caplog).splitlines()


def test_updates_are_not_left_out_for_ever(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "MAX_SKIPPED", 3)
    scaled(monkeypatch, dict.fromkeys([2, *range(4, 99)], float("inf")))
    with pytest.raises(
        UserError, match=r"not finite at step 7 \(.*\), 4 times in a row; .*lr \(now 0.003\).*run=FOLDER$"
    ):
        train(settings(byte_lm_run(tmp_path / "run", text, faults={"on_nan": "skip"})))


def test_back_to_the_last_checkpoint_with_other_text(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As though the text of the steps that are taken back had not been there."""
    plain = train(settings(byte_lm_run(tmp_path / "plain", text, steps=12)))
    calls = scaled(monkeypatch, {8: float("nan")})
    run = train(settings(byte_lm_run(tmp_path / "run", text, faults={"on_nan": "rollback"})))
    assert len(calls) == 1 + 8 + 7
    said = log_of(caplog)
    assert "the loss is not finite at step 8 (" in said
    assert "back to step 5, on with the text that comes next" in said
    assert [row[0] for row in losses(run)] == list(range(1, 13))
    assert losses(run)[:5] == losses(plain)[:5]
    assert not {row[2] for row in losses(run)[5:]} & {row[2] for row in losses(plain)}
    monkeypatch.undo()
    # Another way to the same: steps 1 to 5, and on from there with a loader that has read three steps more.
    next_batch, passed = loop.Trainer._next_batch, []

    def passing(trainer: loop.Trainer) -> Any:
        if trainer.state.step == 5 and not passed:
            passed.extend([next_batch(trainer) for _ in range(3)])
        return next_batch(trainer)

    monkeypatch.setattr(loop.Trainer, "_next_batch", passing)
    other = train(settings(byte_lm_run(tmp_path / "other", text)))
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(run).items())


def test_nothing_to_go_back_to(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(monkeypatch, {3: float("nan")})
    with pytest.raises(UserError, match=r"not finite at step 3 .* there is no checkpoint yet to roll back to"):
        train(settings(byte_lm_run(tmp_path / "run", text, faults={"on_nan": "rollback"})))


def test_the_way_back_ends(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(monkeypatch, dict.fromkeys(range(7, 99), float("nan")))
    with pytest.raises(UserError, match=r"not finite at step 6 .* after 3 rollbacks to one checkpoint"):
        train(settings(byte_lm_run(tmp_path / "run", text, faults={"on_nan": "rollback"})))


@pytest.mark.parametrize(
    ("loss", "norm", "recent", "spike", "found"),
    [
        (9.0, 1.0, [1.0] * 10, None, False),
        (3.1, 1.0, [1.0] * 10, 3.0, True),
        (2.9, 1.0, [1.0] * 10, 3.0, False),
        (3.1, 1.0, [1.0] * 9, 3.0, False),  # too few to know
        (3.1, 1.0, [0.1] * 5 + [2.0] * 6, 3.0, False),
        (3.1, 1.0, [0.1] * 6 + [2.0] * 5, 3.0, True),
        (float("inf"), 1.0, [], None, True),
        (1.0, float("nan"), [], None, True),
    ],
)
def test_what_is_trouble(loss: float, norm: float, recent: list[float], spike: float | None, found: bool) -> None:
    assert (loss_problem(7, loss, norm, recent, spike) is not None) == found


def test_a_leap_of_the_loss_is_known_after_a_restart(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = byte_lm_run(tmp_path / "run", text, steps=14, faults={"spike": 3.0}, checkpoint={"every": 6})
    scaled(monkeypatch, {14: float("nan")})
    with pytest.raises(UserError, match="not finite at step 14"):
        train(settings(values))
    monkeypatch.undo()
    scaled(monkeypatch, {1: 10.0})  # the first step after the restart, too early without what was before
    with pytest.raises(UserError, match=r"the loss spikes at step 13 \(loss .*, median .*, faults.spike 3\)"):
        train(settings(values))
    monkeypatch.undo()
    run = train(settings(values))
    assert len(losses(run)) == 14


HANGS = """
import sys, threading, time
from bytelatent.commands import train
from bytelatent.training import trainer as loop

inner, calls = loop.cross_entropy, []
def the_function_that_hangs(model, batch):
    calls.append(1)
    if len(calls) == 5:
        time.sleep(100)
    return inner(model, batch)
loop.cross_entropy = the_function_that_hangs
train.main(sys.argv[1:])
"""


def test_a_hang_ends_with_every_threads_stack(tmp_path: Path, text: Path) -> None:
    values = byte_lm_run(tmp_path / "run", text, faults={"watchdog_minutes": 0.03})
    began = time.monotonic()
    ended = finished([sys.executable, "-c", HANGS, *command(values)[3:]])
    assert ended.returncode == ranks.EXIT_HUNG
    assert time.monotonic() - began < 60
    assert "hangs: 0.03" in ended.stderr
    assert " minutes of step 4 (faults.watchdog_minutes); the stack of every thread:" in ended.stderr
    assert "in the_function_that_hangs" in ended.stderr
    assert ended.stderr.count("(most recent call first)") >= 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_other_signals_stop_a_run_too(
    tmp_path: Path, text: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, before, calls = loop.cross_entropy, signal.getsignal(number), []

    def signalled(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), number)
        return inner(*arguments)

    monkeypatch.setattr(loop, "cross_entropy", signalled)
    with pytest.raises(Interrupted, match="after step 3; the same command resumes"):
        train(settings(byte_lm_run(tmp_path / "run", text)))
    assert checkpoints(tmp_path / "run") == ["step-00000003"]
    assert signal.getsignal(number) == before


def test_the_code_that_launchers_rely_on() -> None:
    assert STOPPED == 130


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["cuda", "cpu"],
)
@pytest.mark.parametrize("at", [1, 4])
def test_too_little_memory_names_what_to_lower(
    tmp_path: Path, text: Path, error: RuntimeError, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, calls = loop.cross_entropy, []

    def large(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return inner(*arguments)

    monkeypatch.setattr(loop, "cross_entropy", large)
    with pytest.raises(UserError, match=r"out of memory .* data.batch_bytes \(now 256; .*activation_checkpointing"):
        train(settings(byte_lm_run(tmp_path / "run", text)))


def test_an_error_in_the_background_is_reported_at_the_next_step(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: CheckpointManager, content: Any) -> None:
        raise UserError("no permission")

    monkeypatch.setattr(CheckpointManager, "_write_once", fails)
    step = loop.Trainer.train_step

    def slow(*arguments: Any) -> Any:
        time.sleep(0.05)
        return step(*arguments)

    monkeypatch.setattr(loop.Trainer, "train_step", slow)
    values = byte_lm_run(tmp_path / "run", text, steps=99, checkpoint={"every": 5, "asynchronous": True})
    with pytest.raises(UserError, match="no permission"):
        train(settings(values))
    assert losses(tmp_path / "run")[-1][0] == 6


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is written is the state as it was, and not as it became meanwhile."""
    whole = train(settings(byte_lm_run(tmp_path / "whole", text, checkpoint={"every": 5, "keep": 9})))
    write, steps = CheckpointManager._write_once, []

    def slow(self: CheckpointManager, content: Any) -> None:
        before = len(losses(tmp_path / "run"))
        if before == 5:
            until = time.monotonic() + 30
            while len(losses(tmp_path / "run")) < 9 and time.monotonic() < until:
                time.sleep(0.01)
        steps.append((before, len(losses(tmp_path / "run"))))
        write(self, content)

    monkeypatch.setattr(CheckpointManager, "_write_once", slow)
    run = train(settings(byte_lm_run(tmp_path / "run", text, checkpoint={"every": 5, "keep": 9, "asynchronous": True})))
    assert steps[0][0] == 5
    assert steps[0][1] >= 9
    assert_equal_runs(run, whole)
    for name in checkpoints(whole):
        one, other = (where / "checkpoints" / name / "state" / "__0_0.distcp" for where in (run, whole))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"keep": 1, "keep_every": 4}, [4, 8, 10]),
        ({"keep": 2, "keep_every": 6}, [6, 8, 10]),
        ({"keep": 2}, [8, 10]),
    ],
)
def test_every_so_many_steps_a_checkpoint_stays(
    tmp_path: Path, text: Path, keep: dict[str, int], left: list[int]
) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=10, checkpoint={"every": 2, **keep})))
    assert checkpoints(run) == [f"step-{step:08d}" for step in left]
    assert all(find_corruption(run / "checkpoints" / name) is None for name in checkpoints(run))


def test_determinism(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs are the same bits; an operation that cannot promise it is an error, which ends with the run."""
    one, other = (train(settings(byte_lm_run(tmp_path / name, text, determinism=True))) for name in ("one", "other"))
    assert_equal_runs(one, other)
    assert not torch.are_deterministic_algorithms_enabled()
    inner: Callable[..., torch.Tensor] = loop.cross_entropy

    def careless(model: Any, batch: Any) -> torch.Tensor:
        return (
            inner(model, batch) + 0 * torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False).sum()
        )

    monkeypatch.setattr(loop, "cross_entropy", careless)
    with pytest.raises(RuntimeError, match="deterministic"):
        train(settings(byte_lm_run(tmp_path / "careless", text, determinism=True)))
    assert not torch.are_deterministic_algorithms_enabled()
    train(settings(byte_lm_run(tmp_path / "free", text)))


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = CheckpointManager.save

    def spoilt(self: CheckpointManager, state: TrainState, **how: bool) -> None:
        if state.step == 10:
            state.model.get_parameter("stack.blocks.0.feed_forward.down.weight").data[0, 0] = torch.nan
        inner(self, state, **how)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "save", spoilt)
        patch.setattr(tensors, "check_finite", lambda name, tensor: None)  # else such weights are not written
        run = train(settings(byte_lm_run(tmp_path / "run", text, steps=10)))
    before = losses(run)
    with pytest.raises(UserError) as caught:
        train(settings(byte_lm_run(run, text, steps=12)))
    assert str(caught.value).startswith(f"'{run}/checkpoints/step-00000010' holds values that are not finite (")
    assert "stack.blocks.0.feed_forward.down.weight" in str(caught.value)
    assert losses(run) == before
    shutil.rmtree(run / "checkpoints" / "step-00000010")  # the way out that the line names
    train(settings(byte_lm_run(run, text, steps=12)))
    assert [row[0] for row in losses(run)] == list(range(1, 13))


def test_a_byte_lm_with_weights_that_are_not_finite_is_refused(
    tmp_path: Path, text: Path, byte_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt = load_byte_lm(byte_lm)
    with torch.no_grad():
        spoilt.output.weight[3, 3] = torch.inf
    (tmp_path / "spoilt").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "check_finite", lambda name, tensor: None)
        save(tmp_path / "spoilt", spoilt, load(byte_lm).config)
    with pytest.raises(UserError, match=r"output\.weight holds NaN or infinite values"):
        train(settings(blt_run(tmp_path / "run", text, tmp_path / "spoilt")))
    assert not (tmp_path / "run" / "byte_lm").exists()
