"""Our own format, whole and broken."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bytelatent.errors import UserError
from bytelatent.files import whole_folder
from bytelatent.model import BLTModel, ByteLM
from bytelatent.patching import Calibration, PatchSettings
from bytelatent.weights import Config, fingerprint, load, load_byte_lm, save
from tests.model.tiny import tiny_blt, tiny_byte_lm

PATCHING = PatchSettings(mode="entropy", threshold=5.12)
MEASURED = Calibration(threshold=5.12, wanted_patch_bytes=4, mean_patch_bytes=4.1, window=6, data="x", data_bytes=10)


def write(folder: Path, with_byte_lm: bool = True) -> BLTModel:
    folder.mkdir(parents=True)
    model = tiny_blt(seed=1)
    config = Config(model=model.settings, context=99, patching=PATCHING, calibration=MEASURED)
    save(folder, model, config, tiny_byte_lm(seed=2, window=6) if with_byte_lm else None)
    return model


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


@pytest.mark.parametrize("with_byte_lm", [True, False])
def test_round_trip(with_byte_lm: bool, tmp_path: Path) -> None:
    model = write(tmp_path / "a", with_byte_lm)
    found = load(tmp_path / "a")
    assert_same(found.model, model)
    assert found.config == Config(model=model.settings, context=99, patching=PATCHING, calibration=MEASURED)
    assert not found.model.training
    if with_byte_lm:
        assert found.byte_lm is not None
        assert_same(found.byte_lm, tiny_byte_lm(seed=2, window=6))
        assert found.byte_lm.settings == tiny_byte_lm(seed=2, window=6).settings
        assert_same(load_byte_lm(tmp_path / "a"), found.byte_lm)
    else:
        assert found.byte_lm is None
        with pytest.raises(UserError, match="holds a BLT without a byte LM"):
            load_byte_lm(tmp_path / "a")


def test_byte_lm_that_stands_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "a")
    other = tiny_byte_lm(seed=3)
    (tmp_path / "b").mkdir()
    save(tmp_path / "b", other, Config(model=other.settings, context=99))
    found = load(tmp_path / "a", entropy_model=tmp_path / "b").byte_lm
    assert found is not None
    assert_same(found, other)


def test_half_precision_is_kept(tmp_path: Path) -> None:
    model = tiny_byte_lm().to(torch.bfloat16)
    (tmp_path / "a").mkdir()
    save(tmp_path / "a", model, Config(model=model.settings, context=99))
    assert_same(load(tmp_path / "a").model, model)


def test_a_run_is_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(3):
        model = tiny_blt(seed=step)
        with whole_folder(run / "checkpoints" / f"step-{step:08d}") as aside:
            save(aside, model, Config(model=model.settings, context=99, patching=PATCHING))
    with pytest.raises(UserError, match="holds no model"):
        load(run)
    (run / "settings.yaml").write_text("")
    assert_same(load(run).model, tiny_blt(seed=2))
    (run / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"torn")
    found = load(run)
    assert_same(found.model, tiny_blt(seed=1))
    assert len(found.warnings) == 1
    assert found.byte_lm is None
    byte_lm = tiny_byte_lm()
    (run / "byte_lm").mkdir()
    save(run / "byte_lm", byte_lm, Config(model=byte_lm.settings, context=99))
    found = load(run)
    assert isinstance(found.byte_lm, ByteLM)
    assert_same(found.byte_lm, byte_lm)
    for step in range(2):
        (run / "checkpoints" / f"step-{step:08d}" / "config.json").unlink()
    with pytest.raises(UserError, match=r"is whole: .*config.json is missing.*; remove them to start again"):
        load(run)


def changed_json(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(values))

    return change


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


def cut_short(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "is not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a whole safetensors file"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            r"safetensors' does not exist; the folder is not complete",
        ),
        (changed_tensors(lambda t: t.pop("decoder.norm.weight")), r"missing decoder.norm.weight"),
        (changed_tensors(lambda t: t.update(extra=torch.zeros(1))), "unknown extra"),
        (
            changed_tensors(lambda t: t.update({"decoder.norm.weight": torch.zeros(15)})),
            r"decoder.norm.weight is \[15\] where the settings say \[16\]",
        ),
        (changed_json(contxt=3), "contxt: unknown key; did you mean 'context'"),
        (changed_json(context="many"), "context: .*, not 'many'"),
        (changed_json(model={"kind": "blt"}), "model"),
        (changed_json(format="another"), "holds no model"),
        (lambda f: (f / "config.json").write_text('{"format": "byte'), "is not valid JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "config.json").unlink(), "holds no model"),
        (lambda f: (f / "byte_lm" / "model.safetensors").unlink(), "does not exist"),
    ],
)
def test_broken_folders_are_refused_in_one_line(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    write(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*nowhere' is not a folder"):
        load(tmp_path / "nowhere")


def test_fingerprint_distinguishes_weights_apart() -> None:
    same, again = tiny_byte_lm(seed=0), tiny_byte_lm(seed=0)
    assert fingerprint(same) == fingerprint(again)
    with torch.no_grad():
        again.norm.weight[3] += 1e-6
    assert fingerprint(same) != fingerprint(again)
