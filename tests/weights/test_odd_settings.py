"""JSON of the wrong kind at any place of any format: the model is read, or refused in one line."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bytelatent import BLT
from bytelatent.commands.info import describe
from bytelatent.commands.options import InfoSettings
from bytelatent.errors import UserError
from bytelatent.model.settings import CrossAttentionSettings, StackSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights import Config, open_pretrained
from bytelatent.weights import stored_model as stored
from tests.model.tiny import tiny_blt, tiny_byte_lm
from tests.weights.published import write_published
from tests.weights.test_side_files import edit

GONE = object()
ODD: list[Any] = [
    GONE, None, True, False, -1, 0, 1, 2.5, 10**12, 10**30, float("nan"), float("inf"), "", "3", "x",
    "\x1b[31m\n" * 500, [], [1], [[["a"]]], {}, {"a": 1},
]  # fmt: skip
ALL = {
    "native": ["config.json", "byte_lm/config.json"],
    "hf": ["config.json", "bytelatent.json", "bytelatent.byte_lm.json"],
    "meta": ["config.json", "train_args.json", "bytelatent.json", "blt-entropy/config.json"],
}


def places(values: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield above
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield from places(value, (*above, key))


def changed(values: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return {} if value is GONE else value
    copy = inner = json.loads(json.dumps(values))
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy


@pytest.mark.parametrize("format", ALL)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_value_anywhere(format: str, data: st.DataObject, models: Path) -> None:
    file = models / format / data.draw(st.sampled_from(ALL[format]))
    text = file.read_text()
    values = json.loads(text)
    place, odd = data.draw(st.sampled_from(list(places(values)))), data.draw(st.sampled_from(ODD))
    line = ""
    try:
        file.write_text(json.dumps(changed(values, place, odd)))
        found = open_pretrained(models / format)
        assert found.in_a_line().isprintable()
        describe(InfoSettings(model=str(models / format), context=100)).show(Console(quiet=True))
        blt = BLT.from_pretrained(models / format, device="cpu")
        blt.logits(torch.tensor([[1, 70, 80, 90]]))
        blt.bits_per_byte("abc")
    except UserError as error:
        line = str(error)
    finally:
        file.write_text(text)
    assert line.isprintable()
    assert len(line) < 2000


@pytest.mark.parametrize("format", ["hf", "meta"])
def test_a_side_file_of_a_model_that_the_format_cannot_hold(format: str, models: Path) -> None:
    """It is another model's, so it counts for nothing."""
    file = models / format / "bytelatent.json"
    text = file.read_text()
    try:
        file.unlink()
        without = open_pretrained(models / format).config
        file.write_text(json.dumps(changed(json.loads(text), ("model", "cross_attention"), None)))
        assert open_pretrained(models / format).config == without
    finally:
        file.write_text(text)


@pytest.fixture(scope="module")
def models() -> Iterator[Path]:
    """One in each format; shared, so that each example only writes a file of settings."""
    model = tiny_blt(seed=3, window=6, cross_attention=CrossAttentionSettings(k=2, num_heads=2))
    config = Config(model=model.settings, context=64, patching=PatchSettings(threshold=5.12))
    with tempfile.TemporaryDirectory() as folder:
        for format in ALL:
            BLT(model, config, tiny_byte_lm(window=6)).save_pretrained(Path(folder) / format, format=format)
        yield Path(folder)


@pytest.mark.parametrize(
    ("format", "key", "value", "message"),
    [
        (
            "hf",
            "encoder_config.hidden_size",
            "16",
            r"encoder_config.hidden_size is '16'; it should be a number above 0",
        ),
        ("hf", "global_config.num_attention_heads", 0, r"num_attention_heads is 0; it should be a number above 0"),
        ("hf", "decoder_config.intermediate_size", 1.5, r"decoder_config.intermediate_size is 1.5; it should be"),
        ("hf", "encoder_config.num_hidden_layers", True, r"num_hidden_layers is True; it should be a number"),
        ("hf", "patcher_config", [1], r"patcher_config is \[1\]; it should be a mapping of keys to values"),
        (
            "hf",
            "encoder_config.rope_parameters",
            "x",
            r"encoder_config.rope_parameters is 'x'; it should be a mapping",
        ),
        (
            "hf",
            "global_config.num_hidden_layers",
            10**9,
            "config.json: global_config: num_layers: Input should be less than or equal to 1000, not 1000000000",
        ),
        ("hf", "encoder_hash_byte_group_vocab", 10**18, "vocab_size: Input should be less than or equal to 2147483648"),
        (
            "hf",
            "max_position_embeddings",
            0,
            "max_position_embeddings is 0; it should be a number from 1 to 16,7",
        ),
        ("hf", "patcher_config.max_position_embeddings", 10**9, "patcher_config.max_position_embeddings is 1000000000"),
        ("meta", "args", [], r"args is \[\]; it should be a mapping of keys to values"),
        (
            "meta",
            "args.n_layers_global",
            10**9,
            "global_transformer.num_layers: Input should be less than",
        ),
        ("meta", "args.n_heads_local_decoder", 5, "decoder: dim 16 must be num_heads 5 times an even head size"),
        ("meta", "args.rope_theta", float("inf"), "rope_theta: Input should be a finite number, not inf"),
        ("meta", "args.dim_global", "x", "dim: Input should be a valid integer, .*, not 'x'"),
        ("meta", "args.encoder_hash_byte_group_size", [3, 10**12], "n-gram sizes must be from 1 to 1024"),
        ("hf", "max_patch_length", 10**30, "max_patch_length: Input should be less than or equal to 2147483648"),
        ("native", "version", 2, "config.json: version: Input should be 1, not 2"),
        (
            "native",
            "model.encoder.num_layers",
            9_999,
            "json: model: encoder.num_layers: .* less than or equal to",
        ),
        (
            "native",
            "model.encoder.dim",
            10**9,
            "json: model: encoder.dim: Input should be less than",
        ),
        ("native", "model.global_transformer.num_heads", 5, "model: global_transformer: dim 24 must be num_heads 5"),
        ("native", "model.global_transformer.num_layers", "x", "model: global_transformer.num_layers: .*, not 'x'"),
        ("native", "model.global_transformer.layers", 3, "model: global_transformer.layers: unknown key"),
        ("native", "model.kind", "byte", "model: kind: Input should be 'blt', not 'byte'"),
        ("native", "context", 0, "config.json: context: Input should be greater than or equal to 1, not 0"),
        ("native", "context", -1, "config.json: context: Input should be greater than or equal to 1, not -1"),
        ("native", "context", 10**9, "config.json: context: Input should be less than or equal to 16777216"),
    ],
)
def test_named(format: str, key: str, value: Any, message: str, blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a", format=format)
    *above, last = key.split(".")

    def change(values: dict[str, Any]) -> None:
        for part in above:
            values = values[part]
        values[last] = value

    edit(tmp_path / "a" / "config.json", change)
    for weights in (True, False):
        with pytest.raises(UserError, match=message):
            open_pretrained(tmp_path / "a", weights=weights).in_a_line()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("data",), 7, "train_args.json': data is 7; it should be a mapping"),
        (("data", "patcher_args"), None, "patcher_args is None; it should be a mapping"),
        (("data", "patcher_args", "patch_size"), 4.5, "patch_size: .*, not 4.5"),
        (("data", "patcher_args", "patch_size"), "x", "patch_size: .*, not 'x'"),
        (("data",), GONE, "train_args.json' lacks the key 'data'"),
    ],
)
def test_odd_patching_arguments(place: tuple[str, ...], value: Any, message: str, blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a", format="meta")
    edit(tmp_path / "a" / "train_args.json", lambda v: v["data"]["patcher_args"].update(patching_mode="static"))
    file = tmp_path / "a" / "train_args.json"
    file.write_text(json.dumps(changed(json.loads(file.read_text()), place, value)))
    with pytest.raises(UserError, match=message):
        open_pretrained(tmp_path / "a")


@pytest.mark.parametrize("text", ["[]", "7", '"blt"', "null", "", "{", "\x00"])
@pytest.mark.parametrize("file", ["config.json", "params.json"])
def test_files_that_are_no_objects(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=f"{file}' (holds no JSON object|is not valid JSON)"):
        open_pretrained(tmp_path)


def test_paths_with_brackets_are_no_markup(blt: BLT, tmp_path: Path) -> None:
    """Neither on the page of `blt info` nor in the line of `blt convert`."""
    folder = tmp_path / "[red" / "]x[" / "bold]"
    blt.save_pretrained(folder)
    console = Console(record=True, width=60)
    describe(InfoSettings(model=str(folder), context=100)).show(console)
    assert str(folder) in console.export_text()


def test_bounds_leave_room_for_every_model() -> None:
    assert StackSettings(dim=8, num_layers=1, num_heads=1, window=2**31).window == 2**31


def test_more_layers_than_the_file_has_tensors(blt: BLT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a model of so many layers is made, if only to list what is missing."""
    folders = {format: tmp_path / format for format in ALL}
    keys = {"native": ("model", "encoder", "num_layers"), "hf": ("encoder_config", "num_hidden_layers")}
    keys |= {"meta": ("args", "n_layers_local_encoder")}
    for format, folder in folders.items():
        blt.save_pretrained(folder, format=format)
    monkeypatch.setattr(stored, "build_model", lambda settings: pytest.fail("a model is made"))
    for format, folder in folders.items():
        file = folder / "config.json"
        file.write_text(json.dumps(changed(json.loads(file.read_text()), keys[format], 999)))
        with pytest.raises(UserError, match=r"the settings say 1,00\d layers, but its weights are \d+ tensors"):
            open_pretrained(folder)


@pytest.mark.parametrize("format", ALL)
def test_a_byte_order_mark_is_not_text(format: str, blt: BLT, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a", format=format)
    before = open_pretrained(tmp_path / "a").config
    marked = [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.md")]
    for file in marked:
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(marked) > 3
    assert open_pretrained(tmp_path / "a").config == before
    assert BLT.from_pretrained(tmp_path / "a", device="cpu").entropy_model is not None


def test_a_byte_order_mark_in_the_older_format(goldens: Path, tmp_path: Path) -> None:
    folder = write_published(goldens / "blt_k2", tmp_path / "a", "older")
    (folder / "params.json").write_bytes(b"\xef\xbb\xbf" + (folder / "params.json").read_bytes())
    assert open_pretrained(folder).tensors
