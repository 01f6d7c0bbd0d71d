"""What `save_pretrained` writes: what is used, only what is true, and nothing that cannot be loaded."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.model import BLTModel, ByteLM
from bytelatent.model.settings import CrossAttentionSettings
from bytelatent.patching import Calibration, PatchSettings
from bytelatent.weights import Config, Origin
from bytelatent.weights.stored_model import checksum
from tests.model.tiny import tiny_blt, tiny_byte_lm

TEXT = "a text longer than what the model sees at once"
ORIGIN = Origin(
    licence="apache-2.0",
    converted_from="somewhere (a format)",
    training_text=["stories.jsonl"],
    training_bytes=12_345,
    validation_text=["held-out.jsonl"],
    bits_per_byte=1.2345,
)
CALIBRATION = Calibration(threshold=5.12, wanted_patch_bytes=4.5, mean_patch_bytes=4.4, data="sample.jsonl")


def tiny(seed: int = 0, window: int = 6) -> BLTModel:
    """One that every format has room for."""
    cross = CrossAttentionSettings(k=2, num_heads=2)
    return tiny_blt(seed, window=window, stop_at_document=False, cross_attention=cross)


def blt(byte_lm: ByteLM | None = None, **changes: Any) -> BLT:
    model = tiny(window=6)
    patching = PatchSettings(threshold=5.12)
    values = {"context": 24, "patching": patching, "origin": ORIGIN, "calibration": CALIBRATION} | changes
    return BLT(model, Config(model=model.settings, **values), byte_lm or tiny_byte_lm(window=6))


def again(model: BLT, folder: Path) -> BLT:
    model.save_pretrained(folder)
    return BLT.from_pretrained(folder, device="cpu")


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


class Adapted(nn.Module):
    """A layer with an adapter, named as PEFT names them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.ModuleDict({"default": nn.Linear(linear.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, linear.out_features, bias=False)})

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def adapt(model: nn.Module) -> None:
    """Replace all of its queries in place, as `get_peft_model` does."""
    torch.manual_seed(5)
    for name, part in list(model.named_modules()):
        if name.endswith("query") and isinstance(part, nn.Linear):
            model.set_submodule(name, Adapted(part))


@pytest.mark.parametrize("format", ["native", "hf", "meta"])
@pytest.mark.parametrize("which", ["model", "byte_lm"])
def test_adapters_are_refused_and_the_folder_stays(format: str, which: str, tmp_path: Path) -> None:
    model = blt()
    model.save_pretrained(tmp_path / "a", format=format)
    before = contents(tmp_path / "a")
    adapt(getattr(model, which))
    with pytest.raises(UserError, match=r"tensors do not fit the settings: missing .*query.*; merge the adapters") as e:
        model.save_pretrained(tmp_path / "a", format=format)
    assert "\n" not in str(e.value)
    assert contents(tmp_path / "a") == before
    assert [place.name for place in tmp_path.iterdir()] == ["a"]


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    model = blt()
    model.model.decoder.output.weight = nn.Parameter(torch.zeros(300, 16))
    with pytest.raises(UserError, match=r"decoder.output.weight is \[300, 16\] where the settings say \[260, 16\]"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_fails_while_it_is_written_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = blt()
    model.save_pretrained(tmp_path / "a")
    before = contents(tmp_path / "a")

    def fail(*_: object) -> None:
        raise RuntimeError("a fault")

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["bytelatent.weights.pretrained"], "write_card", fail)
        with pytest.raises(RuntimeError, match="a fault"):
            model.save_pretrained(tmp_path / "a")
    assert contents(tmp_path / "a") == before
    assert [place.name for place in tmp_path.iterdir()] == ["a"]


def test_adapters_take_part_in_generation() -> None:
    """The fast step reads matrices; what a replaced layer computes it would not know."""
    model = blt()
    settings: dict[str, Any] = {"max_new_bytes": 12, "temperature": 0}
    plain = model.generate("The", **settings)
    adapt(model.model)
    ids = [1, *(byte + 4 for byte in b"The")]
    for _ in range(12):
        last = model.logits(torch.tensor([ids]))[0, -1]
        last[[0, 1, 3]] = -torch.inf
        ids.append(int(last.argmax()))
        if ids[-1] == 2:
            break
    expected = bytes(i - 4 for i in ids[4:] if i > 3).decode(errors="replace")
    assert model.generate("The", **settings) == expected != plain


def changed_threshold(model: BLT) -> None:
    model.patching = PatchSettings(threshold=5.3)


def changed_mode(model: BLT) -> None:
    model.patching = PatchSettings(mode="static", patch_size=3)


def changed_context(model: BLT) -> None:
    model.context = 7


def changed_byte_lm(model: BLT) -> None:
    model.entropy_model = tiny_byte_lm(seed=3, window=5)


def changed_model(model: BLT) -> None:
    model.model = tiny(seed=4, window=9)


def changed_config(model: BLT) -> None:
    model.config = model.config.model_copy(update={"context": 11, "patching": PatchSettings(mode="space")})


CHANGES = [changed_threshold, changed_mode, changed_context, changed_byte_lm, changed_model, changed_config]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_used_is_what_is_saved(change: Callable[[BLT], None], tmp_path: Path) -> None:
    model, ids = blt(), torch.tensor([[1, *(byte + 4 for byte in TEXT.encode())]])
    before = (model.patch(TEXT), model.logits(ids), model.bits_per_byte(TEXT), model.generate("The", 20))
    change(model)
    ours = (model.patch(TEXT), model.logits(ids), model.bits_per_byte(TEXT), model.generate("The", 20))
    assert not before[1].equal(ours[1]) or before[2] != ours[2]
    saved = again(model, tmp_path / "a")
    assert (saved.patching, saved.context, saved.model.settings) == (
        model.patching,
        model.context,
        model.model.settings,
    )
    assert saved.patch(TEXT) == ours[0]
    assert saved.logits(ids).equal(ours[1])
    assert saved.bits_per_byte(TEXT) == ours[2]
    assert saved.generate("The", 20) == ours[3]


@pytest.mark.parametrize("change", CHANGES)
def test_patches_are_the_same_everywhere(change: Callable[[BLT], None]) -> None:
    """`patch`, `logits`, `score` and `generate` after a change are those of a model that is made so."""
    model = blt()
    model.generate("The", 3)  # its engine may be reused
    change(model)
    made = BLT(model.model, model.config, model.entropy_model)
    assert model.patch(TEXT) == made.patch(TEXT)
    assert model.logits(TEXT).equal(made.logits(TEXT))
    assert model.score("The", [TEXT]) == made.score("The", [TEXT])
    assert model.generate("The", 20) == made.generate("The", 20)
    assert model.bits_per_byte(TEXT) == made.bits_per_byte(TEXT)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("patching", "space", "patching: it takes a PatchSettings, not str: 'space'"),
        ("patching", None, "patching: it takes a PatchSettings, not NoneType"),
        ("patching", {"mode": "space"}, "patching: it takes a PatchSettings, not dict"),
        ("context", 0, "context: 0 is not a number from 1 to"),
        ("context", -1, "context: -1 is not"),
        ("context", 24.0, "context: 24.0 is not"),
        ("context", "24", "context: '24' is not"),
        ("context", True, "context: True is not"),
        ("entropy_model", "runs/byte_lm", "entropy_model: it takes a ByteLM, not str: 'runs/byte_lm'"),
        ("model", nn.Linear(2, 2), "model: it takes a BLTModel, not Linear"),
        ("config", {}, "config: it takes a Config, not dict"),
    ],
)
def test_wrong_values_are_refused_in_one_line(name: str, value: object, message: str) -> None:
    model = blt()
    before = getattr(model, name)
    with pytest.raises(UserError, match=f"^{message}") as error:
        setattr(model, name, value)
    assert "\n" not in str(error.value)
    assert getattr(model, name) is before


def test_a_config_that_does_not_fit_the_model_is_refused() -> None:
    model = blt()
    other = tiny_blt(window=9).settings
    with pytest.raises(UserError, match="config: its `model` has other shapes than the model"):
        model.config = model.config.model_copy(update={"model": other})
    with pytest.raises(UserError, match="config: it has no patching settings"):
        model.config = model.config.model_copy(update={"patching": None})


def test_measurements_stay_with_their_weights(tmp_path: Path) -> None:
    model = again(again(blt(), tmp_path / "a"), tmp_path / "b")
    assert model.config.origin == ORIGIN
    assert model.config.calibration == CALIBRATION
    assert "1.2345 on held-out.jsonl" in card(tmp_path / "b")


def train(model: BLT) -> None:
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        for weight in model.model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()


def merge(model: BLT) -> None:
    """Past autograd's count of versions, as a merged adapter is."""
    model.model.decoder.output.weight.data[7, 3] += 0.25


def load(model: BLT) -> None:
    model.model.load_state_dict(tiny(seed=9).state_dict(), assign=True)


@pytest.mark.parametrize("change", [train, merge, load, changed_model])
@pytest.mark.parametrize("format", ["native", "hf"])
def test_measurements_go_when_weights_change(change: Callable[[BLT], None], format: str, tmp_path: Path) -> None:
    model = again(blt(), tmp_path / "a")
    change(model)
    model.save_pretrained(tmp_path / "b", format=format)
    saved = BLT.from_pretrained(tmp_path / "b", device="cpu")
    assert saved.config.origin == Origin(licence="apache-2.0", converted_from="somewhere (a format)")
    assert saved.config.calibration == CALIBRATION  # of the byte LM, which is as it was
    shown = card(tmp_path / "b")
    assert "not measured" in shown
    assert "1.2345" not in shown
    assert "stories.jsonl" not in shown
    assert "12,345" not in shown


def test_measurements_that_are_set_belong_to_the_model_as_it_is(tmp_path: Path) -> None:
    model = again(blt(), tmp_path / "a")
    train(model)
    origin = Origin(training_text=["more.jsonl"], bits_per_byte=1.1)
    model.config = model.config.model_copy(update={"origin": origin})
    assert again(model, tmp_path / "b").config.origin == origin
    train(model)
    assert again(model, tmp_path / "c").config.origin == Origin()


@pytest.mark.parametrize("change", [changed_threshold, changed_byte_lm, changed_context, changed_config])
def test_bits_per_byte_are_those_of_the_patches(change: Callable[[BLT], None], tmp_path: Path) -> None:
    model = again(blt(), tmp_path / "a")
    change(model)
    saved = again(model, tmp_path / "b")
    assert saved.config.origin == ORIGIN.model_copy(update={"bits_per_byte": None})
    assert saved.config.calibration == (CALIBRATION if change is changed_context else None)
    assert "1.2345" not in card(tmp_path / "b")


def test_every_bit_counts_in_a_checksum() -> None:
    model = nn.Linear(3, 4)
    seen = {checksum(model)}
    with torch.no_grad():
        for change in (
            lambda weight: weight[0, 0].add_(1e-6),
            lambda weight: weight.neg_(),
            lambda weight: weight.copy_(weight.flip(0)),
            lambda weight: weight.copy_(weight.flip(1)),
        ):
            change(model.weight)
            seen.add(checksum(model))
    seen.add(checksum(model.to(torch.bfloat16)))
    assert len(seen) == 6
    assert checksum(tiny_blt(seed=2)) == checksum(tiny_blt(seed=2))


def test_config_json_is_what_is_used(tmp_path: Path) -> None:
    model = blt()
    model.patching = PatchSettings(threshold=1.0)
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["patching"]["threshold"] == 1.0


def test_weights_without_values_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    """As libraries leave them that put layers off to a disk."""
    model = blt()
    model.save_pretrained(tmp_path / "model")
    before = contents(tmp_path / "model")
    layer = next(layer for layer in model.model.modules() if isinstance(layer, nn.Linear))
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(UserError, match=r"weights: .*\.weight has no values yet"):
        model.save_pretrained(tmp_path / "model")
    assert contents(tmp_path / "model") == before
