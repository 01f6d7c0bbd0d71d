"""Training on text with entropies beside it: the same run as with the byte LM on every batch."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bytelatent.blt import BLT
from bytelatent.errors import UserError
from bytelatent.text import read_documents
from bytelatent.training import read_metrics, train
from tests import processes
from tests.training.crew import Crew
from tests.training.plans import train_as
from tests.training.tiny_runs import blt_run, byte_lm_run, environment, log_of, losses, settings, write_text


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte LM, and text with its entropies and with the starts of one threshold, made by the command."""
    folder = tmp_path_factory.mktemp("stored")
    text = write_text(folder / "text.jsonl", seed=0)
    train(settings(byte_lm_run(folder / "byte_lm", text)))
    store(folder, "entropies")
    rows = read_documents(str(folder / "entropies" / "text.parquet"))
    entropies = np.concatenate([document.entropies for _, document in rows if document.entropies is not None])
    threshold = round(float(np.quantile(entropies, 0.75)), 6)
    (folder / "threshold").write_text(str(threshold))
    store(folder, "starts", "--starts", str(threshold))
    return folder


def store(folder: Path, out: str, *more: str) -> None:
    command = [sys.executable, "-m", "bytelatent.cli", "entropies", str(folder / "text.jsonl"), "--out", out, *more]
    command += ["--model", "byte_lm", "--device", "cpu", "--dtype", "float32"]
    assert processes.ended(command, environment(), folder).returncode == 0


def of_starts(work: Path, run: Path, **more: object) -> dict:
    asked = {"mode": "entropy", "threshold": float((work / "threshold").read_text())}
    return blt_run(run, work / "starts", work / "byte_lm", calibration=None, patching=asked, **more)


def test_the_losses_are_those_of_the_live_byte_lm(work: Path, tmp_path: Path) -> None:
    live = of_starts(work, tmp_path / "live")
    live["data"]["train"] = str(work / "text.jsonl")
    train(settings(live))
    train(settings(of_starts(work, tmp_path / "stored")))
    train(settings(of_starts(work, tmp_path / "alone") | {"entropy_model": None}))
    assert len(losses(tmp_path / "live")) >= 12
    sizes = [row["mean_patch_bytes"] for row in read_metrics(tmp_path / "live" / "metrics.jsonl")]
    assert 1.2 < sum(sizes) / len(sizes) < 20  # neither does every byte start a patch nor none
    assert losses(tmp_path / "stored") == losses(tmp_path / "live") == losses(tmp_path / "alone")
    model = BLT.from_pretrained(tmp_path / "stored")
    assert model.patch("the cat sat on a mat")  # it has its byte LM
    with pytest.raises(UserError, match="entropy model"):
        BLT.from_pretrained(tmp_path / "alone").patch("the cat sat on a mat")


def test_the_threshold_is_chosen_on_stored_entropies(work: Path, tmp_path: Path) -> None:
    train(settings(blt_run(tmp_path / "stored", work / "entropies", work / "byte_lm")))
    train(settings(blt_run(tmp_path / "alone", work / "entropies", work / "byte_lm") | {"entropy_model": None}))
    found = [json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("stored", "alone")]
    assert found[0] == found[1]
    assert found[0]["mean_patch_bytes"] == pytest.approx(4.0, rel=0.05)
    assert found[0]["window"] == 32
    assert len(found[0]["byte_lm"]) == 16
    assert losses(tmp_path / "stored") == losses(tmp_path / "alone")


def test_calibration_passes_over_damage_as_training_does(
    work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "torn").mkdir()
    whole = (work / "entropies" / "text.parquet").read_bytes()
    (tmp_path / "torn" / "a.parquet").write_bytes(whole)
    (tmp_path / "torn" / "b.parquet").write_bytes(whole[:-30])
    values = blt_run(tmp_path / "run", tmp_path / "torn", work / "byte_lm", steps=60)
    train(settings(values))
    lines = [line for line in log_of(caplog).splitlines() if "b.parquet' is not a whole Parquet file" in line]
    assert len(lines) == 1  # in calibration, and in no epoch again
    assert "passed over (1 of at most 100)" in lines[0]
    values["run"] = str(tmp_path / "strict")
    values["data"]["max_bad_rows"] = 0
    with pytest.raises(UserError, match="is not a whole Parquet file"):
        train(settings(values))


def test_no_rank_repeats_what_calibration_said(work: Path, tmp_path: Path, crew: Crew) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes((work / "text.jsonl").read_bytes() + b"{torn\n")
    values = blt_run(tmp_path / "run", text, work / "byte_lm", steps=30, parallel={"data": "replicate"})
    [said] = crew.run((2, train_as, values))
    assert [sum("line 61 is not JSON" in line for line in lines) for lines in said] == [1, 0]


def test_reading_processes_may_change_between_starts(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.forked_readers(monkeypatch)
    for name, changes in (("same", {}), ("other", {"workers": 1, "max_bad_rows": 3})):
        train(settings(of_starts(work, tmp_path / name, steps=5)))
        more = of_starts(work, tmp_path / name, steps=10)
        more["data"] |= changes
        train(settings(more))
    assert len(losses(tmp_path / "same")) >= 10
    assert losses(tmp_path / "other") == losses(tmp_path / "same")


def test_bad_rows_are_logged(work: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = tmp_path / "text.jsonl"
    text.write_bytes((work / "text.jsonl").read_bytes() + b"{torn\n")
    train(settings(byte_lm_run(tmp_path / "run", text)))
    shown = log_of(caplog)
    assert f"{text.name}' line 61 is not JSON" in shown
    assert "passed over (1 of at most 100)" in shown
    with pytest.raises(UserError, match="line 61 is not JSON"):
        train(settings(byte_lm_run(tmp_path / "strict", text, data={"max_bad_rows": 0})))
