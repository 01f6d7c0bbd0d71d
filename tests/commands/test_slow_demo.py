"""The demo on a machine where one of its stages is much slower than the rest, on a clock that only work moves."""

import html
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bytelatent import BLT
from bytelatent.commands import demo as demo_command
from bytelatent.commands import demo_stages
from bytelatent.model import BLTModel, ByteLM
from bytelatent.progress import Progress
from bytelatent.training import TrainSettings
from tests.commands.test_demo import run_demo, sentences
from tests.training.tiny_runs import BLT as TINY_BLT
from tests.training.tiny_runs import BYTE_LM as TINY_BYTE_LM

MINUTES = 0.7
QUICK = 0.02  # seconds of a batch, a part of a text, a few bytes written
TRAINING = "training"
STAGES = (TRAINING, "validating", "calibrating", "measuring", "finding", "writing", "xz")


class WorkClock:
    """A clock that only work moves; a piece of work takes as long as its stage defines."""

    def __init__(self, **seconds: float):
        self.seconds = seconds
        self.now = 0.0
        self.stage = TRAINING

    def work(self, share: float = 1.0) -> None:
        self.now += self.seconds.get(self.stage, QUICK) * share


@pytest.fixture(scope="module")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents, a megabyte together."""
    folder = tmp_path_factory.mktemp("own")
    for number in range(200):
        (folder / f"{number}.txt").write_text(sentences(number, 5_000))
    return folder


@pytest.fixture
def run_slowly(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    own_text: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[WorkClock, dict[str, Any], str]]:
    """A demo with tiny models; the seconds of each stage's pieces are those that the arguments name."""

    def run(**seconds: float) -> tuple[WorkClock, dict[str, Any], str]:
        clock = WorkClock(**{TRAINING: 1.0, **seconds})
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: clock.now)
        for model in (BLTModel, ByteLM):
            monkeypatch.setattr(model, "forward", charged(model.forward, clock))
        monkeypatch.setattr(Progress, "__enter__", entered(Progress.__enter__, clock))
        monkeypatch.setattr(Progress, "__exit__", left(Progress.__exit__, clock))
        monkeypatch.setattr(demo_stages, "_pack", charged(demo_stages._pack, clock))
        monkeypatch.setattr(demo_stages, "XZ_PRESET", 0)
        monkeypatch.setattr(demo_stages, "XZ_PART", 2**15)
        monkeypatch.setattr(BLT, "stream", streamed(clock))
        settings_of = demo_command._settings

        def tiny(model: str, *arguments: Any, **more: Any) -> TrainSettings:
            values = settings_of(model, *arguments, **more).plain()
            return TrainSettings.parse({**values, "model": TINY_BLT if "blt" in model else TINY_BYTE_LM})

        monkeypatch.setattr(demo_command, "_settings", tiny)
        summary = run_demo(MINUTES, tmp_path / "out", str(own_text))
        return clock, summary, "\n".join(caplog.messages) + "\n" + capsys.readouterr().out

    return run


def charged(call: Callable[..., Any], clock: WorkClock) -> Callable[..., Any]:
    def wrapped(self: Any, given: Any, *more: Any, **named: Any) -> Any:
        ids = len(given.ids) if hasattr(given, "ids") else 2048
        clock.work(ids / 2048)
        return call(self, given, *more, **named)

    return wrapped


def entered(call: Callable[..., Any], clock: WorkClock) -> Callable[..., Any]:
    def wrapped(self: Progress) -> Progress:
        clock.stage = self.what.split()[0].rstrip(",")
        return call(self)

    return wrapped


def left(call: Callable[..., Any], clock: WorkClock) -> Callable[..., Any]:
    def wrapped(self: Progress, *error: Any) -> None:
        clock.stage = TRAINING
        return call(self, *error)

    return wrapped


def streamed(clock: WorkClock) -> Callable[..., Iterator[str]]:
    def stream(self: BLT, prompt: str, max_new_bytes: int, **sampling: Any) -> Iterator[str]:
        for _ in range(max_new_bytes):
            clock.work()
            yield "x"

    return stream


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "measuring"])  # the test below has it
def test_a_stage_that_is_a_hundred_times_slower_ends_in_time(
    stage: str, run_slowly: Callable[..., tuple[WorkClock, dict[str, Any], str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_command, "write_report", lambda path, report: None)
    check_end(stage, *run_slowly(**{stage: 5.0 if stage == TRAINING else 100 * QUICK}))


def check_end(stage: str, clock: WorkClock, summary: dict[str, Any], lines: str) -> None:
    assert clock.now < 1.6 * 60 * MINUTES
    assert summary["seconds"] == pytest.approx(clock.now, abs=0.1)
    cut = {line.split()[0].rstrip(":,") for line in lines.splitlines() if ": time is up after " in line}
    assert (stage in cut) == (stage != TRAINING)


def test_what_was_cut_short_is_still_compared_on_the_same_bytes(
    run_slowly: Callable[..., tuple[WorkClock, dict[str, Any], str]], tmp_path: Path
) -> None:
    clock, summary, lines = run_slowly(measuring=100 * QUICK)
    check_end("measuring", clock, summary, lines)
    assert 0 < summary["valid_bytes"] < 30_000
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"Bits per byte are measured on {summary['valid_bytes']:,} bytes of held-out text." in page


def test_a_machine_that_is_quick_enough_leaves_nothing_out(
    run_slowly: Callable[..., tuple[WorkClock, dict[str, Any], str]], tmp_path: Path
) -> None:
    _, summary, lines = run_slowly(**dict.fromkeys(STAGES[1:], 0.001))
    assert "time is up" not in lines
    held_out = (tmp_path / "out" / "text" / "valid.jsonl").read_text().splitlines()
    assert summary["valid_bytes"] == sum(len(json.loads(line)["text"]) for line in held_out)
    assert len(summary["sample"]) == len("def read(self, ") + demo_stages.SAMPLE_BYTES


def test_too_few_steps_are_said_everywhere_and_bytes_are_those_that_were_read(
    run_slowly: Callable[..., tuple[WorkClock, dict[str, Any], str]], tmp_path: Path
) -> None:
    _, summary, lines = run_slowly()
    page = (tmp_path / "out" / "report.html").read_text()
    steps = summary["steps"]["blt"]
    assert steps < demo_command.FEWEST_STEPS
    said = f"the BLT takes {summary['bits_per_byte']['blt']:.2f} bits per byte after {steps} training steps"
    assert said in summary["undertrained"]
    assert f"undertrained: {summary['undertrained']}" in lines
    assert said in page

    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert summary["bytes_read"]["blt"] == rows[-1]["bytes_seen"] < summary["train_bytes"]
    assert steps == rows[-1]["step"]
    assert summary["training_seconds"] < summary["seconds"]
    for text in (summary["device"], html.escape(summary["command"]), summary["versions"]["torch"], "--seed 0"):
        assert text in page


@pytest.mark.parametrize(
    ("bits", "steps", "named"),
    [
        ({"byte_lm": 2.5, "blt": 2.3, "xz": 1.5}, {"byte_lm": 600, "blt": 700}, []),
        ({"byte_lm": 2.5, "blt": 4.87, "xz": 1.5}, {"byte_lm": 600, "blt": 700}, ["BLT"]),
        ({"byte_lm": 2.5, "blt": 2.3, "xz": 1.5}, {"byte_lm": 14, "blt": 700}, ["byte LM"]),
        ({"byte_lm": float("nan"), "blt": 2.3, "xz": 1.5}, {"byte_lm": 600, "blt": 14}, ["byte LM", "BLT"]),
    ],
)
def test_a_model_is_undertrained_by_its_bits_or_by_its_steps(
    bits: dict[str, float], steps: dict[str, int], named: list[str]
) -> None:
    line = demo_command._undertrained(bits, steps)
    assert (line is None) == (named == [])
    assert [name for name in ("byte LM", "BLT") if f"the {name} takes" in (line or "")] == named
