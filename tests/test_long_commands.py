"""Progress of the commands that take minutes on a slow machine, on a clock that only work moves."""

import gzip
import re
import time
from pathlib import Path
from typing import Any

import pytest

from bytelatent.commands.calibrate import calibrate_text
from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.eval_text import evaluate_models
from bytelatent.commands.options import CalibrateSettings
from bytelatent.model import ByteLM
from bytelatent.training import train
from tests.training.tiny_runs import byte_lm_run, settings, write_text

LINE = re.compile(r"(\w+) +(\d+)%  ([\d,]+) (of|of about) ([\d,]+) bytes  (\d+:\d\d) left")


@pytest.fixture(scope="module")
def byte_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte_lm")
    return train(settings(byte_lm_run(folder / "run", write_text(folder / "text.jsonl", seed=0), steps=2)))


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven seconds for each batch."""
    now = [0.0]
    forward = ByteLM.forward

    def charged(self: ByteLM, *arguments: Any, **more: Any) -> Any:
        now[0] += 11
        return forward(self, *arguments, **more)

    monkeypatch.setattr(ByteLM, "forward", charged)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])


def shown(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int, int, str, int]]:
    """What, percent, bytes done, how sure, bytes in all."""
    matches = [LINE.fullmatch(line) for line in caplog.messages]
    assert all(matches)
    whole = [match.groups() for match in matches if match]
    return [(w, int(p), int(d.replace(",", "")), of, int(t.replace(",", ""))) for w, p, d, of, t, _ in whole]


@pytest.mark.parametrize("max_bytes", [None, 15_000])
def test_eval_shows_how_far_it_is(
    tmp_path: Path, byte_lm: Path, max_bytes: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("All that there is to read, and more of it.\n" * 1000)
    result = evaluate_models(EvaluateSettings(model=str(byte_lm), device="cpu", text=[str(path)], max_bytes=max_bytes))
    lines = shown(caplog)
    assert len(lines) >= 4
    assert {(what, of, total) for what, _, _, of, total in lines} == {("measuring", "of about", max_bytes or 43_000)}
    assert lines[-1][1:3] == (100, result["num_bytes"])
    assert [percent for _, percent, *_ in lines] == [
        round(100 * done / (max_bytes or 43_000)) for _, _, done, *_ in lines
    ]


def test_eval_knows_no_time_left_where_a_compressed_file_holds_more_than_was_guessed(
    tmp_path: Path, byte_lm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "text.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "%s"}\n' % (b"zip" * 5000)))
    result = evaluate_models(EvaluateSettings(model=str(byte_lm), device="cpu", text=[str(path)]))
    assert caplog.messages[-1] == f"measuring  {result['num_bytes']:,} bytes"


def test_calibrate_shows_how_far_it_is(tmp_path: Path, byte_lm: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = write_text(tmp_path / "text.jsonl", seed=1, num_documents=300)
    found, _ = calibrate_text(
        CalibrateSettings(text=[str(text)], patch_bytes=2.0, model=str(byte_lm), max_bytes=20_000, device="cpu")
    )
    lines = shown(caplog)
    assert len(lines) >= 4
    assert {(what, of) for what, _, _, of, _ in lines} == {("calibrating", "of")}
    assert lines[-1][1] == 100
    assert 19_000 < found.data_bytes < 21_000
