"""The rotary embedding's settings on the way in and out: the same logits as in transformers, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BltForCausalLM

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.weights import Config, load
from tests.model.tiny import tiny_byte_lm
from tests.weights.published import write_published
from tests.weights.test_hugging_face import TOLERANCE, random_rows, their_logits, write_theirs

PARTS = ("patcher", "encoder", "decoder", "global")
DEFAULT = {"rope_type": "default", "rope_theta": 100.0}


def set_rope(folder: Path, part: str, **values: Any) -> None:
    """Replace a part's settings of the rotary embedding in `config.json`; the top level has no name."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    inner = config[f"{part}_config"] if part else config
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        inner.pop(key, None)
    inner.update(values)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": DEFAULT},
        {"rope_scaling": DEFAULT, "rope_parameters": DEFAULT},
        {"rope_scaling": {}, "rope_parameters": DEFAULT},
        {"rope_scaling": None, "rope_parameters": DEFAULT, "rope_theta": 100.0},
        {"rope_scaling": {"type": "default"}, "rope_theta": 100.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 100.0},
        {"rope_scaling": {"rope_type": "default"}},
        {},
    ],
)
def test_read_as_transformers_reads_it(part: str, values: dict[str, Any], tmp_path: Path) -> None:
    write_theirs(tmp_path)
    set_rope(tmp_path, part, **values)
    rows = random_rows(0)
    theirs = their_logits(BltForCausalLM.from_pretrained(tmp_path), rows)
    torch.testing.assert_close(BLT.from_pretrained(tmp_path, device="cpu").logits(rows), theirs, **TOLERANCE)


@pytest.mark.parametrize("part", ["", *PARTS])
@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": DEFAULT},
            "rope_scaling.rope_type is 'linear'",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
        ({"rope_parameters": {**DEFAULT, "rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type is 'yarn'"),
        ({"rope_scaling": {**DEFAULT, "rope_theta": 7.0}, "rope_parameters": DEFAULT}, "rope_scaling = 7.0"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": DEFAULT}, "rope_parameters = 100.0"),
        ({"rope_parameters": DEFAULT, "rope_theta": 7.0}, "rope_theta = 7.0"),
        ({"rope_parameters": {"full_attention": DEFAULT}}, "rope_parameters.full_attention"),
        ({"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"rope_scaling": [2.0]}, r"rope_scaling is \[2.0\]"),
        ({"partial_rotary_factor": 0.5, "rope_parameters": DEFAULT}, "partial_rotary_factor is 0.5"),
    ],
)
def test_refused_by_name(part: str, values: dict[str, Any], key: str, tmp_path: Path) -> None:
    write_theirs(tmp_path)
    set_rope(tmp_path, part, **values)
    if not part and " = " in key:  # transformers reads no theta at the top
        assert load(tmp_path).byte_lm is not None
        return
    with pytest.raises(UserError, match=(f"{part}_config." if part else "") + key) as caught:
        load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("kind", ["hub", "older"])
@pytest.mark.parametrize("name", ["blt_k2", "entropy"])
@pytest.mark.parametrize("values", [{"rope_scaling": {"type": "linear", "factor": 2.0}}, {"use_scaled_rope": True}])
def test_refused_in_metas_formats(kind: str, name: str, values: dict[str, Any], goldens: Path, tmp_path: Path) -> None:
    folder = write_published(goldens / name, tmp_path / "m", kind)
    file = folder / ("config.json" if kind == "hub" else "params.json")
    config = json.loads(file.read_text())
    inner = next((config[key] for key in ("args", "model", "entropy_model") if key in config), config)
    inner.update(values)
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{next(iter(values))} is .*only the plain rotary embedding is known"):
        load(folder)


def test_written_where_each_version_reads_it(blt: BLT, tmp_path: Path) -> None:
    """Version 4 reads `rope_theta`, version 5 `rope_parameters`; the patcher's default is another than the rest's."""
    byte_lm = tiny_byte_lm(window=6, rope_theta=77.0)
    config = Config(model=blt.model.settings, context=64, patching=PatchSettings(threshold=5.0))
    BLT(blt.model, config, byte_lm).save_pretrained(tmp_path / "a", format="hf")
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    for part, theta in zip(PARTS, (77.0, 500_000.0, 500_000.0, 500_000.0), strict=True):
        inner = values[f"{part}_config"]
        assert inner["rope_theta"] == inner["rope_parameters"]["rope_theta"] == theta
