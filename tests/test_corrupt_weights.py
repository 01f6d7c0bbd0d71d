"""Weights that are not finite, met by each command: one line, exit code 2, nothing written; JSON is always valid."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bytelatent import BLT
from bytelatent.cli import main
from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.eval_text import evaluate_models
from bytelatent.patching import PatchSettings
from bytelatent.terminal import print_json
from bytelatent.weights import Config
from tests.model.tiny import tiny_blt, tiny_byte_lm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose byte LM, and one whose decoder, is corrupt; and a text."""
    model = tiny_blt()
    config = Config(model=model.settings, context=64, patching=PatchSettings(threshold=5.0))
    for name, part in (("blt", "model.safetensors"), ("byte_lm", "byte_lm/model.safetensors")):
        BLT(model, config, tiny_byte_lm()).save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / part)
        tensors[("decoder." if name == "blt" else "") + "output.weight"][7, 3] = torch.nan
        save_file(tensors, tmp_path / name / part)
        (tmp_path / name / "complete.json").unlink()
    (tmp_path / "text.txt").write_text("a text of some length")
    return tmp_path


READ_BOTH = [
    ["eval", "text.txt", "--json", "-m"],
    ["eval", "text.txt", "-m"],
    ["generate", "x", "-m"],
    ["patch", "x", "-m"],
    ["convert", "--to", "meta", "{}", "out"],
]
READ_THE_BYTE_LM = [
    ["calibrate", "text.txt", "--patch-bytes", "4", "-m"],
    ["entropies", "text.txt", "--out", "out", "-m"],
]


@pytest.mark.parametrize(
    ("arguments", "corrupted"),
    [*((one, "blt") for one in READ_BOTH), *((one, "byte_lm") for one in [*READ_BOTH, *READ_THE_BYTE_LM])],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_named_in_one_line(
    arguments: list[str],
    corrupted: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    filled = [argument.format(corrupted) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["blt", *filled, *([corrupted] if filled[-1] == "-m" else [])])
    with pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "output.weight holds NaN or infinite values" in line
    assert not (folder / "out").exists()


def test_an_evaluation_that_is_not_finite(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights may give infinite logits."""
    model = tiny_blt()
    with torch.no_grad():
        model.decoder.output.weight.mul_(1e38)
        model.decoder.norm.weight.mul_(1e38)
    config = Config(model=model.settings, context=64, patching=PatchSettings(mode="byte"))
    BLT(model, config, None).save_pretrained(folder / "huge")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["blt", "eval", "text.txt", "--json", "-m", "huge"])
    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "'huge' gives" in captured.err


def test_a_device_is_chosen_before_anything_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    from bytelatent.commands.calibrate import calibrate_text
    from bytelatent.commands.options import CalibrateSettings
    from bytelatent.errors import UserError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for call in (
        lambda: evaluate_models(EvaluateSettings(model="nowhere", text=["nowhere"], device="cuda")),
        lambda: calibrate_text(CalibrateSettings(text=["nowhere"], patch_bytes=4, model="nowhere", device="cuda")),
    ):
        with pytest.raises(UserError, match="device: 'cuda' cannot be used"):
            call()


@pytest.mark.parametrize(
    ("values", "printed"),
    [
        ({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (-float("inf"), 2)}},
         {"a": None, "b": [1.5, None], "c": {"d": [None, 2]}}),
        ([], []),
        ({"text": "NaN", "none": None, "yes": True}, {"text": "NaN", "none": None, "yes": True}),
    ],
)  # fmt: skip
def test_json_is_valid(values: Any, printed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    print_json(values)
    text = capsys.readouterr().out
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == printed
