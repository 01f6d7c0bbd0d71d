"""What a CUDA graph can hold: no question to the device, no size that hangs on data; and how graphs are used.

There is no graph without CUDA. So the passes run on the meta device, where no question can be answered, and graphs
are stood in for by what they are: the same work again, its results put where they were the first time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bytelatent.data import Batch
from bytelatent.errors import UserError
from bytelatent.kernels import patch_attention, patch_pooling
from bytelatent.model import attention, build_model
from bytelatent.model.loss import cross_entropy
from bytelatent.model.settings import BLTSettings, ByteLMSettings
from bytelatent.training import gradients as module
from bytelatent.training import train
from bytelatent.training.checks import check_cuda_graph
from bytelatent.training.distributed.parallelize import apply_activation_checkpointing
from bytelatent.training.distributed.settings import ActivationCheckpointing
from bytelatent.training.gradients import CapturedGradients, Gradients
from bytelatent.training.profiling.measure import ForwardBackward, SyntheticTraining, TrainingSetup, random_batch
from bytelatent.training.settings import OptimizerSettings
from tests.model.tiny import tiny_blt_settings
from tests.training.tiny_runs import BLT, assert_equal_runs, byte_lm_run, settings

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda")
BYTE_LM = ByteLMSettings(dim=16, num_layers=2, num_heads=2, multiple_of=8, window=16)


class OnlyThere(TorchDispatchMode):
    """Nothing is copied from the host or to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, Tensor) or value.device == META, f"{func} has a tensor on {value.device}"
        return result


class NoneFromValues(TorchFunctionMode):
    """Nothing is made of values that the host has. (That makes no copy to the meta device, which has no values.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{func} copies from the host"
        return func(*args, **(kwargs or {}))


@contextmanager
def unasked() -> Iterator[None]:
    with OnlyThere(), NoneFromValues():
        yield


def prepared(asked: BLTSettings | ByteLMSettings, how: ActivationCheckpointing = "none", sparse: bool = False) -> Any:
    model: Any = build_model(asked)
    apply_activation_checkpointing(model, how)
    for part in model.modules():
        if isinstance(part, nn.EmbeddingBag):
            part.sparse = sparse
    return model


def batch_on(device: torch.device, asked: BLTSettings | ByteLMSettings) -> Batch:
    return Batch(*random_batch(100, device, isinstance(asked, BLTSettings)), 100, 100, 0)


def assert_all_have_gradients(model: nn.Module, sparse: bool) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.is_sparse == (sparse and "tables" in name), name


PATCHINGS = {"byte LM": BYTE_LM, "BLT": tiny_blt_settings(window=16)}


def takes_kernels(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    for place in (patch_attention, patch_pooling):
        monkeypatch.setattr(place, "takes_kernels", lambda x: kernels)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("name", PATCHINGS)
def test_nothing_is_asked_of_the_device(
    name: str, kernels: bool, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes_kernels(monkeypatch, kernels)
    with META:
        model = prepared(PATCHINGS[name], sparse=sparse)
    batch = batch_on(META, PATCHINGS[name])
    cross_entropy(model, batch)  # makes on the host what is made once
    with unasked():
        Gradients(lambda batch: cross_entropy(model, batch), META)(batch, 3.0)
    assert_all_have_gradients(model, sparse)


@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("sparse", [False, True])
def test_nor_in_mixed_precision_and_with_checkpointing(
    how: ActivationCheckpointing, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that have no values, on the CPU, as the meta device has no mixed precision."""
    takes_kernels(monkeypatch, True)
    with META:
        model = prepared(PATCHINGS["BLT"], how, sparse)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.to_empty(device="cpu")
    batch = batch_on(CPU, PATCHINGS["BLT"])
    fields = {name: mode.from_tensor(value) for name, value in module._tensors(batch).items()}
    batch = Batch(
        replace(batch.stream, **{k: v for k, v in fields.items() if k != "targets"}), fields["targets"], 1, 1, 1
    )

    def loss(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, batch)

    with mode:
        nats = Gradients(loss, CPU)(batch, 3.0)
    assert nats.shape == ()
    assert_all_have_gradients(model, sparse)


@pytest.mark.parametrize("window", [None, 300])
def test_the_mask_of_flex_attention_is_built_without_questions(window: int | None) -> None:
    document = torch.zeros(1000, dtype=torch.long, device=META)
    with unasked():
        mask = attention._flex_mask(document, window)
    assert mask.block_mask.kv_num_blocks.shape == (1, 1, 8)


def test_nor_is_the_mask_of_packed_attention() -> None:
    document = torch.zeros(1000, dtype=torch.long, device=META)
    with unasked():
        mask = attention.packed_mask(document, 300, 100)
    assert (mask.begin.shape, mask.length.shape) == ((129,), (128,))


def test_questions_are_noticed() -> None:
    x = torch.zeros(3, device=META)
    for question in (Tensor.nonzero, lambda x: x[x > 0], Tensor.unique, Tensor.item, lambda x: x.cpu(), bool):
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), unasked():
            question(x[0] if question in (Tensor.item, bool) else x)
    with pytest.raises(AssertionError, match="copies from the host"), unasked():
        torch.tensor([1.0], device=META)


class Replayed:
    """What a graph is: while it is made nothing is computed; later the same work again, its results in the same places.

    Args:
        work: the method that `CapturedGradients` captures.
    """

    def __init__(self, work: Any):
        self.work, self.parameters = work, work.__self__._parameters
        self.adds = self.parameters[0].grad is not None
        before = [parameter.grad.clone() for parameter in self.parameters] if self.adds else None
        self.result = work()
        self.places = [parameter.grad for parameter in self.parameters]
        for number, place in enumerate(self.places):
            place.copy_(before[number]) if before else values_of(place).fill_(torch.nan)
        self.result.fill_(torch.nan)

    def replay(self) -> None:
        for parameter, place in zip(self.parameters, self.places, strict=True):
            parameter.grad = place if self.adds else None
        self.result.copy_(self.work())
        for parameter, place in zip(self.parameters, self.places, strict=True):
            place.copy_(parameter.grad)
            parameter.grad = place if self.adds else None  # a graph knows no parameters


def values_of(gradient: Tensor) -> Tensor:
    return gradient._values() if gradient.is_sparse else gradient


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """The graphs that are made."""
    made: list[Replayed] = []

    @contextmanager
    def capturing(_device: torch.device) -> Iterator[Callable[[Any], tuple[Replayed, Tensor]]]:
        def captured(work: Any) -> tuple[Replayed, Tensor]:
            made.append(Replayed(work))
            return made[-1], made[-1].result

        yield captured

    monkeypatch.setattr(module, "capturing", capturing)
    return made


def batches_of(asked: BLTSettings | ByteLMSettings, number: int) -> list[Batch]:
    stream, targets = random_batch(80, CPU, isinstance(asked, BLTSettings))
    return [Batch(replace(stream, ids=(stream.ids + i) % 260), targets.roll(i), 80, 80, 0) for i in range(number)]


@pytest.mark.parametrize("asked", [BYTE_LM, tiny_blt_settings()], ids=["byte LM", "BLT"])
@pytest.mark.parametrize("several", [1, 3])
def test_replayed_gradients_are_those_of_the_passes(
    asked: BLTSettings | ByteLMSettings, several: int, stood_in: list[Replayed]
) -> None:
    torch.manual_seed(0)
    model = build_model(asked)
    plain = Gradients(lambda batch: cross_entropy(model, batch), CPU)
    captured = CapturedGradients(model.parameters(), plain.loss, CPU, adds=several > 1)
    batches = batches_of(asked, 3 * several)
    copies = [(batch.stream.ids.clone(), batch.targets.clone()) for batch in batches]
    places = []
    for step in range(3):
        found = []
        for gradients in (plain, captured):
            model.zero_grad()
            nats = [gradients(batch, 7.0 + step) for batch in batches[step * several :][:several]]
            found.append((torch.stack(nats), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        (expected, ours), (nats, theirs) = found
        assert torch.equal(expected, nats)
        assert len(ours) == len(list(model.parameters()))
        assert all(torch.equal(*both) for both in zip(ours, theirs, strict=True))
        places.append([p.grad for p in model.parameters()])
        with torch.no_grad():  # as an optimizer's step
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0.0
    assert len(stood_in) == (2 if several > 1 else 1)
    assert all(one is other for one, other in zip(places[0], places[2], strict=True))
    for batch, (ids, targets) in zip(batches, copies, strict=True):
        assert torch.equal(batch.stream.ids, ids)
        assert torch.equal(batch.targets, targets)


@pytest.mark.parametrize("several", [1, 3])
def test_more_documents_are_captured_again(several: int, stood_in: list[Replayed]) -> None:
    """Not each time that there are some more; and what was added up so far is kept."""
    torch.manual_seed(0)
    model = build_model(BYTE_LM)
    plain = Gradients(lambda batch: cross_entropy(model, batch), CPU)
    captured = CapturedGradients(model.parameters(), plain.loss, CPU, adds=several > 1)
    numbers: list[int | None] = [3, 63, 64, 100, 1, 127, 128, None, 5]
    graphs = [1, 1, 2, 2, 2, 2, 3, 4, 4]  # as many captures; where nothing is known, for any number
    batches = [
        replace(batch, stream=replace(batch.stream, num_documents=number))
        for batch, number in zip(batches_of(BYTE_LM, len(numbers)), numbers, strict=True)
    ]
    made = []
    for first in range(0, len(batches), several):
        found = []
        for gradients in (plain, captured):
            model.zero_grad()
            for batch in batches[first:][:several]:
                gradients(batch, 7.0)
                made += [len(stood_in)] * (gradients is captured)
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(*both) for both in zip(*found, strict=True))
        assert len(found[1]) == len(list(model.parameters()))
    assert made == [number * min(several, 2) for number in graphs]
    assert batches[0].stream.num_documents == 3


@pytest.mark.usefixtures("stood_in")
def test_another_shape_is_named() -> None:
    model = build_model(tiny_blt_settings())
    captured = CapturedGradients(model.parameters(), lambda batch: cross_entropy(model, batch), CPU)
    one = Batch(*random_batch(80, CPU), 80, 80, 0)
    captured(one, 1.0)
    model.zero_grad()
    more = replace(one.stream, patch_document=torch.full([256], -1), patch_position=torch.zeros(256, dtype=torch.long))
    other = replace(one, stream=more)
    assert captured.fits(one)
    assert not captured.fits(other)
    line = r"cuda_graph: 'patch_document' of a batch has shape \[256\], and of the first \[128\]; .*data.batch_patches"
    with pytest.raises(UserError, match=line):
        captured(other, 1.0)


@pytest.mark.usefixtures("stood_in")
def test_gradients_that_are_there_are_not_lost() -> None:
    model = build_model(BYTE_LM)
    captured = CapturedGradients(model.parameters(), lambda batch: cross_entropy(model, batch), CPU)
    for batch in batches_of(BYTE_LM, 1):
        captured(batch, 1.0)
        with pytest.raises(AssertionError, match="gradients already"):
            captured(batch, 1.0)


@pytest.mark.parametrize(("accumulation", "hash_gradients"), [(1, "dense"), (2, "dense"), (1, "rows")])
def test_a_run_is_the_same(
    tmp_path: Path,
    text: Path,
    stood_in: list[Replayed],
    monkeypatch: pytest.MonkeyPatch,
    accumulation: int,
    hash_gradients: str,
) -> None:
    monkeypatch.setattr("bytelatent.training.checks.check_cuda_graph", lambda *_: None)
    more: dict[str, Any] = {
        "model": BLT,
        "patching": {"mode": "space"},
        "data": {"batch_patches": 96, "valid": str(text)},
        "optimizer": {
            "lr": 3e-3,
            "warmup_steps": 3,
            "accumulation": accumulation,
            "hash_gradients": hash_gradients,
        },
    }
    runs = [
        train(settings(byte_lm_run(tmp_path / str(cuda_graph), text, 6, cuda_graph=cuda_graph, **more_of(more))))
        for cuda_graph in (False, True)
    ]
    assert_equal_runs(*runs)
    assert [graph.adds for graph in stood_in] == [False, True][:accumulation]


def more_of(values: dict[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}


@pytest.mark.parametrize(("device", "world", "line"), [(CPU, 1, "device cpu"), (CUDA, 2, "2 processes")])
def test_where_there_is_no_graph(device: torch.device, world: int, line: str) -> None:
    check_cuda_graph(False, device, world)
    check_cuda_graph(True, CUDA)
    with pytest.raises(UserError, match=f"cuda_graph: .*one process on CUDA, not for {line}; do without it$"):
        check_cuda_graph(True, device, world)


def test_settings_that_no_graph_holds() -> None:
    values = {**byte_lm_run(Path("x"), Path("x"), model=BLT, patching={"mode": "space"}), "cuda_graph": True}
    with pytest.raises(UserError, match=r"one shape; set data\.batch_patches"):
        settings(values)
    values["data"]["batch_patches"] = 96
    assert settings(values).cuda_graph
    values["optimizer"] = {"hash_gradients": "rows"}
    assert settings(values).cuda_graph
    values["optimizer"]["accumulation"] = 2
    with pytest.raises(UserError, match=r"take optimizer\.accumulation=1"):
        settings(values)
    assert settings({**byte_lm_run(Path("x"), Path("x")), "cuda_graph": True}).cuda_graph


def test_what_is_timed_is_captured_for_each_size(stood_in: list[Replayed]) -> None:
    torch.manual_seed(0)
    model = build_model(tiny_blt_settings())
    plain, captured = (ForwardBackward(model, CPU, torch.float32, way) for way in (False, True))
    for size in (300, 300, 700):
        found = []
        for work in (plain, captured):
            work(*random_batch(size, CPU))
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert found[0]
        assert all(torch.equal(*both) for both in zip(*found, strict=True))
    assert len(stood_in) == 2
    captured.forget_shapes()
    assert all(parameter.grad is None for parameter in model.parameters())
    captured(*random_batch(300, CPU))
    assert len(stood_in) == 3


@pytest.mark.parametrize("hash_gradients", ["dense", "rows"])
def test_whole_steps_are_the_same(hash_gradients: Any, stood_in: list[Replayed]) -> None:
    """Clipping adds up the rows of a table that come several times, and the graph still finds its own gradient."""
    optimizer = OptimizerSettings(hash_gradients=hash_gradients, lr=1e-2, clip=0.05)
    plan = TrainingSetup(tiny_blt_settings(), CPU, torch.float32, optimizer=optimizer)
    plain, captured = SyntheticTraining(plan), SyntheticTraining(replace(plan, captured=True))
    before = {name: weight.clone() for name, weight in plain.model.named_parameters()}
    for seed in range(3):
        for trainee in (plain, captured):
            trainee.step(*random_batch(300, CPU, seed=seed))
        found = dict(captured.model.named_parameters())
        for name, weight in plain.model.named_parameters():
            assert torch.equal(weight, found[name]), name
            assert not torch.equal(weight, before[name]), name
    assert len(stood_in) == 1
