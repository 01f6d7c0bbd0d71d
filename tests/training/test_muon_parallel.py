"""Muon on several ranks: the steps of one process, however matrices are divided."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from bytelatent.training import muon
from bytelatent.training.distributed import whole_matrices
from bytelatent.training.distributed.parallelize import full_tensor
from bytelatent.training.distributed.ranks import open_ranks
from bytelatent.training.distributed.whole_matrices import shared_out
from bytelatent.training.muon import Muon
from tests.training.crew import Crew
from tests.training.plans import MODEL, PLANS, Taken, take_steps, values
from tests.training.test_muon import grouped, matrices

STEPS = 3
# Feed-forward widths that ranks cannot divide evenly: 43; and 86, of which each of a tensor group has 43.
WIDTHS = {"encoder": 1, "decoder": 1, "global_transformer": 2}
ODD = {**MODEL, **{part: {**MODEL[part], "multiple_of": multiple} for part, multiple in WIDTHS.items()}}
MUON = {"name": "muon", "lr": 3e-3, "warmup_steps": 0, "clip": 1e9, "weight_decay": 0.1}
LAYOUTS: list[tuple[tuple[int, int], list[Any]]] = [  # over four ranks
    ((4, 1), [Replicate(), Shard(0)]),
    ((1, 4), [Replicate(), Shard(0)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),  # FSDP after tensor parallelism
]


def spread(value: Tensor, mesh: DeviceMesh, placements: list[Any]) -> Tensor:
    own = value
    for dim in (1, 0):  # FSDP, the first dimension of a mesh, divides what others left
        if isinstance(placement := placements[dim], Shard | _StridedShard):
            parts = own.split(-(-own.shape[placement.dim] // mesh.size(dim)), placement.dim)
            number = mesh.get_local_rank(dim)
            own = parts[number] if number < len(parts) else own.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        own.contiguous(), mesh, placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def take_muon_steps() -> tuple[list[Tensor], list[Tensor], dict[str, int]]:
    """Steps with given gradients: weights, momenta, how often each collective ran in the last one.

    Of several ranks the matrices of `test_muon` once for each layout, of one as often.
    """
    calls: dict[str, int] = {}

    def counted(name: str, call: Any) -> Any:
        def counting(*arguments: Any, **more: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return call(*arguments, **more)

        return counting

    with open_ranks("cpu", 1) as (ranks, _), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counted("all to all", dist.all_to_all_single))
        patch.setattr(whole_matrices, "all_gather", counted("all gather", whole_matrices.all_gather))
        meshes = [init_device_mesh("cpu", shape) for shape, _ in LAYOUTS] if ranks.world_size > 1 else []

        def placed(layout: int, value: Tensor) -> Tensor:
            return spread(value, meshes[layout], LAYOUTS[layout][1]) if meshes else value

        layouts, parameters = [], []
        for layout in range(len(LAYOUTS)):
            for matrix in matrices(layout):
                layouts.append(layout)
                parameters.append(nn.Parameter(placed(layout, matrix.detach())))
        optimizer = Muon(grouped(parameters))
        generator = torch.Generator().manual_seed(0)
        for step in range(STEPS):
            for layout, parameter in zip(layouts, parameters, strict=True):
                parameter.grad = placed(layout, torch.randn(parameter.shape, generator=generator))
            if step == 1:
                parameters[2].grad = None
            calls.clear()
            optimizer.step()
        momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
        assert all(isinstance(value, DTensor) for value in momenta) or not meshes
        return [full_tensor(p.detach()) for p in parameters], [full_tensor(value) for value in momenta], dict(calls)


def test_each_layout_is_that_of_one_process(crew: Crew) -> None:
    """A step takes an all-to-all there and one back, and an all-gather for each of the two meshes with replicas."""
    [found] = crew.run((4, take_muon_steps))
    weights, momenta, _ = take_muon_steps()
    initial = [matrix.detach() for layout in range(len(LAYOUTS)) for matrix in matrices(layout)]
    for rank in found:
        assert rank[2] == {"all to all": 2, "all gather": 2}
        for mine, expected, before in zip(rank[0], weights, initial, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)
            assert (expected - before).abs().max() > 1e-3
        for mine, expected in zip(rank[1], momenta, strict=True):
            assert torch.equal(mine, expected)
        assert all(torch.equal(mine, others) for mine, others in zip(rank[0], found[0][0], strict=True))


def test_work_is_shared_out_by_cost() -> None:
    assert shared_out([1, 5, 2, 2, 1], 2) == [1, 0, 1, 1, 0]
    assert shared_out([3.0, 4.0], 5) == [1, 0]
    assert shared_out([], 2) == []


def muon_values(text: Path, plan: str | None = None, **more: Any) -> dict[str, Any]:
    """The values of a run of a plan, or of one process."""
    parallel = {} if plan is None else {"parallel": PLANS[plan][1]}
    return values(text, **{"model": ODD, "optimizer": MUON, **parallel, **more})


def exact_steps(*arguments: Any) -> Taken:
    """As `take_steps`, with matrices orthogonalized in float32.

    In bfloat16 a gradient that differs in its last bit now and then rounds to another number, and the smallest singular
    values grow some hundred times.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "PRECISION", torch.float32)
        return take_steps(*arguments)


@pytest.fixture(scope="module")
def alone(text: Path) -> Taken:
    return exact_steps(muon_values(text), STEPS)


def assert_same(found: Taken, expected: Taken) -> None:
    late = expected.rows[-len(found.rows) :]
    assert [row["step"] for row in found.rows] == [row["step"] for row in late]
    for row, wanted in zip(found.rows, late, strict=True):
        assert row["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], abs=1e-5)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-5, msg=name)


def test_steps_are_those_of_one_process(crew: Crew, text: Path, alone: Taken) -> None:
    """Losses, and weights, of which Muon changes the matrices of blocks by about `lr` / 5 a step."""
    plans = ("replicate", "tensor")
    found = crew.run(*((PLANS[plan][0], exact_steps, muon_values(text, plan), STEPS) for plan in plans))
    for first, second in found:
        assert_same(first, alone)
        assert all(torch.equal(second.weights[name], weight) for name, weight in first.weights.items())
    for name, weight in alone.weights.items():
        assert (weight - alone.initial[name]).abs().max() > 5e-4, name


def test_shards_and_their_checkpoints(crew: Crew, tmp_path: Path, text: Path, alone: Taken) -> None:
    """Resumed by as many processes bit for bit, by one process and from one within rounding; hash gradients by rows."""
    rows = {"optimizer": {**MUON, "hash_gradients": "rows"}}
    shard, two, one = muon_values(text, "shard", **rows), tmp_path / "two", tmp_path / "one"
    exact_steps(muon_values(text, **rows), 2, one)
    [[whole, _], _] = crew.run((2, exact_steps, shard, STEPS), (2, exact_steps, shard, 2, two))
    assert_same(whole, alone)
    of_two = Path(shutil.copytree(two, tmp_path / "copy"))
    [[resumed, _], [from_one, _]] = crew.run((2, exact_steps, shard, STEPS, two), (2, exact_steps, shard, STEPS, one))
    assert [row["bits_per_byte"] for row in resumed.rows] == [row["bits_per_byte"] for row in whole.rows[2:]]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
    for found in (from_one, exact_steps(muon_values(text, **rows), STEPS, of_two)):
        assert len(found.rows) == STEPS - 2
        assert_same(found, alone)


def test_frozen_parts_stay(crew: Crew, text: Path) -> None:
    more = {"optimizer": {**MUON, "lr_scale": {"global_transformer": 0, "decoder": 0.5}}}
    [[found, _]] = crew.run((2, exact_steps, muon_values(text, "shard", **more), 2))
    assert_same(found, exact_steps(muon_values(text, **more), 2))
    for name, weight in found.weights.items():
        assert torch.equal(weight, found.initial[name]) == name.startswith("global_transformer."), name
