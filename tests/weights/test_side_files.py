"""Licences, the card, `bytelatent.json`, and the tokenizer beside weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.patching import Calibration
from bytelatent.text.tokenizer import byte_letters
from bytelatent.weights import FORMATS, Origin, convert, open_pretrained
from bytelatent.weights.side_files import legal_files, stated_licence, write_tokenizer
from bytelatent.weights.stored_model import Config
from tests.model.tiny import tiny_blt_settings, tiny_byte_lm

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n# A\n", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("\ufeff---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: other\nlicense_name: fair-research\nlicense_link: LICENSE\n---\n", "fair-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlicense:\n- mit\n- apache-2.0\n---\n", "mit, apache-2.0"),
        ("---\nlicense: 'a\n\n  b'\n---\n", "a b"),
        ('---\nlicense: "\\e[31mred"\n---\n', " [31mred"),
        ("---\nlicense: ''\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\nlicense: 7\n---\n", None),
        ("---\nlicense: [1, 2]\n---\n", None),
        ("---\ndate: 2024-99-99\nlicense: mit\n---\n", None),
        ("---\n[: bad\n---\n", None),
        ("---\n- license\n---\n", None),
        (f"---\n{BOMB}license: *j\n---\n", None),
        ("---\nlicense: " + "[" * 5000 + "\n---\n", None),
        ("---\n", None),
        ("", None),
        ("# license: mit\n", None),
    ],
)
def test_the_licence_on_a_card(card: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert stated_licence(tmp_path) == licence
    (tmp_path / "LICENSE.txt").write_text("the text")
    assert stated_licence(tmp_path) == (licence or "see LICENSE.txt")


def test_cards_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\nauthor: \xff\xfe\n---\n\xff")
    assert stated_licence(tmp_path) == "mit"
    (tmp_path / "README.md").unlink()
    assert stated_licence(tmp_path) is None
    (tmp_path / "README.md").mkdir()
    assert stated_licence(tmp_path) is None


def test_legal_files(tmp_path: Path) -> None:
    names = {"LICENSE", "LICENCE.txt", "USE_POLICY.md", "NOTICE", "README.md", "config.json"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "LICENSES").mkdir()
    for name in names:
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "a" / "LICENSE.gone").symlink_to("nowhere")
    found = {file.name: file.read_text() for file in legal_files(tmp_path / "a")}
    assert found == {name: name for name in names - {"README.md", "config.json"}}


def head_of(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("format", FORMATS)
def test_the_card_of_what_we_write(format: str, blt: BLT, tmp_path: Path) -> None:
    origin = Origin(training_text=["a.jsonl"], training_bytes=1234567, validation_text=["b"], bits_per_byte=1.5)
    measured = Calibration(
        threshold=5.12, wanted_patch_bytes=4, mean_patch_bytes=4.1, window=6, data="held-out", data_bytes=10
    )
    blt.config = blt.config.model_copy(update={"origin": origin, "calibration": measured})
    blt.save_pretrained(tmp_path / "my-model", format=format, licence="apache-2.0")
    text = (tmp_path / "my-model" / "README.md").read_text()
    head = head_of(tmp_path / "my-model")
    assert head["license"] == "apache-2.0"
    assert head["library_name"] == ("transformers" if format == "hf" else "bytelatent")
    for line in (
        "# my-model",
        "| training text | a.jsonl; 1,234,567 bytes read |",
        "| bits per byte | 1.5000 on b |",
        "| mean patch | 4.10 bytes on held-out |",
        "| licence | apache-2.0 |",
        "| patches | entropy, threshold 5.12 nats |",
        f"| parameters | {sum(weight.numel() for weight in blt.model.parameters()):,} |",
    ):
        assert line in text.splitlines()
    assert ("BltForCausalLM.from_pretrained('my-model')" in text) == (format == "hf")
    assert "BLT.from_pretrained('my-model')" in text
    assert open_pretrained(tmp_path / "my-model").config.origin.licence == "apache-2.0"


@pytest.mark.parametrize(
    "licence", ["fair: research\n# yes", 'a "quoted" \u00e9 one', "mit, apache-2.0", "null", "- x"]
)
def test_any_licence_can_be_stated(licence: str, blt: BLT, tmp_path: Path) -> None:
    """It is the same when it is read from the card alone."""
    blt.save_pretrained(tmp_path / "a", licence=licence)
    said = " ".join(licence.split())
    assert head_of(tmp_path / "a") | {"license": "other", "license_name": said} == head_of(tmp_path / "a")
    assert stated_licence(tmp_path / "a") == said
    with pytest.raises(UserError, match="licence: it is empty"):
        blt.save_pretrained(tmp_path / "b", licence=" \n")


def test_a_licence_is_kept_and_can_be_changed(blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a")
    assert "not stated; state one before you publish the weights" in (tmp_path / "a" / "README.md").read_text()
    assert "license" not in head_of(tmp_path / "a")
    assert open_pretrained(tmp_path / "a").in_a_line().endswith("licence not stated")
    (tmp_path / "a" / "NOTICE").write_text("notice")
    (tmp_path / "a" / "LICENSE").write_text("licence")
    convert(open_pretrained(tmp_path / "a"), tmp_path / "b", "hf")
    assert head_of(tmp_path / "b")["license_name"] == "see LICENSE"
    convert(open_pretrained(tmp_path / "b"), tmp_path / "c", "meta", licence="mit")
    assert head_of(tmp_path / "c")["license"] == "mit"
    assert [(tmp_path / "c" / name).read_text() for name in ("NOTICE", "LICENSE")] == ["notice", "licence"]


def test_a_model_in_memory_takes_no_licence_from_the_folder_it_is_saved_from(
    blt: BLT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "LICENSE").write_text("of something else")
    blt.save_pretrained("out")
    assert not (tmp_path / "out" / "LICENSE").exists()


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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, context=123)
    return AutoTokenizer.from_pretrained(folder)


def test_letters_are_those_of_byte_level_vocabularies() -> None:
    theirs = bytes_to_unicode()
    assert byte_letters() == [theirs[byte] for byte in range(256)]


def test_vocabulary(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 260
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.convert_tokens_to_ids("<boe>") == 0
    assert tokenizer.model_max_length == 123


@given(text=st.text(max_size=40) | st.sampled_from(["<s>", "a </s><boe> b", "\r\n \x00", "e\u0301", "\ufeff", "  x  "]))
def test_ids_are_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids == [1, *(byte + 4 for byte in text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]
