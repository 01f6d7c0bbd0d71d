"""What a run by the clock (`minutes`) spends beside its steps, on a clock that only work moves."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent.model import ByteLM
from bytelatent.training import TrainSettings, read_metrics, train
from tests.training.tiny_runs import byte_lm_run, log_of, settings, write_text

STEP, VALIDATION_BATCH = 1.0, 0.5  # seconds


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> dict[bool, float]:
    """Seconds spent with gradients, and without: in validation."""
    spent = {True: 0.0, False: 0.0}
    forward = ByteLM.forward

    def charged(self: ByteLM, *arguments: Any, **more: Any) -> Any:
        training = torch.is_grad_enabled()
        spent[training] += STEP if training else VALIDATION_BATCH
        return forward(self, *arguments, **more)

    monkeypatch.setattr(ByteLM, "forward", charged)
    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: sum(spent.values()))
    return spent


@pytest.fixture
def a_run(tmp_path: Path) -> Callable[..., TrainSettings]:
    text, valid = write_text(tmp_path / "text.jsonl", seed=0), write_text(tmp_path / "valid.jsonl", seed=1)

    def of(**more: Any) -> TrainSettings:
        values = {"data": {"valid": str(valid)}, "validation": {"every": 10}, **more}
        return settings(byte_lm_run(tmp_path / "run", text, **values))

    return of


def validations(run: Path) -> list[int]:
    """Bytes of each."""
    return [row["validation_bytes"] for row in read_metrics(run / "metrics.jsonl") if "validation_bytes" in row]


def test_validation_takes_a_tenth_of_the_minutes_at_most(
    spent: dict[bool, float], a_run: Callable[..., TrainSettings], caplog: pytest.LogCaptureFixture
) -> None:
    run = train(a_run(steps=None, minutes=1))
    num_bytes = validations(run)
    assert len(num_bytes) >= 6
    assert spent[False] <= 0.1 * 60 + len(num_bytes) * VALIDATION_BATCH
    assert num_bytes[-1] > 2 * max(num_bytes[:-1])  # the last one has the larger share
    assert f"validating: time is up after {num_bytes[-1]:,} of" in log_of(caplog)


def test_a_run_by_steps_validates_on_all_of_the_text(
    spent: dict[bool, float], a_run: Callable[..., TrainSettings]
) -> None:
    num_bytes = validations(train(a_run(steps=20)))
    assert len(num_bytes) == 2
    assert len(set(num_bytes)) == 1
    assert spent[False] > 0.1 * spent[True]


def test_lines_show_how_long_it_still_takes(
    spent: dict[bool, float], a_run: Callable[..., TrainSettings], caplog: pytest.LogCaptureFixture
) -> None:
    train(a_run(steps=40, data={}))
    shown = [line for line in log_of(caplog).splitlines() if line.startswith("byte LM")]
    assert len(shown) >= 4
    assert all(line.endswith(" left") for line in shown[1:-1])
    assert "step 12 " in shown[1]
    assert shown[1].endswith("0:28 left")
