"""`bytelatent.json` completes the settings in another format, and never overrides them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.patching import Calibration
from bytelatent.weights import open_pretrained
from bytelatent.weights.stored_model import Config
from tests.model.tiny import tiny_blt_settings, tiny_byte_lm

MEASURED = Calibration(threshold=5.12, wanted_patch_bytes=4, mean_patch_bytes=4.1, window=6, data="x", data_bytes=10)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.fixture(params=["hf", "meta"])
def folder(request: pytest.FixtureRequest, blt: BLT, tmp_path: Path) -> Path:
    blt.config = blt.config.model_copy(update={"calibration": MEASURED})
    blt.save_pretrained(tmp_path / request.param, format=request.param)
    return tmp_path / request.param


def test_it_completes(folder: Path, blt: BLT) -> None:
    assert open_pretrained(folder).config == blt.config
    (folder / "bytelatent.json").unlink()
    found = open_pretrained(folder).config
    assert found.calibration is None
    assert found.patching == blt.patching


def test_a_changed_file_is_believed(folder: Path) -> None:
    """The whole sidecar is then ignored, because it describes another model."""
    if folder.name == "hf":
        edit(folder / "config.json", lambda v: v.update(patching_threshold=1.5))
    else:
        edit(folder / "train_args.json", lambda v: v["data"]["patcher_args"].update(threshold=1.5))
    found = open_pretrained(folder).config
    assert found.patching is not None
    assert found.patching.threshold == 1.5
    assert found.calibration is None


@pytest.mark.parametrize("key", ["rope_theta", "norm_eps"])
def test_a_changed_shape_is_believed(key: str, folder: Path, blt: BLT) -> None:
    def change(values: dict[str, Any]) -> None:
        if folder.name == "meta":
            values["args"][key] = 0.5
        elif key == "rope_theta":
            values["encoder_config"]["rope_theta"] = 0.5
            values["encoder_config"]["rope_parameters"]["rope_theta"] = 0.5
        else:
            values["encoder_config"]["rms_norm_eps"] = 0.5

    edit(folder / "config.json", change)
    found = open_pretrained(folder).config
    assert getattr(found.model, "encoder").plain()[key] == 0.5  # noqa: B009
    assert found.calibration is None


def test_a_changed_context_is_believed(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a", format="hf")
    edit(tmp_path / "a" / "config.json", lambda v: v.update(max_position_embeddings=7))
    edit(tmp_path / "a" / "config.json", lambda v: v["patcher_config"].update(max_position_embeddings=8))
    found = open_pretrained(tmp_path / "a")
    assert found.config.context == 7
    assert found.byte_lm is not None
    assert found.byte_lm.config.context == 8


def test_a_changed_byte_lm_is_believed(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a", format="hf")
    edit(tmp_path / "a" / "config.json", lambda v: v["patcher_config"].update(sliding_window=3))
    found = open_pretrained(tmp_path / "a").byte_lm
    assert found is not None
    assert found.config.model.plain()["window"] == 3


@pytest.mark.parametrize("which", ["a byte LM", "no patching", "bpe", "another BLT"])
def test_what_was_written_for_something_else_is_left_out(which: str, folder: Path, blt: BLT) -> None:
    byte_lm = Config(model=tiny_byte_lm().settings, context=3, calibration=MEASURED)
    other = {
        "a byte LM": byte_lm,
        "no patching": blt.config.model_copy(update={"patching": None}),
        "bpe": blt.config.model_copy(
            update={"patching": type(blt.patching).parse({"mode": "bpe", "tokenizer": "x.json"})}
        ),
        "another BLT": blt.config.model_copy(update={"model": tiny_blt_settings(window=5)}),
    }[which]
    (folder / "bytelatent.json").write_text(json.dumps(other.plain()))
    found = open_pretrained(folder)
    assert found.config.calibration is None
    assert found.config.patching == blt.patching
    if folder.name == "hf":
        (folder / "bytelatent.byte_lm.json").write_text(json.dumps(blt.config.plain()))
        inner = open_pretrained(folder).byte_lm
        assert inner is not None
        assert inner.config.calibration is None


@pytest.mark.parametrize("text", ["", "[]", '{"model": 1}', '{"version": 2}'])
def test_a_corrupt_sidecar_is_named(text: str, folder: Path) -> None:
    (folder / "bytelatent.json").write_text(text)
    with pytest.raises(UserError, match=r"bytelatent\.json"):
        open_pretrained(folder)
