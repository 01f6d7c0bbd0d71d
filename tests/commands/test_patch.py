"""`blt patch`: which patching settings are shown, of a BLT, of a byte LM, of neither."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app
from bytelatent.commands.patch import PatchingModes
from bytelatent.data import Patcher, patches_of
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.weights import Config, save
from tests.model.tiny import tiny_blt, tiny_byte_lm

TEXT = "Daenerys Targaryen is in Game of Thrones, an epic. " * 3
CASE = Path(__file__).parents[1] / "patching" / "tok_wordpiece.json"


def blt_of(folder: Path, patching: PatchSettings, context: int = 40) -> Path:
    model = tiny_blt()
    BLT(model, Config(model=model.settings, context=context, patching=patching), tiny_byte_lm()).save_pretrained(folder)
    return folder


@pytest.fixture
def byte_lm(tmp_path: Path) -> Path:
    model = tiny_byte_lm()
    (tmp_path / "lm").mkdir()
    save(tmp_path / "lm", model, Config(model=model.settings, context=40))
    return tmp_path / "lm"


def run(*arguments: object, given: str = TEXT) -> tuple[dict[str, list[dict[str, object]]], str]:
    """The patches as JSON, and what is said beside them."""
    result = CliRunner().invoke(app, ["patch", given, "--json", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), result.stderr


def begins(patches: list[dict[str, object]]) -> list[object]:
    return [patch["start"] for patch in patches]


def test_a_byte_lm_shows_its_patches(byte_lm: Path) -> None:
    found, said = run("-m", byte_lm)
    assert list(found) == ["entropy"]
    mean = len(TEXT) / len(found["entropy"])
    assert mean == pytest.approx(4.5, rel=0.1)
    assert f"'{byte_lm}' is a byte LM, which has no threshold: " in said
    assert "nats gives patches of about 4.5 bytes on this text; another one: --threshold " in said
    assert len(said.splitlines()) == 1
    given, said = run("-m", byte_lm, "--mode", "entropy:5.2")
    expected = patches_of(TEXT.encode(), Patcher(PatchSettings(threshold=5.2), tiny_byte_lm()))
    assert begins(given["entropy:5.2"]) == [patch.start for patch in expected]
    assert said == ""


@pytest.mark.parametrize("text", ["h", "hi", "é", "aaaa", "hello"])
def test_a_byte_lm_on_short_texts(byte_lm: Path, text: str) -> None:
    patches = run("-m", byte_lm, given=text)[0]["entropy"]
    assert begins(patches)[0] == 0
    assert patches[-1]["end"] == len(text.encode())


def test_a_byte_lm_on_no_text(byte_lm: Path) -> None:
    result = CliRunner().invoke(app, ["patch", "-m", str(byte_lm), "--json"], input=b"", catch_exceptions=False)
    assert json.loads(result.stdout) == {"entropy": []}


@pytest.mark.parametrize(
    ("patching", "name"),
    [(PatchSettings(mode="space"), "space"), (PatchSettings(mode="static", patch_size=3), "static:3")],
)
def test_a_model_of_another_mode_is_named(patching: PatchSettings, name: str, tmp_path: Path) -> None:
    model = blt_of(tmp_path / "m", patching)
    found, said = run("-m", model, "--mode", "entropy,byte")
    assert list(found) == [name, "byte"]
    assert f"'{model}' finds its patches by '{name}', which is shown in place of 'entropy'" in said
    assert begins(found[name]) == [patch.start for patch in BLT.from_pretrained(model).patch(TEXT)]
    found, said = run("-m", model)
    assert list(found) == [name]
    assert "in place of" not in said


def test_context(tmp_path: Path) -> None:
    model = blt_of(tmp_path / "m", PatchSettings(threshold=5.12))
    blt = BLT.from_pretrained(model)
    for context in (None, 40):
        arguments = [] if context is None else ["--context", context]
        found, _ = run("-m", model, *arguments)
        assert begins(found["entropy"]) == [patch.start for patch in blt.patch(TEXT, context)]
    with pytest.raises(UserError, match="context: 0 is too small"):
        PatchingModes(str(model), 0)


def test_a_model_without_a_byte_lm(tmp_path: Path) -> None:
    model = tiny_blt()
    config = Config(model=model.settings, context=40, patching=PatchSettings(mode="space"))
    BLT(model, config, None).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="has no byte LM, which finds patches by entropy; name one: --model"):
        PatchingModes(str(tmp_path / "m")).patched(["entropy:1.3"], TEXT)


@pytest.mark.parametrize(
    "model",
    [
        models.WordPiece({"a": 0}, unk_token="?"),
        models.WordLevel({"a": 0}, unk_token="?"),
        models.Unigram([("a", 0.0)], None, False),
    ],
)
def test_a_tokenizer_that_cannot_split_a_text_is_one_line(model: models.Model, tmp_path: Path) -> None:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.save(str(tmp_path / "t.json"))
    for path in (tmp_path / "t.json", CASE):
        with pytest.raises(UserError) as error:
            PatchingModes("absent").patched([f"bpe:{path}"], "hello")
        assert str(error.value).startswith(
            f"patching.tokenizer: '{path}' cannot split this text; take the file of a byte-level BPE: "
        )
        assert "\n" not in str(error.value)


def test_only_a_level_is_a_threshold_to_draw(byte_lm: Path) -> None:
    """In mode monotonic the rise of the entropy is compared, and no level."""
    modes = PatchingModes(str(byte_lm))
    found = modes.patched(["monotonic:0.5", "entropy:5.2", "space"], TEXT)
    assert (list(found), modes.thresholds) == (["monotonic:0.5", "entropy:5.2", "space"], {"entropy:5.2": 5.2})
