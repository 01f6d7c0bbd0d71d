"""The model in the package: what it is and has learned, and that commands, training and the notebook use it."""

import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app
from bytelatent.packaged import FOLDER
from bytelatent.run_folder import read_metrics
from bytelatent.training import TrainSettings, train
from bytelatent.weights import load, open_pretrained
from dev.notebook import DOCS, NOTEBOOKS, cells_of
from tests.model.tiny import tiny_blt
from tests.test_blt import wrap

TEXT = "It was a fine morning, and she walked through the garden to the house of her sister."
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny() -> BLT:
    return BLT.from_pretrained("tiny")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_it_is_small_and_whole() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    found = load("tiny")
    assert found.byte_lm is not None
    assert {weight.dtype for part in (found.model, found.byte_lm) for weight in part.parameters()} == {torch.float32}
    assert next(load("tiny", dtype="bfloat16").model.parameters()).dtype == torch.bfloat16
    assert open_pretrained("tiny").source == "tiny"


def test_what_it_learned(tiny: BLT) -> None:
    backwards = TEXT[::-1]
    assert tiny.bits_per_byte(TEXT) < 1.6 < tiny.bits_per_byte(backwards)
    patches = tiny.patch(TEXT)
    assert "".join(patch.text for patch in patches) == TEXT
    assert 2 <= len(TEXT) / len(patches) <= 8
    assert re.search(r"[a-z]+ [a-z]+ ", tiny.generate("The ", max_new_bytes=40, temperature=0.5))


def test_the_card_states_licences_and_bits_per_byte() -> None:
    licences = re.findall(r"^\| (prose|docs|multilingual|code) \| [\w-]+ \| ([^|]+) \| [\d.]+ \|$", CARD, re.MULTILINE)
    assert {kind for kind, _ in licences} == {"prose", "docs", "multilingual", "code"}
    allowed = {"public domain", "Apache-2.0", "BSD-3-Clause", "PSF-2.0", "PostgreSQL licence"}
    assert {licence for _, licence in licences} <= allowed
    (row,) = re.findall(r"^\| BLT \| (.*) \|$", CARD, re.MULTILINE)
    bits = [float(value) for value in row.split(" | ")]
    assert all(1 < value < 2 for value in bits)
    assert re.search(r"^\| bits per byte \| ([\d.]+), the mean of", CARD, re.MULTILINE)[1] == f"{mean(bits):.3f}"  # type: ignore[index]
    assert "train_tiny.py" in CARD
    assert "/tmp" not in CARD + (FOLDER / "config.json").read_text()


def test_commands_use_it_where_no_model_is_named(empty: Path, caplog: pytest.LogCaptureFixture, tiny: BLT) -> None:
    assert called("patch", TEXT).splitlines()[1:]
    assert "no model is named and 'runs/demo' does not exist: using tiny" in caplog.text
    assert called("generate", "The ", "-n", "20", "--seed", "3") == f"The {tiny.generate('The ', 20, seed=3)}\n"
    shown = called("info", "tiny")
    assert "5,003 rows each" in shown
    assert f"{tiny.context:,} bytes of context" in shown
    assert "4,000 bytes of context" in called("info", "tiny", "--context", "4000")
    caplog.clear()
    called("patch", TEXT, "--mode", "space")
    assert "tiny" not in caplog.text
    assert CliRunner().invoke(app, ["patch", TEXT, "-m", "runs/demo"]).exit_code == 2  # it is not there
    wrap(tiny_blt(window=6)).save_pretrained(empty / "runs" / "demo")
    caplog.clear()
    called("generate", "The ", "-n", "2")
    assert "tiny" not in caplog.text


def test_a_folder_of_this_name_comes_first(empty: Path) -> None:
    own = wrap(tiny_blt(window=6))
    own.save_pretrained(empty / "tiny")
    assert BLT.from_pretrained("tiny").num_parameters() == own.num_parameters()


def test_training_begins_from_it(empty: Path, tiny: BLT) -> None:
    (empty / "text.txt").write_text(TEXT * 3)
    data = {"train": "text.txt", "context": 300, "batch_bytes": 300}
    run = train(
        TrainSettings.parse({"run": "mine", "init": "tiny", "steps": 1, "device": "cpu", "log_every": 1, "data": data})
    )
    (row,) = [row for row in read_metrics(run / "metrics.jsonl") if "bits_per_byte" in row]
    assert row["bits_per_byte"] == pytest.approx(tiny.bits_per_byte(TEXT * 3), rel=0.02)


def test_the_notebook_runs(empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    for cell in cells_of(NOTEBOOKS[DOCS / "notebooks" / "first_steps.md"]):
        exec(compile(cell, "first_steps", "exec"), names)
    assert names["bits"]["English"] < names["bits"]["German"] < names["bits"]["letters at random"]
    assert names["bits"]["Python"] < names["bits"]["letters at random"]
    assert list(names["sizes"].values()) == sorted(names["sizes"].values())
    assert [bar.get_width() for bar in names["axes"].patches] == list(names["bits"].values())
    printed = capsys.readouterr().out
    assert "entropy_model: 706" in printed
    assert "She was" in printed
    assert len(re.findall(r"' -> '.': \d+\.\d nats\n", printed)) == 5
