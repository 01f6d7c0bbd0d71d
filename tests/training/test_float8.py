"""8-bit products of the global transformer: which modules, what stays the same, what is refused."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import nn

from bytelatent.errors import UserError
from bytelatent.model import add_patches, build_model, preset
from bytelatent.model.settings import StackSettings
from bytelatent.training import checks, train
from bytelatent.training.checks import check_float8
from bytelatent.training.distributed.float8 import check_gain, float8_matrices, gains, to_float8
from bytelatent.training.distributed.settings import Float8, ParallelSettings
from bytelatent.weights import load
from tests.model.tiny import random_ids, random_starts, stream_of, tiny_blt
from tests.training.tiny_runs import assert_equal_runs, blt_run, settings, weights

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def blt(multiple_of: int = 16) -> Any:
    """A BLT whose global transformer is 32 wide, with a feed-forward of 88 (no multiple of 16) or 96."""
    return tiny_blt(global_transformer=StackSettings(dim=32, num_layers=2, num_heads=2, multiple_of=multiple_of))


class Stub(nn.Linear):
    """What stands in for torchao's module."""


@dataclass(frozen=True)
class StubConfig:
    pad_inner_dim: bool = False
    recipe: str = ""

    @classmethod
    def from_recipe_name(cls, recipe: str) -> "StubConfig":
        return cls(recipe=recipe)


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> list[StubConfig]:
    """torchao's two names, as far as they are used; the configurations that were given."""
    given = []

    def convert(model: nn.Module, *, config: StubConfig, module_filter_fn: Callable[[nn.Module, str], bool]) -> None:
        given.append(config)
        for name, part in model.named_modules():
            if module_filter_fn(part, name):
                part.__class__ = Stub

    module = ModuleType("torchao.float8")
    module.Float8LinearConfig, module.convert_to_float8_training = StubConfig, convert  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.float8", module)
    return given


def converted(model: nn.Module, kind: type) -> set[str]:
    return {name for name, part in model.named_modules() if isinstance(part, kind)}


def expected(model: Any, narrow: bool) -> set[str]:
    """The linear layers of the global transformer's blocks, without those of the narrow feed-forward."""
    of_blocks = {name for name in converted(model, nn.Linear) if name.startswith("global_transformer.stack.blocks.")}
    assert len(of_blocks) == 2 * 7
    return {name for name in of_blocks if not (narrow and "feed_forward" in name)}


@pytest.mark.parametrize("narrow", [True, False])
def test_only_the_global_transformers_matrices_that_fit(narrow: bool, stubbed: list[StubConfig]) -> None:
    model = blt(multiple_of=8 if narrow else 16)
    to_float8(model, "rowwise")
    assert converted(model, Stub) == expected(model, narrow)
    assert stubbed == [StubConfig(pad_inner_dim=True, recipe="rowwise")]


def test_left_out_nothing_changes(stubbed: list[StubConfig]) -> None:
    model = blt()
    to_float8(model, None)
    check_float8(None, CPU, torch.float32)
    assert not converted(model, Stub)
    assert not stubbed


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "message"),
    [
        (CPU, (9, 0), torch.bfloat16, "float8: cpu does not multiply 8-bit floats (an NVIDIA device of"),
        (CUDA, (8, 6), torch.bfloat16, "float8: The Card does not multiply 8-bit floats"),
        (CUDA, (9, 0), torch.float32, "float8: its products give bfloat16; take dtype=bfloat16"),
        (CUDA, (9, 0), torch.bfloat16, "float8 needs torchao: pip install 'bytelatent[fp8]'"),
        (CUDA, (8, 9), torch.bfloat16, "float8 needs torchao"),
    ],
)
def test_what_will_not_do(
    device: torch.device,
    capability: tuple[int, int],
    dtype: torch.dtype,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "The Card")
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        check_float8("rowwise", device, dtype)
    assert message in str(caught.value)
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    if "torchao" in message:
        check_float8("rowwise", device, dtype)


def taken(name: str, rows: float, how: str = "rowwise", **parallel: Any) -> set[str]:
    with torch.device("meta"):
        model: Any = build_model(preset(name))
    found = float8_matrices(model, how, rows, ParallelSettings(**parallel))  # type: ignore[arg-type]
    return {one.removeprefix("stack.blocks.0.") for one in found if ".blocks." not in one or ".0." in one}


def test_what_gains_agrees_with_the_steps_that_were_timed() -> None:
    """8B gains with 65,536 bytes a GPU and not with 16,384; 1B does not."""
    wide = {"projection", "feed_forward.gate", "feed_forward.up", "feed_forward.down"}
    assert taken("blt-8b", 65_536 / 4.5) == wide
    assert wide <= taken("blt-8b", 65_536 / 4.5, activation_checkpointing="full")
    assert not taken("blt-8b", 16_384 / 4.5)
    assert not taken("blt-1b", 65_536 / 4.5)
    assert not taken("blt-1b", 1e9)  # no batch is large enough for narrow matrices
    assert not taken("blt-8b", 65_536 / 4.5, tensor=8)  # each rank has an eighth of a matrix


@pytest.mark.parametrize("how", ["rowwise", "rowwise_with_gw_hp", "tensorwise"])
def test_more_patches_and_wider_matrices_gain(how: Any) -> None:
    found = [[gains(how, rows, size, size) for size in (64, 1_024, 8_192)] for rows in (16, 4_096, 65_536)]
    assert found[-1][-1]
    assert not found[0][0]
    for one, other in pairwise(found):
        assert one <= other
        assert all(narrow <= wide for narrow, wide in pairwise(other))


def test_no_gain_is_refused_with_the_way_out() -> None:
    message = r"float8: rowwise makes no product of 14,564 patches .*2048 x 5632 faster.*or leave it out: float8=null"
    with pytest.raises(UserError, match=message):
        check_gain(preset("blt-1b"), "rowwise", 14_564, ParallelSettings())
    check_gain(preset("blt-8b"), "rowwise", 14_564, ParallelSettings())


def test_a_run_that_cannot_have_it_leaves_nothing_behind(tmp_path: Path, text: Path, byte_lm: Path) -> None:
    with pytest.raises(UserError, match="float8: cpu does not"):
        train(settings(blt_run(tmp_path / "run", text, byte_lm, float8="rowwise")))
    assert not (tmp_path / "run").exists()


def test_torchao_keeps_names_weights_and_dtypes() -> None:
    pytest.importorskip("torchao.float8")
    from torchao.float8.float8_linear import Float8Linear

    model, plain = blt(), blt()
    before = dict(model.named_parameters())
    to_float8(model, "rowwise")
    assert converted(model, Float8Linear) == expected(plain, narrow=False)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert {type(value) for value in model.state_dict().values()} == {torch.Tensor}


@pytest.mark.parametrize("how", get_args(Float8))
def test_torchaos_products_are_quantized_and_near(how: Float8, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao.float8")
    # torchao asks for CUDA's autocast alone, so on a CPU its inputs would stay in float32.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: not device or device == ("cpu",))
    monkeypatch.setattr(torch, "get_autocast_gpu_dtype", lambda: torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = random_ids(generator, 90)
    batch = add_patches(stream_of([ids]), random_starts(generator, 90))
    assert batch.num_patches % 16 != 0
    model, plain = blt(), blt()
    to_float8(model, how)
    gradients = []
    for one in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(one(batch), ids, reduction="sum")
        loss.backward()
        gradients.append(one.global_transformer.stack.blocks[0].feed_forward.down.weight.grad)
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    assert 0.005 < error < 0.15  # a mantissa of 3 bits rounds by 3 % or so; some products follow one another


def test_a_run_in_float8_and_its_checkpoints(
    tmp_path: Path, text: Path, byte_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where torchao's products work, too, if slowly."""
    pytest.importorskip("torchao.float8")
    monkeypatch.setattr("bytelatent.training.checks.check_float8", lambda *_: None)
    monkeypatch.setattr("bytelatent.training.distributed.float8.gains", lambda *_: True)
    more = {"steps": 4, "float8": "rowwise", "dtype": "bfloat16", "checkpoint": {"every": 2}}
    whole = train(settings(blt_run(tmp_path / "whole", text, byte_lm, **more)))
    cut = tmp_path / "cut"
    for _ in range(2):
        train(settings(blt_run(cut, text, byte_lm, **more)))
        shutil.rmtree(cut / "checkpoints" / "step-00000004")
    train(settings(blt_run(cut, text, byte_lm, **more)))
    assert_equal_runs(cut, whole)
    plain = weights(train(settings(blt_run(tmp_path / "plain", text, byte_lm, **{**more, "float8": None}))))
    found = weights(whole)
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in plain.items()}
    assert any(not torch.equal(value, plain[name]) for name, value in found.items())
    train(settings(blt_run(tmp_path / "plain", text, byte_lm, **{**more, "steps": 5})))  # it may change within a run
    loaded: Any = load(whole).model
    assert type(loaded.global_transformer.stack.blocks[0].attention.query) is nn.Linear
