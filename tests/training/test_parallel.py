"""However a step's batches and the model are divided among ranks, the step is the same."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bytelatent.commands.train import main as train
from bytelatent.data import Loader, Patcher
from bytelatent.device import autocast
from bytelatent.errors import UserError
from bytelatent.model import block, build_model
from bytelatent.model.attention import packed_mask
from bytelatent.model.loss import cross_entropy
from bytelatent.training.checks import check_settings
from bytelatent.training.distributed import parallelize
from bytelatent.training.distributed.parallelize import build_parallel_model, initialize_weights, make_plan
from bytelatent.training.distributed.ranks import Ranks, open_ranks, ranks_from
from tests.training.crew import Crew
from tests.training.plans import MODEL, PLANS, Taken, take_steps, values
from tests.training.tiny_runs import BLT, blt_run, byte_lm_run, settings


@pytest.fixture(scope="module")
def taken(crew: Crew, text: Path) -> dict[str, list[Taken]]:
    """What each plan gives, rank by rank."""
    found = {}
    for names in (["shard", "replicate"], ["tensor"], ["shard x tensor"], ["replicate x tensor"], ["hybrid"]):
        jobs = [(PLANS[name][0], take_steps, values(text, parallel=PLANS[name][1])) for name in names]
        found |= dict(zip(names, crew.run(*jobs), strict=True))
    return found


@pytest.fixture(scope="module")
def alone(text: Path) -> Taken:
    return take_steps(values(text))


@pytest.mark.parametrize("plan", PLANS)
def test_a_step_is_the_same_on_any_number_of_ranks(taken: dict[str, list[Taken]], alone: Taken, plan: str) -> None:
    for rank in taken[plan]:
        assert rank.initial.keys() == alone.initial.keys()
        for name, weight in alone.initial.items():
            assert torch.equal(rank.initial[name], weight), name
        for name, expected in alone.gradients.items():
            torch.testing.assert_close(
                rank.gradients[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()), msg=name
            )
        for row, expected in zip(rank.rows, alone.rows, strict=True):
            for key in ("step", "bytes_seen", "mean_patch_bytes", "lr"):
                assert row[key] == expected[key]
            assert row["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=2e-6)
            assert row["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=2e-5)
    first, *others = taken[plan]
    for rank in others:  # bit for bit among themselves
        assert [row["bits_per_byte"] for row in rank.rows] == [row["bits_per_byte"] for row in first.rows]
        assert all(torch.equal(rank.weights[name], weight) for name, weight in first.weights.items())


def test_neighbours_of_a_stack_are_gathered_together(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {**BLT, "decoder": {**BLT["decoder"], "num_layers": 2}}
    layers["global_transformer"] = {**BLT["global_transformer"], "num_layers": 5}
    with torch.device("meta"):
        model = build_model(settings(values(Path("x"), model=layers)).model)
    name_of = {part: name.replace("stack.blocks", "block") for name, part in model.named_modules()}

    def groups(at_once: int) -> list[list[str]]:
        monkeypatch.setattr(parallelize, "GROUP_WEIGHTS", at_once)
        return [[name_of[part] for part in parts] for parts in parallelize.fsdp_groups(model)]

    block = sum(weight.numel() for weight in model.global_transformer.stack.blocks[0].parameters())
    decoder = [f"decoder.{part}.{layer}" for layer in (0, 1) for part in ("cross_attention", "block")]
    encoder = ["encoder.block.0", "encoder.cross_attention.0"]
    middle = [f"global_transformer.block.{layer}" for layer in range(5)]
    assert groups(2 * block) == [encoder, middle[:2], middle[2:4], middle[4:], decoder]
    assert groups(2 * block - 1)[1:-1] == [[name] for name in middle]
    assert groups(2**28) == [encoder, middle, decoder]
    assert groups(1) == [[name] for name in (*encoder, *middle, *decoder)]  # larger than all: each for itself


def test_weights_lie_where_the_plan_says(taken: dict[str, list[Taken]], alone: Taken) -> None:
    whole = {name: weight.shape for name, weight in alone.weights.items()}
    looked_at = (
        "global_transformer.stack.blocks.0.feed_forward.up.weight",
        "global_transformer.stack.blocks.0.attention_norm.weight",
        "encoder.embedding.weight",
        "encoder.ngram_hash.tables.weight",
    )
    parts = {  # in how many parts each lies
        "shard": (2, 2, 2, 2),
        "replicate": (1, 1, 1, 1),
        "tensor": (2, 1, 2, 2),
        "shard x tensor": (4, 2, 4, 4),
        "replicate x tensor": (2, 1, 1, 4),
        "hybrid": (2, 2, 2, 2),
    }
    for plan, expected in parts.items():
        for rank in taken[plan]:
            assert rank.held == rank.gathered
            for name, count in zip(looked_at, expected, strict=True):
                rows = -(-whole[name][0] // count), -(-whole[name][0] // count) * count - whole[name][0]
                assert rank.held[name] in {(rows[0], *whole[name][1:]), (rows[0] - rows[1], *whole[name][1:])}, plan


def test_clipping_knows_the_norm_over_all_ranks(crew: Crew, text: Path) -> None:
    optimizer = {"lr": 3e-3, "warmup_steps": 0, "clip": 1e-2}
    more = {"optimizer": optimizer, "parallel": PLANS["shard x tensor"][1]}
    [[rank, *_]] = crew.run((4, take_steps, values(text, **more), 1))
    for gradient, expected in zip(
        rank.gradients.values(), take_steps(values(text, optimizer=optimizer), 1).gradients.values(), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert sum(float(g.square().sum()) for g in rank.gradients.values()) == pytest.approx(1e-4, rel=1e-3)


def test_weights_that_stay_gathered_change_nothing_but_calls(
    crew: Crew, text: Path, taken: dict[str, list[Taken]]
) -> None:
    stays = {**PLANS["shard"][1], "reshard_after_forward": False}
    jobs = [(2, num_gathers, values(text, parallel=parallel)) for parallel in (PLANS["shard"][1], stays)]
    [[found, *_], [found_staying, *_]] = crew.run(*jobs)
    [ranks] = crew.run((2, take_steps, values(text, parallel=stays)))
    assert 0 < found_staying < found
    for rank, before in zip(ranks, taken["shard"], strict=True):
        assert all(torch.equal(rank.weights[name], weight) for name, weight in before.weights.items())


def num_gathers(given: dict[str, Any]) -> int:
    with OperationCounter() as counter:
        take_steps(given, 1)
    return sum(count for name, count in counter.counts.items() if "allgather" in name)


class OperationCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_a_model_without_cross_attention_is_divided_alike(crew: Crew, text: Path) -> None:
    more: dict[str, Any] = {"model": {**MODEL, "cross_attention": None, "joined_bytes": 3}}
    [[rank, *_]] = crew.run((2, take_steps, values(text, **more), 1))
    for name, expected in take_steps(values(text, **more), 1).gradients.items():
        torch.testing.assert_close(rank.gradients[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_bfloat16_is_that_of_one_process(crew: Crew, text: Path) -> None:
    jobs = [(2, take_steps, values(text, dtype="bfloat16", parallel={"data": data})) for data in ("shard", "replicate")]
    alone = take_steps(values(text, dtype="bfloat16"))
    exact = take_steps(values(text))
    for job in crew.run(*jobs):
        for row, expected, other in zip(job[0].rows, alone.rows, exact.rows, strict=True):
            # Norms' weights are sent in bfloat16, too, where one process has them in float32.
            assert row["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=5e-4)
            assert row["bits_per_byte"] != other["bits_per_byte"]


def head_dims_of_graphs(values: dict[str, Any], layers: int) -> list[str | None]:
    """Of each graph that one of two ranks compiles for a global transformer of so many layers; None: it has none."""
    values["model"]["global_transformer"] |= {"num_layers": layers, "num_heads": 2}
    found: list[str | None] = []

    def backend(graph: Any, inputs: Any) -> Any:
        given = {node.name: node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"}
        rotary = [value for name, value in given.items() if "rotary" in name]
        found.append(str(rotary[0].shape[1] * 2) if rotary else None)
        return graph

    asked, compiled = settings(values), torch.compile
    torch._dynamo.reset()
    with open_ranks("cpu", 1) as (ranks, device), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda call: compiled(call, backend=backend))
        patch.setattr(block, "build_mask", lambda document, window, _, n: packed_mask(document, window, n))  # CUDA's
        plan = make_plan(asked.parallel, ranks, device)
        model = build_parallel_model(asked.model, plan, device, torch.bfloat16, compiled=True)
        initialize_weights(model, asked.model)
        with autocast(device, torch.bfloat16):
            cross_entropy(model, next(Loader(asked.data, 0, Patcher(settings(values).patching)))).backward()
    return found


@pytest.mark.parametrize("plan", ["shard", "tensor"])
def test_alike_blocks_share_a_graph(crew: Crew, text: Path, plan: str) -> None:
    given = values(text, parallel=PLANS[plan][1])
    few, many = (crew.run((2, head_dims_of_graphs, given, layers))[0][0] for layers in (2, 4))
    assert few == many
    assert len(few) > 2
    assert set(few) == {None, "8", "16"}  # numbers, not symbols of any size


class Counts(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.of[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_activations_computed_again_change_nothing(text: Path, alone: Taken) -> None:
    counts = {}
    for how in ("none", "selective", "full"):
        with Counts() as counted:
            taken = take_steps(values(text, parallel={"activation_checkpointing": how}), 1)
        counts[how] = counted.of
        assert taken.rows == alone.rows[:1]
        assert all(torch.equal(taken.gradients[name], gradient) for name, gradient in alone.gradients.items())
    none, selective, full = counts["none"], counts["selective"], counts["full"]
    assert selective["mm"] == none["mm"] < full["mm"]
    assert none["silu"] < selective["silu"] == full["silu"]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert 0 < none[attention] == selective[attention] < full[attention]


@pytest.mark.parametrize(
    ("world", "parallel", "model", "line"),
    [
        (3, {"tensor": 2}, BLT, "parallel.tensor: 3 processes are no multiple of 2"),
        (4, {"tensor": 4}, BLT, "the global transformer's num_heads 2 is no multiple of 4"),
        (4, {"tensor": 4}, MODEL, "the global transformer's num_kv_heads 2 is no multiple of 4"),
        (2, {"tensor": 2}, byte_lm_run(Path("x"), Path("x"))["model"], "a byte LM has none"),
        (6, {"data": "hybrid", "replicas": 4}, BLT, "parallel.replicas: 6 processes are no multiple of 4"),
    ],
)
def test_ranks_that_cannot_be_divided_are_one_line(
    world: int, parallel: dict[str, Any], model: dict[str, Any], line: str
) -> None:
    patching = {"mode": "space"} if model.get("kind") == "blt" else None
    asked = byte_lm_run(Path("x"), Path("x"), model=model, patching=patching, parallel=parallel)
    with pytest.raises(UserError, match=line):
        check_settings(settings(asked), world, torch.device("cpu"))


def complained(who: set[int]) -> str:
    """How one of some ranks ends when some of them complain of something."""

    def check() -> None:
        if ranks.rank in who:
            raise UserError(f"rank {ranks.rank} will not do")

    with open_ranks("cpu", 1) as (ranks, _):
        try:
            ranks.on_all(check)
        except (UserError, SystemExit) as error:
            return str(error)
    return "goes on"


def test_of_the_ranks_that_complain_one_is_heard(crew: Crew) -> None:
    jobs = crew.run((3, complained, {0, 1, 2}))
    jobs += crew.run((3, complained, {1, 2}))
    jobs += crew.run((3, complained, set()))
    assert jobs == [["rank 0 will not do", "2", "2"], ["2", "rank 1 will not do", "2"], ["goes on"] * 3]


def trained(values: dict[str, Any]) -> str:
    """How a rank ends, if the others need not wait for the first one to speak."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bytelatent.training.distributed.ranks.REPORT_SECONDS", 0.0)
        try:
            train([f"{key}={json.dumps(value)}" for key, value in values.items()])
        except (UserError, SystemExit) as error:
            return str(error)
    return "done"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ({"device": "cpu:0"}, "device: 'cpu:0' is one, and 2 processes take one each; use device=cuda"),
        (
            {"parallel": {"data": "hybrid", "replicas": 3}},
            "parallel.replicas: 2 processes are no multiple of 3; start ",
        ),
    ],
)
def test_what_all_ranks_complain_of_is_said_once(
    crew: Crew, text: Path, tmp_path: Path, more: dict[str, Any], line: str
) -> None:
    """And before anything is written: a byte LM, a threshold."""
    [[first, other]] = crew.run((2, trained, blt_run(tmp_path / "run", text, Path("nowhere"), **more)))
    assert first.startswith(line)
    assert other == "2"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parallel", [{"data": "hybrid"}, {"replicas": 2}])
def test_replicas_belong_to_hybrid(parallel: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="parallel: data=hybrid and replicas go together"):
        settings(byte_lm_run(Path("x"), Path("x"), parallel=parallel))


PLACE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"RANK": None},
            "WORLD_SIZE=2 is of several processes, and RANK is not set; start it by torchrun",
        ),
        ({"MASTER_ADDR": None}, "and MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "and MASTER_PORT is not set"),
        ({"RANK": "a"}, "RANK: 'a' is no number"),
        ({"RANK": "-1"}, "RANK: '-1' is no number"),
        ({"RANK": "2"}, "RANK=2: ranks of WORLD_SIZE=2 are numbered from 0"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: 'x' is no number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is no number"),
        ({"WORLD_SIZE": "0"}, "RANK=1: ranks of WORLD_SIZE=0 are numbered from 0"),
    ],
)
def test_half_an_environment(changed: dict[str, str | None], message: str) -> None:
    """As a shell may have left it: one line before anything is waited for."""
    environment = {name: text for name, text in {**PLACE, **changed}.items() if text is not None}
    with pytest.raises(UserError) as caught:
        ranks_from(environment)
    assert message in str(caught.value)


def test_a_place_among_processes() -> None:
    assert ranks_from(PLACE) == Ranks(1, 2, 0)
    for alone in ({}, {"RANK": "3"}, {"LOCAL_RANK": "1"}, {**PLACE, "WORLD_SIZE": "1"}):
        assert ranks_from(alone) == Ranks()
