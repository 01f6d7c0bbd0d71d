"""`BLT` as a module of torch: its parts, moving, freezing, saving, and models of random weights."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch

import bytelatent
from bytelatent import BLT, ByteLM
from bytelatent.errors import UserError
from bytelatent.inference import quantize
from bytelatent.model import preset
from bytelatent.patching import PatchSettings
from bytelatent.weights.stored_model import num_parameters
from tests.model.tiny import tiny_blt, tiny_blt_settings, tiny_byte_lm
from tests.test_blt import TEXTS, wrap


@pytest.fixture
def blt() -> BLT:
    return wrap(tiny_blt(window=6))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    wrap(tiny_blt(window=6)).save_pretrained(folder)
    return folder


def test_parameters_and_state(blt: BLT) -> None:
    assert isinstance(blt, torch.nn.Module)
    assert {name.split(".")[0] for name in blt.state_dict()} == {"model", "entropy_model"}
    assert blt.entropy_model is not None
    network, lm = (sum(p.numel() for p in part.parameters()) for part in (blt.model, blt.entropy_model))
    assert blt.num_parameters() == network + lm
    assert blt.num_parameters(only_trainable=True) == network
    other = BLT.from_config(blt.config, entropy_model=tiny_byte_lm(seed=9, window=6), device="cpu")
    ids = blt.encode(TEXTS)
    assert not other.logits(ids).equal(blt.logits(ids))
    assert str(other.load_state_dict(blt.state_dict())) == "<All keys matched successfully>"
    assert other.logits(ids).equal(blt.logits(ids))
    assert other.patch(TEXTS[3]) == blt.patch(TEXTS[3])


def test_the_entropy_model_stays_frozen(blt: BLT) -> None:
    assert not blt.training
    assert blt.train() is blt
    assert blt.training
    assert blt.model.encoder.training
    assert blt.entropy_model is not None
    assert not blt.entropy_model.training
    blt.requires_grad_(False)
    assert blt.num_parameters(only_trainable=True) == 0
    blt.requires_grad_(True)
    blt.entropy_model = tiny_byte_lm(seed=3)
    assert not any(weight.requires_grad for weight in blt.entropy_model.parameters())
    assert all(weight.requires_grad for weight in blt.model.parameters())
    assert not blt.eval().model.encoder.training
    blt.entropy_model = None
    assert blt.train().entropy_model is None
    assert {name.split(".")[0] for name, _ in blt.named_parameters()} == {"model"}


def test_moving(blt: BLT) -> None:
    blt.generate("a", max_new_bytes=2)
    assert blt._idle_engine is not None
    patches = blt.patch(TEXTS[3])
    assert blt.to(torch.bfloat16) is blt
    assert blt._idle_engine is None
    assert blt.dtype == torch.bfloat16
    assert {weight.dtype for weight in blt.model.parameters()} == {torch.bfloat16}
    assert blt.entropy_model is not None
    assert {weight.dtype for weight in blt.entropy_model.parameters()} == {torch.float32}
    assert blt.patch(TEXTS[3]) == patches
    blt.entropy_model.to(torch.bfloat16)
    assert blt.entropy_model.embedding.weight.dtype == torch.bfloat16
    blt.to("meta", torch.float32)
    assert blt.device == torch.device("meta")
    assert {(weight.device.type, weight.dtype) for weight in blt.model.parameters()} == {("meta", torch.float32)}
    assert {weight.device.type for weight in blt.entropy_model.parameters()} == {"meta"}


def test_no_conversion_changes_quantized_matrices() -> None:
    ours = wrap(quantize.quantize_model(tiny_blt(), "int8", as_bytes=True))
    full, before = wrap(tiny_blt()), ours.num_parameters()
    assert before == full.num_parameters()
    ours.to(torch.bfloat16)
    linear = ours.model.encoder.stack.blocks[0].attention.query
    assert isinstance(linear, quantize.QuantizedLinear)
    assert (linear.values.dtype, linear.scale.dtype) == (torch.int8, torch.float32)
    assert torch.isfinite(ours.logits("some text")).all()


def test_repr() -> None:
    blt = wrap(tiny_blt(window=6))
    lines = repr(blt).splitlines()
    assert lines[0] == "BLT("
    assert blt.entropy_model is not None
    sizes = [sum(weight.numel() for weight in part.parameters()) / 1e3 for part in (blt.model, blt.entropy_model)]
    assert lines[1] == f"  model: {sizes[0]:.3g} thousand parameters, float32 on cpu"
    assert re.fullmatch(r"    encoder: .*, 2 layers of width 16, window 6, n-gram tables of 1.7 thousand", lines[2])
    assert re.fullmatch(r"    global_transformer: .* thousand, 2 layers of width 24", lines[3])
    entropy_model = f"  entropy_model: {sizes[1]:.3g} thousand parameters, float32, frozen"
    assert lines[5] == f"{entropy_model}, 2 layers of width 16, window 6"
    assert lines[6:] == ["  patching: entropy, threshold 5.12 nats", "  context: 24 ids", ")"]
    blt.entropy_model = None
    assert "entropy_model" not in repr(blt)


def test_completion(blt: BLT) -> None:
    names = dir(blt)
    assert {"read", "states", "generate", "model", "entropy_model", "patching", "dtype"} <= set(names)
    assert not {"byte_lm", "ahead", "weights"} & set(names)
    assert {"BLT", "ByteLM"} <= set(dir(bytelatent))


def test_copies_share_nothing(blt: BLT) -> None:
    text = blt.generate("The", max_new_bytes=5)
    copied = copy.deepcopy(blt)
    buffer = io.BytesIO()
    torch.save(blt, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        blt.model.decoder.output.weight.neg_()
    assert copied.generate("The", max_new_bytes=5) == text == read.generate("The", max_new_bytes=5)
    assert copied.patching == blt.patching


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_torchs_objects_or_their_names(dtype: str, device: str, saved: Path) -> None:
    blt = BLT.from_pretrained(saved, device=device, dtype=dtype)
    assert (blt.dtype, blt.device) == (torch.bfloat16, torch.device("cpu"))
    assert not blt.training
    assert all(weight.requires_grad for weight in blt.model.parameters())
    lm = ByteLM.from_pretrained(saved, device=device, dtype=dtype)
    assert lm.embedding.weight.dtype == torch.bfloat16
    assert not lm.training
    assert ByteLM.from_pretrained(str(saved / "byte_lm")).embedding.weight.dtype == torch.float32
    assert all(weight.requires_grad for weight in lm.parameters())


def test_random_weights(saved: Path) -> None:
    torch.manual_seed(5)
    first = BLT.from_config(tiny_blt_settings(), device="cpu", context=32)
    torch.manual_seed(5)
    second = BLT.from_config(tiny_blt_settings(), device="cpu", dtype=torch.bfloat16)
    assert (first.context, second.context, first.patching.mode) == (32, 8192, "space")
    assert second.dtype == torch.bfloat16
    assert first.model.encoder.embedding.weight.bfloat16().equal(second.model.encoder.embedding.weight)
    patching = PatchSettings(threshold=5.0)
    with_lm = BLT.from_config("demo-blt", patching, entropy_model=saved, device="cpu")
    assert with_lm.model.settings == preset("demo-blt")
    assert f"model: {num_parameters(preset('demo-blt')) / 1e6:.3g} million parameters" in repr(with_lm)
    assert with_lm.patch("some text")[0].entropies
    for call, message in (
        (lambda: BLT.from_config("demo-blt", patching), "^entropy_model: patches by entropy.* need one; name"),
        (lambda: BLT.from_config("demo-bl"), "^model: no preset 'demo-bl'.* did you mean"),
        (lambda: BLT.from_config("demo-byte-lm"), "^config: 'demo-byte-lm' is a byte LM; name a preset of a BLT"),
        (lambda: BLT.from_config(7), "^config: 7; name a preset of a BLT"),  # type: ignore
        (lambda: BLT.from_config("demo-blt", "space"), "^patching: it takes a PatchSettings, not str"),  # type: ignore
        (lambda: BLT.from_config("demo-blt", dtype="int4"), "^dtype: 'int4' is not known"),
        (lambda: BLT.from_config("demo-blt", context=0), "^context: 0 is not a number"),
        (lambda: ByteLM.from_pretrained("absent"), "'absent' is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_what_cannot_be_loaded_is_not_written(blt: BLT, saved: Path, tmp_path: Path) -> None:
    blt.save_pretrained(tmp_path / "a")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    assert blt.entropy_model is not None
    for part, name in (
        (blt.model.decoder.output, "weights: decoder.output.weight"),
        (blt.entropy_model.norm, "entropy_model: norm.weight"),
    ):
        value = part.weight.detach().flatten()[0].item()
        for wrong in (torch.nan, torch.inf):
            part.weight.data.view(-1)[0] = wrong
            with pytest.raises(UserError, match=f"^{name} holds NaN or infinite values"):
                blt.save_pretrained(tmp_path / "a")
        part.weight.data.view(-1)[0] = value
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="'onnx' is unknown"):
        blt.save_pretrained(tmp_path / "a", format="onnx")
    blt.save_pretrained(tmp_path / "a")


def test_weights_of_an_entropy_model_are_not_dropped(blt: BLT) -> None:
    assert blt.entropy_model is not None
    other = BLT.from_config(blt.config, PatchSettings(mode="space"))
    with pytest.raises(RuntimeError, match=r"Unexpected key.* \"entropy_model\."):
        other.load_state_dict(blt.state_dict())
    found = other.load_state_dict(blt.state_dict(), strict=False)
    assert found.unexpected_keys == [f"entropy_model.{name}" for name in blt.entropy_model.state_dict()]
    assert blt.load_state_dict(blt.state_dict()).unexpected_keys == []
