"""Meta's hub format: settings, patching, broken folders. tests/model checks the logits."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bytelatent.errors import UserError
from bytelatent.model import BLTModel, BLTSettings, ByteLMSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights import load


@pytest.fixture
def copy(goldens: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(goldens / "blt_k4_proj", tmp_path / "copy"))


def edit(file: Path, *keys: str, **changes: object) -> None:
    """Change what stands under `keys`; None takes a key away."""
    values = inner = json.loads(file.read_text())
    for key in keys:
        inner = inner[key]
    for key, value in changes.items():
        inner.pop(key, None)
        if value is not None:
            inner[key] = value
    file.write_text(json.dumps(values))


def test_settings(goldens: Path) -> None:
    """Read off the golden `config.json` by eye."""
    found = load(goldens / "blt_k4_proj")
    shape = found.config.model
    assert isinstance(shape, BLTSettings)
    for stack, num_layers in ((shape.encoder, 1), (shape.decoder, 2)):
        assert (stack.dim, stack.num_layers, stack.num_heads, stack.window) == (32, num_layers, 4, 512)
    assert (shape.global_transformer.dim, shape.global_transformer.num_heads) == (96, 6)
    assert shape.global_transformer.window is None
    assert (shape.cross_attention.k, shape.cross_attention.num_heads) == (4, 4)
    assert (shape.cross_attention.all_layers_encoder, shape.cross_attention.all_layers_decoder) == (False, True)
    assert shape.ngram_hash is not None
    assert shape.ngram_hash.sizes == [3, 4, 5, 6, 7, 8]
    assert not shape.ngram_hash.stop_at_document
    assert found.config.patching == PatchSettings(mode="entropy", threshold=1.335442066192627)
    assert found.byte_lm is None
    byte_lm = load(goldens / "entropy").config.model
    assert isinstance(byte_lm, ByteLMSettings)
    assert (byte_lm.dim, byte_lm.num_layers, byte_lm.num_heads, byte_lm.window) == (48, 3, 4, 512)
    assert byte_lm.rope_theta == 10_000


def test_hash_tables_stand_in_order(goldens: Path) -> None:
    published = load_file(goldens / "blt_k4_proj" / "model.safetensors")
    model = load(goldens / "blt_k4_proj").model
    assert isinstance(model, BLTModel)
    tables = model.state_dict()["encoder.ngram_hash.tables.weight"].split(1009)
    assert len(tables) == 6
    assert all(t.equal(published[f"encoder_hash_tok_embedding.{i}.weight"]) for i, t in enumerate(tables))


def test_patching_without_train_args(copy: Path) -> None:
    """`config.json` alone does not know the threshold here."""
    (copy / "train_args.json").unlink()
    with pytest.raises(UserError, match="needs a threshold"):
        load(copy)
    edit(copy / "config.json", "args", patching_threshold=0.7)
    assert load(copy).config.patching == PatchSettings(mode="entropy", threshold=0.7)


@pytest.mark.parametrize(
    ("patcher", "patching"),
    [
        ({"threshold": 0.5, "monotonicity": True}, {"mode": "entropy", "threshold": 0.5, "monotonicity": True}),
        ({"threshold_add": 0.2}, {"mode": "entropy", "threshold": 1.335442066192627, "threshold_add": 0.2}),
        ({"max_patch_length": 9}, {"mode": "entropy", "threshold": 1.335442066192627, "max_patch_length": 9}),
        ({"patching_mode": "space"}, {"mode": "space"}),
        ({"patching_mode": "static", "patch_size": 6.0}, {"mode": "static", "patch_size": 6}),
        ({"patching_mode": "byte"}, {"mode": "byte"}),
    ],
)
def test_patching(patcher: dict[str, object], patching: dict[str, object], copy: Path) -> None:
    edit(copy / "train_args.json", "data", "patcher_args", **patcher)
    assert load(copy).config.patching == PatchSettings(**patching)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "keys", "changes", "message"),
    [
        ("config.json", ["args"], {"dim_global": None}, "lack the key 'dim_global'"),
        ("train_args.json", ["data"], {"patcher_args": None}, "train_args.json' lacks the key 'patcher_args'"),
        ("config.json", ["args"], {"dim_global": 72}, r"\[96, 128\] where the settings say \[72, 128\]"),
        ("config.json", ["args"], {"dim_global": 64}, "dim 64 must be num_heads 6 times an even head size"),
        ("config.json", ["args"], {"n_layers_global": "two"}, "num_layers: Input should be a valid integer"),
        ("config.json", ["args"], {"cross_attn_k": 2}, "do not fit the settings"),
        ("config.json", ["args"], {"n_layers_global": 3}, r"missing global_transformer.layers.2"),
        ("config.json", ["args"], {"n_layers_global": 1}, r"unknown global_transformer.layers.1"),
    ],
)
def test_broken_folder(file: str, keys: list[str], changes: dict[str, object], message: str, copy: Path) -> None:
    edit(copy / file, *keys, **changes)
    with pytest.raises(UserError, match=message) as caught:
        load(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
