"""Which optimizer trains which weights, whole steps by rows and by Muon, clipping over dense and sparse gradients."""

from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bytelatent.data import Batch, Loader, Patcher
from bytelatent.model import build_model
from bytelatent.model.loss import cross_entropy
from bytelatent.training import read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.distributed.parallelize import ParallelPlan
from bytelatent.training.gradients import Gradients, clip
from bytelatent.training.optimizer import Optimizers, build_optimizer, catch_up
from bytelatent.training.settings import OptimizerSettings, TrainSettings
from tests.training.tiny_runs import BLT, byte_lm_run, settings, unigram_bits, weights

CPU = torch.device("cpu")
TABLES = "encoder.ngram_hash.tables.weight"


def one_train_step(asked: TrainSettings, state: TrainState, model: nn.Module) -> dict[str, Any]:
    gradients = Gradients(lambda batch: cross_entropy(model, batch), CPU)
    return loop.Trainer(asked, ParallelPlan(), state, gradients).train_step()


def sparse_gradient(rows: list[int], shape: tuple[int, int]) -> Tensor:
    """Random, of these rows in this order; a row that comes twice has the sum of both."""
    values = torch.randn(len(rows), shape[1])
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_of_dense_and_sparse(max_norm: float) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(9, 2)), nn.Parameter(torch.randn(5))]
    dense = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    parameters[0].grad = torch.randn(4, 3)
    parameters[1].grad = sparse_gradient([8, 2, 8, 8, 0], (9, 2))
    for parameter, other in zip(parameters[:2], dense, strict=False):
        assert parameter.grad is not None
        other.grad = parameter.grad.to_dense().clone()
    expected = nn.utils.clip_grad_norm_(dense, max_norm)
    assert float(expected) > 1
    torch.testing.assert_close(clip(iter(parameters), max_norm), expected)
    assert parameters[2].grad is None
    for parameter, other in zip(parameters[:2], dense, strict=False):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.to_dense(), other.grad)


def groups_by_name(model: nn.Module, optimizer: torch.optim.Optimizer | Optimizers) -> dict[str, tuple[str, dict]]:
    """The optimizer's class and the group of each weight; every weight has one."""
    parts = optimizer.optimizers.values() if isinstance(optimizer, Optimizers) else [optimizer]
    of = [
        (id(parameter), type(part).__name__, group)
        for part in parts
        for group in part.param_groups
        for parameter in group["params"]
    ]
    assert set(Counter(number for number, *_ in of).values()) == {1}
    found = {number: (kind, group) for number, kind, group in of}
    assert len(found) == len(list(model.parameters()))
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def tiny_blt() -> nn.Module:
    return build_model(settings(byte_lm_run(Path("x"), Path("x"), model=BLT, patching={"mode": "space"})).model)


def test_muon_trains_the_matrices_of_blocks() -> None:
    model = tiny_blt()
    asked = OptimizerSettings(name="muon", hash_gradients="rows", weight_decay=0.3)
    kinds = {name: kind for name, (kind, _) in groups_by_name(model, build_optimizer(model, asked)).items()}
    assert {name for name, kind in kinds.items() if kind == "SparseRowsAdamW"} == {TABLES}
    by_muon = {name for name, kind in kinds.items() if kind == "Muon"}
    assert by_muon == {
        name for name in kinds if (".blocks." in name or ".cross_attention." in name) and "norm" not in name
    }
    assert {"global_transformer.stack.blocks.0.feed_forward.down.weight", "decoder.cross_attention.0.query.weight"} <= (
        by_muon
    )
    assert {kinds[name] for name in ("decoder.output.weight", "encoder.embedding.weight", "decoder.norm.weight")} == {
        "AdamW"
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("hash_gradients", ["dense", "rows"])
def test_parts_have_their_learning_rates(name: Any, hash_gradients: Any) -> None:
    model = tiny_blt()
    scales = {"byte_embedding": 2.0, "hash_tables": 3.0, "encoder": 5.0, "global_transformer": 7.0, "decoder": 11.0}
    asked = OptimizerSettings.parse(
        {"name": name, "lr": 0.1, "lr_scale": scales, "weight_decay": 0.3, "hash_gradients": hash_gradients}
        | {"hash_weight_decay": 0.2}
    )
    groups = {weight: group for weight, (_, group) in groups_by_name(model, build_optimizer(model, asked)).items()}
    for weight, group in groups.items():
        part = {TABLES: "hash_tables", "encoder.embedding.weight": "byte_embedding"}.get(weight, weight.split(".")[0])
        assert group["lr"] == pytest.approx(0.1 * scales[part])
        assert group["lr_scale"] == scales[part]
        decays = model.get_parameter(weight).dim() == 2 and "embedding" not in weight and weight != TABLES
        assert group["weight_decay"] == (0.2 if weight == TABLES else 0.3 if decays else 0.0), weight


def test_the_byte_embedding_of_a_byte_lm_has_a_rate_of_its_own() -> None:
    model = build_model(settings(byte_lm_run(Path("x"), Path("x"))).model)
    asked = OptimizerSettings.parse({"lr_scale": {"byte_embedding": 4.0}})
    groups = groups_by_name(model, build_optimizer(model, asked))
    assert {name for name, (_, group) in groups.items() if group["lr_scale"] == 4.0} == {"embedding.weight"}
    assert {group["lr_scale"] for _, group in groups.values()} == {1.0, 4.0}


def space_run(text: Path, **optimizer: Any) -> TrainSettings:
    asked = {"lr": 1e-2, "warmup_steps": 0, **optimizer}
    more: dict[str, Any] = {"model": BLT, "patching": {"mode": "space"}, "optimizer": asked}
    return settings(byte_lm_run(Path("x"), text, **more))


def steps_of(asked: TrainSettings, batches: list[Batch], model: nn.Module, steps: int) -> list[dict[str, Any]]:
    state = TrainState(model, build_optimizer(model, asked.optimizer), iter(batches))  # type: ignore[arg-type]
    return [one_train_step(asked, state, model) for _ in range(steps)]


@pytest.mark.parametrize("clipped", [1e9, 1e-2])
def test_a_first_step_by_rows_is_a_dense_one(text: Path, clipped: float) -> None:
    """Over two batches, which share some rows. AdamW's first step leaves what has no gradient as it is."""
    dense = space_run(text, accumulation=2, clip=clipped)
    rows = space_run(text, accumulation=2, clip=clipped, hash_gradients="rows")
    loader = Loader(dense.data, 0, Patcher(dense.patching))
    batches = [next(loader) for _ in range(4)]
    torch.manual_seed(0)
    one = build_model(dense.model)
    other = deepcopy(one)
    before = one.get_parameter(TABLES).detach().clone()
    (expected,), (found,) = steps_of(dense, batches[:2], one, 1), steps_of(rows, batches[:2], other, 1)
    assert found == pytest.approx(expected, rel=1e-5)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter, one.get_parameter(name), rtol=1e-4, atol=1e-5)
    changed = (other.get_parameter(TABLES) != before).any(1)
    assert 0.2 < changed.float().mean() < 0.95
    assert other.get_parameter(TABLES).grad is None


def test_the_schedule_is_scaled(text: Path) -> None:
    asked = space_run(text, lr_scale={"decoder": 0.25}, hash_gradients="rows", name="muon", warmup_steps=2)
    model = build_model(asked.model)
    state = TrainState(model, build_optimizer(model, asked.optimizer), Loader(asked.data, 0, Patcher(asked.patching)))
    row = loop.Trainer(
        asked, ParallelPlan(), state, Gradients(lambda batch: cross_entropy(model, batch), CPU)
    ).train_step()
    assert row["lr"] == pytest.approx(5e-3)
    for name, (_, group) in groups_by_name(model, state.optimizer).items():
        assert group["lr"] == pytest.approx(5e-3 * (0.25 if name.startswith("decoder.") else 1.0))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_by_rows_are_dense_ones(text: Path, accumulation: int) -> None:
    """What every batch reads, so all metrics; and once all rows have caught up, all weights."""
    given: dict[str, Any] = {"accumulation": accumulation, "clip": 0.5, "lr_scale": {"hash_tables": 3.0}, "beta2": 0.8}
    given["hash_weight_decay"] = accumulation - 1
    dense, rows = space_run(text, **given), space_run(text, **given, hash_gradients="rows")
    loader = Loader(dense.data, 0, Patcher(dense.patching))
    batches = [next(loader) for _ in range(8 * accumulation)]
    torch.manual_seed(0)
    one = build_model(dense.model).double()
    other = deepcopy(one)
    expected = steps_of(dense, batches, one, 8)
    state = TrainState(other, build_optimizer(other, rows.optimizer), iter(batches))  # type: ignore[arg-type]
    for row in expected:
        assert one_train_step(rows, state, other) == pytest.approx(row, rel=1e-9)
    table, dense_table = other.get_parameter(TABLES), one.get_parameter(TABLES)
    assert not torch.allclose(table, dense_table, atol=1e-9)
    catch_up(state.optimizer)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(parameter, one.get_parameter(name), rtol=1e-8, atol=1e-8)


def test_a_run_by_rows_writes_weights_that_have_decayed(tmp_path: Path, text: Path) -> None:
    """Also those of rows that no step looks up: what a run with dense gradients writes."""
    tables, optimizer = [], {"lr": 1e-2, "warmup_steps": 0, "hash_weight_decay": 5.0}
    for kind in ("dense", "rows"):
        more: dict[str, Any] = {"model": BLT, "patching": {"mode": "space"}}
        more["optimizer"] = {**optimizer, "hash_gradients": kind}
        tables.append(weights(train(settings(byte_lm_run(tmp_path / kind, text, 8, **more))))[TABLES])
    torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)
    unused = byte_lm_run(tmp_path / "x", text, 8, model=BLT, patching={"mode": "space"}, optimizer={"lr": 1e-9})
    begin = weights(train(settings(unused)))[TABLES]
    left = tables[1].norm(dim=1) / begin.norm(dim=1)
    assert 0.6 < float(left.min()) < 0.85  # 1 - 0.05 to the eighth, by a rate that falls


@pytest.mark.parametrize("model", ["byte LM", "BLT"])
def test_muon_learns(tmp_path: Path, text: Path, model: str) -> None:
    more: dict[str, Any] = {"optimizer": {"name": "muon", "lr": 1e-2, "warmup_steps": 3}}
    if model == "BLT":
        more |= {"model": BLT, "patching": {"mode": "space"}}
        more["optimizer"]["hash_gradients"] = "rows"
    rows = read_metrics(train(settings(byte_lm_run(tmp_path / "run", text, 40, **more))) / "metrics.jsonl")
    assert sum(row["bits_per_byte"] for row in rows[-5:]) / 5 < 0.9 * unigram_bits(text)
