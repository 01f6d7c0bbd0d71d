"""Statistics of layers, against what a slow and obvious computation gives; they change nothing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bytelatent.data import Batch
from bytelatent.data.packing import Piece, pack
from bytelatent.model import Block, BLTSettings, ByteLMSettings, CrossAttention, build_model
from bytelatent.model.loss import cross_entropy
from bytelatent.training import read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.training.profiling.steps import attention_entropy, first_ids, layer_statistics, weights_by_layer
from tests.training.crew import Crew
from tests.training.plans import PLANS, train_as, values
from tests.training.tiny_runs import BLT, BYTE_LM, assert_equal_runs, blt_run, byte_lm_run, settings, weights

OF_LAYERS = ("weight_norms", "gradient_norms", "update_norms")


def batch_of(num_documents: int, size: int, patched: bool, padded: int = 0) -> Batch:
    draw = np.random.default_rng(0)
    pieces = []
    for _ in range(num_documents):
        ids = draw.integers(4, 260, size + 1).astype(np.uint16)
        ids[0] = 1
        starts = draw.random(size) < 0.3 if patched else None
        pieces.append(Piece(ids, next_starts=starts))
    return pack(pieces, num_documents * size + padded, num_documents * size + 1 if patched else None)


def model_of(values: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return build_model((ByteLMSettings if values["kind"] == "byte_lm" else BLTSettings).parse(values))


def test_a_blt_is_the_same_bit_for_bit(tmp_path: Path, text: Path, byte_lm: Path) -> None:
    more: dict[str, Any] = {"optimizer": {"lr": 3e-3, "warmup_steps": 3, "hash_gradients": "rows"}}
    plain = train(settings(blt_run(tmp_path / "plain", text, byte_lm, **more)))
    watched = train(settings(blt_run(tmp_path / "watched", text, byte_lm, statistics_every=4, **more)))
    rows = read_metrics(watched / "metrics.jsonl")
    found = [row for row in rows if row.get("kind") == "statistics"]
    assert [row["step"] for row in found] == [4, 8, 12]
    whole = [row for row in rows if "kind" not in row]
    assert [row["bytes_seen"] for row in found] == [row["bytes_seen"] for row in whole if row["step"] in (4, 8, 12)]
    (watched / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
    assert_equal_runs(watched, plain)
    names = ["encoder.embedding", "encoder.ngram_hash.tables", "encoder.blocks.0", "encoder.cross_attention.0"]
    assert set(names) < set(found[0]["update_norms"])
    assert all(value > 0 for row in found for key in OF_LAYERS for value in row[key].values())


def test_norms_are_those_of_the_weights(tmp_path: Path, text: Path) -> None:
    """The weights before and after a step stand in checkpoints, and norms over all layers add up to the whole's."""
    values = byte_lm_run(tmp_path / "run", text, steps=4, statistics_every=4, checkpoint={"every": 3})
    run = train(settings(values))
    *_, row = [row for row in read_metrics(run / "metrics.jsonl") if row.get("kind") == "statistics"]
    after = weights(run)
    early = train(settings({**values, "run": str(tmp_path / "early"), "steps": 4}))
    before = load_file(early / "checkpoints" / "step-00000003" / "model.safetensors")
    for key, tensors in {"weight_norms": before, "update_norms": {n: after[n] - before[n] for n in after}}.items():
        blocks = math.sqrt(sum(float(t.double().square().sum()) for n, t in tensors.items() if "blocks.0." in n))
        assert row[key]["blocks.0"] == pytest.approx(blocks, rel=1e-5)
        total = math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))
        assert math.hypot(*row[key].values()) == pytest.approx(total, rel=1e-5)
    step = next(r for r in read_metrics(run / "metrics.jsonl") if r["step"] == 4 and "gradient_norm" in r)
    clipped = min(step["gradient_norm"], 1.0)
    assert math.hypot(*row["gradient_norms"].values()) == pytest.approx(clipped, rel=1e-4)


def test_divided_runs_have_the_same_statistics(crew: Crew, tmp_path: Path, text: Path) -> None:
    """Of the same batches, whether each rank holds all weights or gathers them."""
    runs = {name: tmp_path / name for name in ("shard", "replicate")}
    for name, run in runs.items():
        crew.run((2, train_as, values(text, run, steps=4, statistics_every=2, parallel=PLANS[name][1])))
    found = [
        [row for row in read_metrics(run / "metrics.jsonl") if row.get("kind") == "statistics"] for run in runs.values()
    ]
    assert [row["step"] for row in found[0]] == [row["step"] for row in found[1]] == [2, 4]
    for shard, replicate in zip(*found, strict=True):
        for key in (*OF_LAYERS, "activation_rms", "attention_entropies"):
            assert shard[key] == pytest.approx(replicate[key], rel=1e-4)


@pytest.mark.parametrize("values", [BYTE_LM, BLT], ids=["byte LM", "BLT"])
@pytest.mark.parametrize("size", [1, 7, 30, 50])
def test_the_head_of_a_batch_is_computed_as_the_whole(values: dict[str, Any], size: int) -> None:
    model, batch = model_of(values), batch_of(3, 20, values is BLT)
    with torch.no_grad():
        torch.testing.assert_close(
            model(first_ids(batch.stream, size)), model(batch.stream)[:size], rtol=1e-5, atol=1e-5
        )


def test_attention_entropy_is_that_of_the_softmax() -> None:
    torch.manual_seed(0)
    q_THE, k_TJE, allowed = 3 * torch.randn(9, 4, 6), torch.randn(9, 2, 6), torch.ones(9, 9).tril().bool()
    allowed[5:, :3] = False
    found = attention_entropy(q_THE, k_TJE, allowed)
    for h in range(4):
        for t in range(9):
            seen = [s for s in range(9) if allowed[t, s]]
            scores = np.array([float(q_THE[t, h].double() @ k_TJE[s, h // 2].double()) / 6**0.5 for s in seen])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            assert float(found[h, t]) == pytest.approx(-float((p * np.log(p)).sum()), abs=1e-5)


def looked_at(model: nn.Module, batch: Batch) -> dict[str, Any]:
    cross_entropy(model, batch).backward()
    with layer_statistics(model, lambda batch: cross_entropy(model, batch), batch) as row:
        pass
    return row


@pytest.mark.parametrize("values", [BYTE_LM, BLT], ids=["byte LM", "BLT"])
@pytest.mark.parametrize("ids", [(20, 40), (50, 64)])
def test_activations_and_attention_of_every_block(values: dict[str, Any], ids: tuple[int, int]) -> None:
    """With queries and keys of zeros attention is even, so that its entropy is that of the number of keys seen."""
    num_ids, size = ids  # two windows are 64
    model, batch = model_of(values), batch_of(2, num_ids, values is BLT, padded=9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("attention.query.weight"):
                parameter.zero_()
    outputs: dict[str, Tensor] = {}
    for name, part in model.named_modules():
        if isinstance(part, Block | CrossAttention):
            part.register_forward_hook(lambda _, __, out, name=name: outputs.update({name.replace("stack.", ""): out}))
    row = looked_at(model, batch)
    with torch.no_grad():
        model(first_ids(batch.stream, size))
    blocks = {name for name in outputs if "cross" not in name}
    assert row["attention_entropies"].keys() == blocks
    assert row["activation_rms"].keys() == outputs.keys()
    for name, out in outputs.items():
        assert row["activation_rms"][name] == pytest.approx(out.double().square().mean().sqrt().item(), rel=1e-5)
    even = sum(math.log(min(int(p) + 1, 32)) for p in batch.stream.position[:size]) / size
    for name in blocks - {"global_transformer.blocks.0"}:
        assert row["attention_entropies"][name] == pytest.approx(even, rel=1e-5)
    if values is BLT:
        positions = first_ids(batch.stream, size).patch_position  # pyright: ignore[reportAttributeAccessIssue]
        even = sum(math.log(int(p) + 1) for p in positions) / len(positions)
        assert row["attention_entropies"]["global_transformer.blocks.0"] == pytest.approx(even, rel=1e-5)


def test_blocks_that_are_compiled_are_seen_too() -> None:
    model, batch = model_of(BLT), batch_of(2, 20, patched=True)
    expected = looked_at(model, batch)
    compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        compiled.append(1)
        return graph.forward

    model = model_of(BLT)
    for part in model.modules():
        if isinstance(part, Block | CrossAttention):
            part.compile(backend=count)
    cross_entropy(model, batch).backward()
    model.zero_grad()
    num_compiled = len(compiled)
    assert num_compiled > 0
    assert looked_at(model, batch) == expected
    assert len(compiled) == num_compiled


def test_every_weight_is_in_one_layer() -> None:
    model = model_of(BLT)
    found = [id(parameter) for own in weights_by_layer(model).values() for parameter in own]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("every", [None, 4])
def test_other_steps_are_passed_over(
    tmp_path: Path, text: Path, every: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "layer_statistics", lambda *_: pytest.fail("computed"))
    train(settings(byte_lm_run(tmp_path / "run", text, steps=3, statistics_every=every)))
