"""Where `blt convert` and `save_pretrained` write: targets, disks, stops, and what a format does not know."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app, main
from bytelatent.errors import UserError
from bytelatent.files import whole_folder
from bytelatent.patching import PatchSettings
from bytelatent.patching.modes import ModeName
from bytelatent.weights import FORMATS, Config, convert, open_pretrained, save, write_model
from bytelatent.weights import safetensors_io as tensors
from bytelatent.weights.stored_model import StoredModel
from tests.model.tiny import tiny_byte_lm

IDS = torch.tensor([[1, *(byte + 4 for byte in b"the same")]])


@pytest.fixture
def source(blt: BLT, tmp_path: Path) -> Path:
    blt.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def run(blt: BLT, tmp_path: Path) -> Path:
    """A run with one checkpoint, as training leaves it."""
    folder = tmp_path / "runs" / "mine"
    with whole_folder(folder / "checkpoints" / "step-00000007") as aside:
        save(aside, blt.model, blt.config)
        (aside / "optimizer.pt").write_bytes(b"state")
    assert blt.entropy_model is not None
    with whole_folder(folder / "byte_lm") as aside:
        save(aside, blt.entropy_model, Config(model=blt.entropy_model.settings, context=64))
    (folder / "settings.yaml").write_text("data:\n  train: [{path: a.jsonl}, b.jsonl]\n  valid: held-out\n")
    rows = [{"step": 5, "bytes_seen": 50, "validation_bits_per_byte": 2.5}, {"step": 9, "bytes_seen": 90}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert str(caught.value).isprintable()


def refused_by_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """The last line on standard error, with code 2 or 130; the line before it describes the model."""
    monkeypatch.setattr(sys, "argv", ["blt", "convert", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code in (2, 130)
    assert said.out == ""
    assert "Traceback" not in said.err
    assert len(said.err.splitlines()) <= 2
    return said.err.splitlines()[-1]


@pytest.mark.parametrize("format", FORMATS)
def test_a_run(format: str, run: Path, blt: BLT, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(run), str(tmp_path / "out"), "--to", format, "--licence", "mit"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "out")
    found = BLT.from_pretrained(tmp_path / "out", device="cpu")
    assert found.logits(IDS).equal(blt.logits(IDS))
    origin = found.config.origin
    assert origin.converted_from == "mine (checkpoint of a run)"
    assert (origin.training_text, origin.validation_text) == (["a.jsonl", "b.jsonl"], ["held-out"])
    assert (origin.training_bytes, origin.bits_per_byte, origin.licence) == (50, 2.5, "mit")
    assert not list((tmp_path / "out").rglob("optimizer.pt"))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("settings.yaml", "data: 7"),
        ("settings.yaml", "data: {train: [[1]]}"),
        ("settings.yaml", "data: {train: [{file: a}]}"),
        ("metrics.jsonl", '{"loss": 1}'),
        ("metrics.jsonl", "[1]\n7"),
        ("metrics.jsonl", '{"step": 1, "bytes_seen": "many"}'),
    ],
)
def test_a_run_with_corrupt_settings_or_metrics(file: str, text: str, run: Path, blt: BLT) -> None:
    """They describe the model's origin; the model itself does not need them."""
    (run / file).write_text(text)
    assert BLT.from_pretrained(run, device="cpu").logits(IDS).equal(blt.logits(IDS))


def test_the_source_is_not_replaced(source: Path, blt: BLT, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(source)
    monkeypatch.chdir(source.parent)
    (source.parent / "link").symlink_to(source)
    for target in ("source", "./source", "link", "source/../source"):
        refused(lambda target=target: convert(open_pretrained(source), Path(target), "hf"), "would replace .* is read")
    refused(lambda: convert(open_pretrained(source / "byte_lm"), source, "meta"), "would replace .*byte_lm'")
    refused(lambda: convert(open_pretrained(source), source / "byte_lm", "hf"), "holds something else")
    blt.save_pretrained(source.parent / "other")
    borrowing = open_pretrained(source.parent / "other", entropy_model=source)
    refused(lambda: convert(borrowing, source, "hf"), "would replace '.*source'")
    assert everything(source) == before
    convert(open_pretrained(source), source / "hf", "hf")  # inside is a place as any other
    assert BLT.from_pretrained(source / "hf", device="cpu").logits(IDS).equal(blt.logits(IDS))
    assert BLT.from_pretrained(source, device="cpu").logits(IDS).equal(blt.logits(IDS))


def test_from_within_the_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    convert(open_pretrained("."), Path("../out"), "hf")
    assert open_pretrained("../out").config.origin.converted_from == "source (bytelatent)"


def test_what_is_no_saved_model_is_not_replaced(run: Path, source: Path, tmp_path: Path) -> None:
    """A run, its checkpoints and its byte LM among them."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary").write_text("dear diary")
    (tmp_path / "file").write_text("x")
    before = everything(tmp_path)
    for target in ("notes", "runs/mine", "runs/mine/checkpoints", "runs/mine/checkpoints/step-00000007"):
        refused(lambda target=target: convert(open_pretrained(source), tmp_path / target, "hf"), "something else")
    refused(lambda: convert(open_pretrained(source), run / "byte_lm", "hf"), "something else")
    refused(lambda: convert(open_pretrained(source), tmp_path / "file", "hf"), "file' is a file; name a folder")
    refused(lambda: convert(open_pretrained(source), tmp_path / "file" / "a", "hf"), "cannot be written: Not a dir")
    refused(lambda: convert(open_pretrained(source), Path("~nobody-here/a"), "hf"), "there is no such user")
    refused(lambda: convert(open_pretrained(source), tmp_path / "out", "HF"), "'HF' is unknown; use native, hf, meta")
    assert everything(tmp_path) == before


def test_an_earlier_model_is_replaced_as_a_whole(source: Path, tmp_path: Path) -> None:
    for format in ("hf", "meta", "native", "hf"):
        convert(open_pretrained(source), tmp_path / "out", format)
        (tmp_path / "new").mkdir()
        convert(open_pretrained(source), tmp_path / "new" / "out", format)
        assert everything(tmp_path / "out") == everything(tmp_path / "new" / "out")
        shutil.rmtree(tmp_path / "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(lambda: convert(open_pretrained(source), tmp_path / "locked" / "a", "hf"), "cannot be written")


def test_no_room(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=10))
    said = refused_by_the_command(monkeypatch, capsys, source, tmp_path / "out" / "deep", "--to", "hf")
    assert said.startswith(f"error: '{tmp_path / 'out' / 'deep'}' needs 230.7 kB and has room for 10 bytes; make room")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device"), OSError(5, "I/O error")])
def test_a_stop_leaves_what_was_there(
    stop: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(open_pretrained(source), tmp_path / "out", "meta")
    before = everything(tmp_path)
    real, calls = tensors._read, []

    def stopped(place: tensors.FileRange) -> Any:
        calls.append(place)
        if len(calls) == 5:
            raise stop
        return real(place)

    monkeypatch.setattr(tensors, "_read", stopped)
    for target in ("out", "new"):
        calls.clear()
        said = refused_by_the_command(monkeypatch, capsys, source, tmp_path / target, "--to", "hf")
        expected = {28: "error: the disk is full: ", 5: "cannot be written: I/O error"}
        assert (expected[stop.errno] if isinstance(stop, OSError) else "stopped: '") in said
        assert len(calls) == 5
        assert everything(tmp_path) == before
        assert {place.name for place in tmp_path.iterdir()} == {"source", "out"}


PATCHING = {
    "space": PatchSettings(mode="space"),
    "static": PatchSettings(mode="static", patch_size=3),
    "bpe": PatchSettings(mode="bpe", tokenizer="x.json"),
    "byte": PatchSettings(mode="byte"),
    "entropy": PatchSettings(threshold=5.12),
}
REFUSED = {
    ("space", "hf"): "hf: the format knows the patching modes entropy, byte, not 'space'; use native or meta",
    ("static", "hf"): "not 'static, 3 ids each'",
    ("bpe", "hf"): "not 'bpe, x.json'",
    ("bpe", "meta"): "meta: the format knows the patching modes entropy, space, static, byte, not 'bpe, x.json'",
    ("entropy", "hf"): "hf: patching mode 'entropy' needs the byte LM in the same folder; name it: --entropy-model ",
}


def test_every_mode_is_tried_and_decided_on_by_every_format() -> None:
    """A new patching mode needs a case here: it is refused unless a format lists it."""
    assert {settings.mode for settings in PATCHING.values()} == set(get_args(ModeName))
    for name, format in FORMATS.items():
        refused_modes = {mode for mode, refusing in REFUSED if refusing == name and mode != "entropy"}
        assert format.modes is None or set(format.modes) == set(get_args(ModeName)) - refused_modes


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", PATCHING)
def test_each_mode_to_each_format(mode: str, format: str, blt: BLT, tmp_path: Path) -> None:
    config = blt.config.model_copy(update={"patching": PATCHING[mode]})
    BLT(blt.model, config, None).save_pretrained(tmp_path / "a")
    stored = open_pretrained(tmp_path / "a")
    if message := REFUSED.get((mode, format)):
        refused(lambda: convert(stored, tmp_path / "b", format), message)
        assert not (tmp_path / "b").exists()
    else:
        convert(stored, tmp_path / "b", format)
        assert open_pretrained(tmp_path / "b").config.patching == PATCHING[mode]


def test_a_byte_lm_to_each_format(tmp_path: Path) -> None:
    byte_lm = tiny_byte_lm(window=6)
    (tmp_path / "a").mkdir()
    save(tmp_path / "a", byte_lm, Config(model=byte_lm.settings, context=9))
    stored = open_pretrained(tmp_path / "a")
    refused(lambda: convert(stored, tmp_path / "hf", "hf"), "transformers has no class for a byte LM alone")
    for format in ("native", "meta"):
        convert(stored, tmp_path / format, format)
        assert open_pretrained(tmp_path / format).config.model == byte_lm.settings
        assert "A byte LM: the entropy model" in (tmp_path / format / "README.md").read_text()


@pytest.mark.parametrize("format", FORMATS)
def test_a_blt_without_patching_settings(format: str, blt: BLT, tmp_path: Path) -> None:
    """No format could be read again."""
    config = blt.config.model_copy(update={"patching": None})
    stored = StoredModel.of(blt.model, config)
    refused(lambda: write_model(stored, tmp_path / "a", format), "has no patching settings")


def test_the_byte_lm_is_named(blt: BLT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """By its own folder, or that of a BLT; others are refused."""
    lonely = BLT(blt.model, blt.config, None)
    lonely.save_pretrained(tmp_path / "lonely")
    blt.save_pretrained(tmp_path / "whole")
    for entropy in ("whole", "whole/byte_lm"):
        target = tmp_path / "out" / entropy
        names = ["--to", "hf", "--entropy-model", str(tmp_path / entropy)]
        command = ["convert", str(tmp_path / "lonely"), str(target), *names]
        assert CliRunner().invoke(app, command).exit_code == 0
        assert BLT.from_pretrained(target, device="cpu").logits(IDS).equal(blt.logits(IDS))
    for entropy, message in (
        (tmp_path / "lonely", "holds a BLT without a byte LM; name the byte LM's own run or folder"),
        (tmp_path / "absent", "is not a folder"),
        (tmp_path, "holds no model"),
    ):
        arguments = (tmp_path / "lonely", tmp_path / "b", "--to", "hf", "--entropy-model", entropy)
        assert message in refused_by_the_command(monkeypatch, capsys, *arguments)


def test_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "."):
        refused(lambda name=name: open_pretrained(tmp_path / name), "holds no model: neither settings.yaml")


def test_the_help_and_the_docs_name_every_format() -> None:
    shown = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "200"}).output
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    for name in FORMATS:
        assert re.search(rf"\b{name}\b", shown), name
        assert f"`{name}`" in page or f"--to {name}" in page, name
