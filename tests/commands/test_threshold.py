"""A threshold moved at inference: `--threshold`, and `patching=` in Python."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.weights import Config, open_pretrained
from tests.model.tiny import tiny_blt, tiny_byte_lm

TEXT = "some text, of two\nlines"
MOVED = PatchSettings(threshold=5.3, reset_at_newline=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose threshold makes shorter patches."""
    folder = tmp_path_factory.mktemp("threshold")
    model, own = tiny_blt(window=6), MOVED.model_copy(update={"threshold": 5.0})
    config = Config(model=model.settings, context=64, patching=own)
    BLT(model, config, tiny_byte_lm(window=6)).save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def printed(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_commands_take_it(folder: Path) -> None:
    moved, own = (BLT.from_pretrained(folder / "model", patching=which) for which in (MOVED, None))
    assert (moved.patching, own.patching.threshold) == (MOVED, 5.0)
    sizes = [patch.end - patch.start for patch in moved.patch(TEXT)]
    assert len(sizes) < len(own.patch(TEXT))
    given = "-m", folder / "model", "--threshold", MOVED.threshold
    found = json.loads(printed("patch", TEXT, *given, "--json"))
    assert [[p["end"] - p["start"] for p in patches] for patches in found.values()] == [sizes]
    measured = json.loads(printed("eval", folder / "text.txt", *given, "--json"))
    assert measured["mean_patch_bytes"] == pytest.approx(len(TEXT) / len(sizes))
    assert measured["bits_per_byte"] == pytest.approx(moved.bits_per_byte(TEXT), rel=1e-6)
    greedy = printed("generate", TEXT, *given, "-n", 20, "--temperature", 0)
    assert greedy.rstrip("\n").endswith(moved.generate(TEXT, 20, temperature=0).rstrip("\n"))


def test_patches_without_one(folder: Path) -> None:
    stored = open_pretrained(folder / "model")
    assert stored.with_threshold(None) is stored
    blt = BLT.from_pretrained(folder / "model", patching=PatchSettings(mode="space"))
    blt.save_pretrained(folder / "space")
    with pytest.raises(UserError, match=r"has patches by space, which have no threshold; leave it out"):
        open_pretrained(folder / "space").with_threshold(1.0)
