"""Metrics in TensorBoard, read by its own reader, and in Weights & Biases: the library, or one that notes calls."""

import errno
import importlib.util
import os
import sys
import threading
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from bytelatent.errors import UserError
from bytelatent.training import checks, read_metrics, train
from bytelatent.training import metrics as metrics_module
from bytelatent.training.metrics import JsonLines, TensorBoard, numbers
from tests.training.test_resume import cut_off
from tests.training.tiny_runs import byte_lm_run, log_of, settings


class WandbRun:
    """Notes what it is told; the first `good` calls of `log` succeed."""

    url = "https://host/run"

    def __init__(self, good: float = float("inf")):
        self.rows: list[dict[str, Any]] = []
        self.axes: list[tuple[Any, ...]] = []
        self.finished, self.good = 0, good
        self.settings = types.SimpleNamespace(sync_dir="there")

    def define_metric(self, *names: str, step_metric: str | None = None) -> None:
        self.axes.append((*names, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        if len(self.rows) >= self.good:
            raise ConnectionError("no\nnetwork")
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


class Wandb(types.ModuleType):
    """Stands for the library: the errors of `begin` come in turn, then runs."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="here")
        self.errors = types.SimpleNamespace(UsageError=KeyError, AuthenticationError=PermissionError)
        self.begun: list[dict[str, Any]] = []
        self.begin: list[Exception | WandbRun] = []
        self.runs: list[WandbRun] = []

    def Settings(self, **given: Any) -> dict[str, Any]:  # noqa: N802
        return given

    def init(self, **given: Any) -> WandbRun:
        self.begun.append(given)
        outcome = self.begin.pop(0) if self.begin else WandbRun()
        if isinstance(outcome, Exception):
            raise outcome
        self.runs.append(outcome)
        return outcome


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_numbers_of_a_row() -> None:
    row = {"step": 3, "kind": "statistics", "a": 1, "b": None, "c": float("nan"), "norms": {"x.0": 2.5, "y": None}}
    assert numbers(row) == {"a": 1, "norms/x.0": 2.5}


def test_lines_after_the_step_are_dropped(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.resume_after(0)
    for step in range(1, 6):
        lines.write({"step": step, "x": 0})
    lines.resume_after(3)
    lines.write({"step": 4, "x": 1})
    lines.close()
    assert [(row["step"], row["x"]) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 0),
        (2, 0),
        (3, 0),
        (4, 1),
    ]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def needs_tensorboard() -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'bytelatent[track]'")


def test_tensorboard_shows_a_run_that_was_cut_off_once(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_tensorboard()
    run = tmp_path / "run"
    more: dict[str, Any] = {"track": "tensorboard", "statistics_every": 3}
    cut_off(byte_lm_run(run, text, **more), 8, monkeypatch)  # the checkpoint is of step 5
    train(settings(byte_lm_run(run, text, **more)))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "bits_per_byte" in row]
    shown = scalars(run / "tensorboard", "bits_per_byte")
    assert [step for step, _ in shown] == list(range(1, 13))
    assert [value for _, value in shown] == pytest.approx([row["bits_per_byte"] for row in rows], rel=1e-6)
    assert [step for step, _ in scalars(run / "tensorboard", "update_norms/blocks.0")] == [3, 6, 9, 12]


def test_tensorboard_goes_back(tmp_path: Path) -> None:
    needs_tensorboard()
    board = TensorBoard(tmp_path)
    for after, value in ((0, 1.0), (2, 5.0)):
        board.resume_after(after)
        for step in range(after + 1, 5):
            board.write({"step": step, "x": value})
    board.close()
    assert scalars(tmp_path, "x") == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]


def test_tensorboard_without_room_stops_nothing(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needs_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    def full(self: SummaryWriter) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, "flush", full)
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=4, track=["tensorboard"])))
    assert len(read_metrics(run / "metrics.jsonl")) == 4
    line = f"'{run / 'tensorboard'}' cannot be written: No space left on device; training goes on without it"
    assert log_of(caplog).splitlines().count(line) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_missing_is_one_line(
    tmp_path: Path, text: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for spec in (None, ModuleSpec(name, None)):  # not there; a folder of that name where the command is run
        monkeypatch.setattr(checks, "find_spec", lambda _, spec=spec: spec)
        with pytest.raises(UserError) as caught:
            train(settings(byte_lm_run(tmp_path / "run", text, track=[name])))
        assert str(caught.value).startswith(f"track: {name} is not installed; pip install 'bytelatent[track]'")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="track"):
        settings(byte_lm_run(tmp_path, text, track=["mlflow"]))


def test_wandb_gets_all_rows_and_goes_on_with_the_same_run(
    tmp_path: Path, text: Path, wandb: Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    more = {"track": ["wandb"], "wandb": {"project": "mine", "mode": "offline"}}
    cut_off(byte_lm_run(run, text, **more), 8, monkeypatch)
    train(settings(byte_lm_run(run, text, **more)))
    first, second = wandb.begun
    assert first == {
        "project": "mine",
        "name": "run",
        "id": (run / "wandb.id").read_text().strip(),
        "resume": "allow",
        "dir": str(run),
        "mode": "offline",
        "config": settings(byte_lm_run(run, text, **more)).plain(),
        "settings": first["settings"],
    }
    assert second == first
    rows = read_metrics(run / "metrics.jsonl")
    assert wandb.runs[1].rows == [{"step": row["step"], **numbers(row)} for row in rows if row["step"] > 5]
    assert all(row["bits_per_byte"] > 0 for row in wandb.runs[1].rows)
    assert wandb.runs[1].axes == [("step", None), ("*", "step")]
    assert [each.finished for each in wandb.runs] == [1, 1]


def test_wandb_begins_again_where_nothing_goes_on(tmp_path: Path, text: Path, wandb: Wandb) -> None:
    for name in (None, "b"):
        values = byte_lm_run(tmp_path / "run", text, steps=2, track=["wandb"], wandb={"name": name})
        train(settings({**values, "run": str(tmp_path / (name or "a"))}))
    assert wandb.begun[0]["id"] != wandb.begun[1]["id"]
    assert [given["name"] for given in wandb.begun] == ["a", "b"]


@pytest.mark.parametrize(
    ("begin", "said", "modes", "rows"),
    [
        ([ConnectionError("no\nnetwork")], "cannot be reached (no network); it is used offline", 2, 4),
        ([ConnectionError("a"), OSError("b")], "failed (b); training goes on without it", 2, 0),
        ([WandbRun(good=2)], "failed (no network); training goes on without it", 1, 2),
    ],
)
def test_wandb_without_a_network_stops_nothing(
    tmp_path: Path,
    text: Path,
    wandb: Wandb,
    caplog: pytest.LogCaptureFixture,
    begin: list[Any],
    said: str,
    modes: int,
    rows: int,
) -> None:
    wandb.begin = begin
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=4, track=["wandb"])))
    assert len(read_metrics(run / "metrics.jsonl")) == 4
    assert log_of(caplog).count(said) == 1
    assert [given["mode"] for given in wandb.begun] == ["online", "offline"][:modes]
    assert sum(len(each.rows) for each in wandb.runs) == rows


@pytest.mark.parametrize("raises", [False, True])
def test_wandb_that_does_not_end_is_left(
    tmp_path: Path,
    text: Path,
    wandb: Wandb,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    raises: bool,
) -> None:
    let_go = threading.Event()

    class Endless(WandbRun):
        def finish(self) -> None:
            if raises:
                raise ConnectionError
            let_go.wait(30)

    monkeypatch.setattr(metrics_module, "FINISH_SECONDS", 10 if raises else 0.05)
    wandb.begin = [Endless()]
    train(settings(byte_lm_run(tmp_path / "run", text, steps=2, track=["wandb"])))
    let_go.set()
    assert "has not taken all rows; later: wandb sync there" in log_of(caplog)


def test_wandb_that_needs_a_key_is_one_line(tmp_path: Path, text: Path, wandb: Wandb) -> None:
    wandb.begin = [wandb.errors.UsageError("No API key.")]
    with pytest.raises(UserError, match=r"^wandb: .*No API key.*wandb.mode=offline"):
        train(settings(byte_lm_run(tmp_path / "run", text, track=["wandb"])))


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed: pip install 'bytelatent[track]'"
)
def test_the_real_wandb_offline(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    more = {"track": ["wandb"], "wandb": {"mode": "offline"}}
    cut_off(byte_lm_run(run, text, **more), 8, monkeypatch)
    train(settings(byte_lm_run(run, text, **more)))
    name = (run / "wandb.id").read_text().strip()
    starts = sorted((run / "wandb").glob("offline-run-*"))
    assert len({file.name for start in starts for file in start.glob("*.wandb")}) == 1
    assert all((start / f"run-{name}.wandb").stat().st_size > 1000 for start in starts)
