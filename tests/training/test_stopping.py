"""Ctrl-C and SIGTERM, a loss that is not finite, corrupt checkpoints."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bytelatent import signals
from bytelatent.errors import Interrupted, UserError
from bytelatent.files import find_corruption
from bytelatent.run_folder import newest_checkpoint
from bytelatent.signals import STOPPING
from bytelatent.training import read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.weights import load
from tests.processes import NOBODY, Command
from tests.training.tiny_runs import (
    assert_equal_runs,
    blt_run,
    byte_lm_run,
    checkpoints,
    command,
    environment,
    finished,
    losses,
    settings,
)


def without_metrics(errors: str) -> list[str]:
    """The lines on standard error but for those of metrics."""
    return [line for line in errors.splitlines() if not line.startswith("byte LM  ")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_good_order(tmp_path: Path, text: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    values = byte_lm_run(run, text, steps=5000, checkpoint={"every": 100_000})
    process = Command(command(values), environment())
    until = time.monotonic() + 60
    while len(read_metrics(run / "metrics.jsonl")) < 5 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    step = losses(run)[-1][0]
    assert without_metrics(errors) == [STOPPING, f"stopped: after step {step}; the same command resumes"]
    assert checkpoints(run) == [f"step-{step:08d}"]
    assert find_corruption(run / "checkpoints" / checkpoints(run)[0]) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, text: Path, whole: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cross_entropy, calls = tmp_path / "run", loop.cross_entropy, []
    handlers = [signal.getsignal(name) for name in signal.Signals]

    def signalled(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 8:  # the first is a trial
            os.kill(os.getpid(), number)
        return cross_entropy(*arguments)

    monkeypatch.setattr(loop, "cross_entropy", signalled)
    with pytest.raises(Interrupted, match="after step 7; the same command resumes"):
        train(settings(byte_lm_run(run, text)))
    assert checkpoints(run) == ["step-00000005", "step-00000007"]
    assert [signal.getsignal(name) for name in signal.Signals] == handlers
    train(settings(byte_lm_run(run, text)))
    assert_equal_runs(run, whole)


def in_step_eight(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something while the loss of step 8 is computed; the first call is a trial."""
    cross_entropy, calls = loop.cross_entropy, []

    def acting(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            act()
        return cross_entropy(*arguments)

    monkeypatch.setattr(loop, "cross_entropy", acting)


def press(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """Ctrl-C at each of these seconds."""
    for now in seconds:
        monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda now=now: now))
        signal.raise_signal(signal.SIGINT)


def test_under_nohup_it_goes_on(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        in_step_eight(monkeypatch, lambda: signal.raise_signal(signal.SIGHUP))
        train(settings(byte_lm_run(tmp_path / "run", text)))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert losses(tmp_path / "run")[-1][0] == 12


def test_without_its_torchrun_it_saves_and_stops(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that nobody launched so may lose its parent: a shell in which it was left running."""
    in_step_eight(monkeypatch, lambda: monkeypatch.setattr(os, "getppid", lambda: signals.PARENT + 1))
    train(settings(byte_lm_run(tmp_path / "alone", text)))
    monkeypatch.undo()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    in_step_eight(monkeypatch, lambda: monkeypatch.setattr(os, "getppid", lambda: signals.PARENT + 1))
    with pytest.raises(Interrupted, match="after step 8; the same command resumes"):
        train(settings(byte_lm_run(tmp_path / "run", text)))
    assert checkpoints(tmp_path / "run") == ["step-00000005", "step-00000008"]


# Signals while modules are imported and while the threshold is looked for: twice, as torchrun passes them on.
EARLY = """
import signal, sys
from bytelatent.commands import train
from bytelatent.cli import main

number = getattr(signal, sys.argv[2])
def asked(*_):
    for _ in range(2):
        signal.raise_signal(number)
if sys.argv[1] == "imports":
    train.import_uncollected = asked
else:
    from bytelatent.training import run_setup as run
    run.calibrate_on = asked
sys.argv[1:] = ["train", *sys.argv[3:]]
main()
"""


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("imports", signal.SIGINT),
        ("imports", signal.SIGTERM),
        ("imports", signal.SIGHUP),
        ("imports", signal.SIGUSR1),
        ("calibration", signal.SIGTERM),
    ],
)
def test_a_signal_before_the_first_step(
    tmp_path: Path, text: Path, byte_lm: Path, when: str, number: signal.Signals
) -> None:
    values = blt_run(tmp_path / "run", text, byte_lm)
    ended = finished([sys.executable, "-c", EARLY, when, number.name, *command(values)[3:]])
    assert ended.returncode == 130
    logged = ["calibrating for patches of 4 bytes"] if when == "calibration" else []
    assert ended.stderr.splitlines() == [*logged, f"stopped: {signals.NOT_SAVED}"]
    if when == "calibration":
        assert sorted(os.listdir(tmp_path / "run")) == [".lock", "byte_lm", "train.log"]


def test_nothing_is_imported_before_signals_are_heard() -> None:
    code = "import bytelatent.commands.train, sys; print({'torch', 'rich'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, timeout=60)
    assert (ended.stdout, ended.stderr) == (b"set()\n", b"")


# With an argument a signal comes in step 8.
SIGNALLED = """
import signal, sys
from bytelatent.commands import train
from bytelatent.errors import guarded
from bytelatent.training import trainer as loop

inner = loop.learning_rate
def rate(step, *more):
    if step == 7 and sys.argv[1]:
        signal.raise_signal(signal.SIGHUP)
    return inner(step, *more)
loop.learning_rate = rate
guarded(lambda: train.command(sys.argv[2:]))
"""


@pytest.mark.parametrize("signalled", ["", "yes"])
def test_output_that_nobody_reads_any_more_stops_nothing(tmp_path: Path, text: Path, signalled: str) -> None:
    """As when a terminal is gone, of whose end SIGHUP tells, or after `| head -1`."""
    run = tmp_path / "run"
    validation = {"every": 2, "max_bytes": 100}  # of which it says something each time
    values = byte_lm_run(run, text, data={"valid": str(text)}, validation=validation)
    arguments = [sys.executable, "-c", SIGNALLED, signalled, *command(values)[3:]]
    ended = finished(arguments, streams={1: NOBODY, 2: NOBODY})
    last = 8 if signalled else 12
    assert ended.returncode == (130 if signalled else 0)
    assert losses(run)[-1][0] == last
    assert checkpoints(run)[-1] == f"step-{last:08d}"


def test_a_double_press_is_one(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    in_step_eight(monkeypatch, lambda: press(monkeypatch, 0.0, 0.3, 1.9))
    with pytest.raises(Interrupted, match="after step 8; the same command resumes"):
        train(settings(byte_lm_run(tmp_path / "run", text)))
    assert checkpoints(tmp_path / "run") == ["step-00000005", "step-00000008"]
    assert capfd.readouterr().err == f"{STOPPING}\n"


def test_a_second_press_quits(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_step_eight(monkeypatch, lambda: press(monkeypatch, 0.0, 2.1))
    with pytest.raises(KeyboardInterrupt, match="without saving; the same command resumes from the last checkpoint"):
        train(settings(byte_lm_run(tmp_path / "run", text)))
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000005"]


@pytest.mark.parametrize("swallowed", [False, True])
def test_a_second_press_inside_torch_save_leaves_no_cut_checkpoint(
    tmp_path: Path, text: Path, swallowed: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch's writer makes an error of its own of one that is raised where it calls Python, or passes over it."""

    class Pressed(io.BytesIO):
        def write(self, data: Any) -> int:
            if not pressed:
                pressed.append(True)
                press(monkeypatch, 2.1)
            return super().write(data)

    def saved(value: Any, place: Any, **more: Any) -> None:
        if swallowed and not isinstance(place, Path):  # the streams of state/
            inner(value, place, **more)
            return
        if pressed:
            inner(value, place, **more)
            return
        try:
            inner(value, Pressed())
        except BaseException as error:
            met.append(type(error))
            if not swallowed:
                raise
            place.write_bytes(b"half")

    def act() -> None:
        press(monkeypatch, 0.0)
        monkeypatch.setattr(torch, "save", saved)

    inner, pressed, met = torch.save, [], []
    in_step_eight(monkeypatch, act)
    with pytest.raises(KeyboardInterrupt, match="without saving"):
        train(settings(byte_lm_run(tmp_path / "run", text)))
    assert met in ([RuntimeError], [KeyboardInterrupt])  # which of them, is torch's to say
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000005"]
    assert capfd.readouterr().err == f"{STOPPING}\n"


QUITS = """
import signal, sys
from bytelatent.commands import train
from bytelatent.errors import guarded
from bytelatent import signals
from bytelatent.training import trainer as loop

signals.ONE_PRESS = 0.0
def cross_entropy(*arguments):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
loop.cross_entropy = cross_entropy
guarded(lambda: train.main(sys.argv[1:]))
"""


def test_quitting_is_one_line(tmp_path: Path, text: Path) -> None:
    ended = finished([sys.executable, "-c", QUITS, *command(byte_lm_run(tmp_path / "run", text))[3:]])
    assert ended.returncode == 130
    assert ended.stderr.splitlines() == [STOPPING, f"stopped: {signals.NOT_SAVED}"]


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def remove_optimizer(folder: Path) -> None:
    (folder / "state" / "__0_0.distcp").unlink()


def keep_only_the_model(folder: Path) -> None:
    for name in ("complete.json", "progress.pt"):
        (folder / name).unlink()
    shutil.rmtree(folder / "state")


def damage_manifest(folder: Path) -> None:
    (folder / "complete.json").write_text('{"files": ')


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "progress.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "progress.pt").write_bytes(data)


@pytest.mark.parametrize(
    ("tear", "why"),
    [
        (truncate, "model.safetensors is not as it was written"),
        (remove_optimizer, "state/__0_0.distcp is missing"),
        (keep_only_the_model, "complete.json is missing"),
        (damage_manifest, "complete.json is corrupt"),
        (flip_a_bit, "progress.pt is not as it was written"),
    ],
)
def test_a_corrupt_checkpoint_is_skipped(
    tmp_path: Path, text: Path, whole: Path, tear: Callable[[Path], None], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=12)))
    tear(run / "checkpoints" / "step-00000012")
    assert load(run).source.startswith(str(run / "checkpoints" / "step-00000010"))
    train(settings(byte_lm_run(run, text)))
    line = f"'{run / 'checkpoints' / 'step-00000012'}' is corrupt ({why}); skipped"
    assert line in caplog.messages
    assert_equal_runs(run, whole)


def test_no_whole_checkpoint_is_one_line(tmp_path: Path, text: Path) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=7)))
    truncate(run / "checkpoints" / "step-00000005")
    remove_optimizer(run / "checkpoints" / "step-00000007")
    with pytest.raises(UserError) as caught:
        train(settings(byte_lm_run(run, text)))
    message = str(caught.value)
    assert message.startswith(f"no checkpoint of '{run}' is whole: ")
    assert "step-00000005" in message
    assert "step-00000007" in message


def test_a_folder_that_was_being_written_is_no_checkpoint(tmp_path: Path, text: Path) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=5)))
    half = run / "checkpoints" / ".step-00000006.123.part"
    half.mkdir()
    (half / "config.json").write_text("{}")
    assert newest_checkpoint(run) == (run / "checkpoints" / "step-00000005", [])


@pytest.mark.parametrize("keep", [1, 3])
def test_keep_is_honoured(tmp_path: Path, text: Path, keep: int) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=9, checkpoint={"every": 2, "keep": keep})))
    assert checkpoints(run) == ["step-00000004", "step-00000006", "step-00000008", "step-00000009"][-keep:]


def test_a_corrupt_later_checkpoint_does_not_push_out_whole_ones(tmp_path: Path, text: Path) -> None:
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=8, checkpoint={"every": 4})))
    truncate(run / "checkpoints" / "step-00000008")
    values = byte_lm_run(run, text, steps=6, checkpoint={"every": 100, "keep": 1})
    train(settings(values))
    found, _ = newest_checkpoint(run)
    assert found == run / "checkpoints" / "step-00000006"


def test_a_loss_that_is_not_finite_is_one_line(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    values = byte_lm_run(run, text, steps=400, optimizer={"lr": 1e25, "warmup_steps": 0})
    ended = finished(command({**values, "checkpoint": {"every": 1}}))
    assert ended.returncode == 2
    [line] = without_metrics(ended.stderr)
    assert "the loss is not finite at step " in line
    assert "optimizer.lr (now 1e+25)" in line


def test_the_checkpoint_before_a_loss_that_is_not_finite_is_whole(
    tmp_path: Path, text: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cross_entropy, calls = loop.cross_entropy, []

    def broken(model: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(model, batch) * (float("nan") if len(calls) == 9 else 1.0)

    monkeypatch.setattr(loop, "cross_entropy", broken)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite at step 8 \(loss nan, .*; no checkpoint holds it: .*on_nan=skip$"):
        train(settings(byte_lm_run(run, text)))
    assert losses(run)[-1][0] == 7
    assert checkpoints(run) == ["step-00000005"]
    assert all(bool(value.isfinite().all()) for value in load(run).model.state_dict().values())
    monkeypatch.undo()
    train(settings(byte_lm_run(run, text)))
    assert_equal_runs(run, whole)
