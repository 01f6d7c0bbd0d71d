"""One step after another: the optimizer, its schedule, what is logged, what is learned."""

import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bytelatent.data import Batch, Loader
from bytelatent.model import PatchedStream, build_model
from bytelatent.model.loss import cross_entropy
from bytelatent.patching import Calibration
from bytelatent.training import TrainSettings, read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.checkpoint.storage import CpuCopies
from bytelatent.training.distributed.parallelize import ParallelPlan
from bytelatent.training.gradients import Gradients
from bytelatent.training.optimizer import build_optimizer
from bytelatent.training.schedule import learning_rate
from bytelatent.training.settings import OptimizerSettings
from bytelatent.weights import fingerprint, load, load_byte_lm
from tests.training.tiny_runs import (
    BLT,
    blt_run,
    byte_lm_run,
    checkpoints,
    log_of,
    losses,
    settings,
    unigram_bits,
    write_text,
)

CPU = torch.device("cpu")


def one_train_step(asked: TrainSettings, state: TrainState, model: nn.Module) -> dict[str, Any]:
    gradients = Gradients(lambda batch: cross_entropy(model, batch), CPU)
    return loop.Trainer(asked, ParallelPlan(), state, gradients).train_step()


@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_the_learning_rate_rises_and_falls(tmp_path: Path, text: Path, warmup_steps: int) -> None:
    optimizer = {"lr": 2e-3, "warmup_steps": warmup_steps, "final_lr_ratio": 0.25}
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=12, optimizer=optimizer)))
    rates = [row["lr"] for row in read_metrics(run / "metrics.jsonl")]
    assert rates[:warmup_steps] == pytest.approx([2e-3 * (i + 1) / warmup_steps for i in range(warmup_steps)])
    falling = rates[warmup_steps:]
    assert falling[0] == pytest.approx(2e-3)
    assert all(earlier > later for earlier, later in pairwise(falling))
    assert falling[-1] == pytest.approx(0.25 * 2e-3)


def test_half_way_down_the_cosine() -> None:
    asked = OptimizerSettings(lr=1.0, warmup_steps=10, final_lr_ratio=0.2)
    assert learning_rate(10, 0.5, asked) == pytest.approx(0.6)
    assert learning_rate(10, 1 / 3, asked) == pytest.approx(0.2 + 0.8 * 0.75)
    assert learning_rate(10, 7.0, asked) == pytest.approx(0.2)  # the clock may run a little over


def test_only_matrices_decay() -> None:
    model = build_model(settings(byte_lm_run(Path("x"), Path("x"), model=BLT, patching={"mode": "space"})).model)
    optimizer = build_optimizer(model, OptimizerSettings(weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(names) == len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    kept = {name for name, value in names.items() if value == 0.0}
    assert {name for name, value in names.items() if value == 0.3} == names.keys() - kept
    assert kept == {name for name in names if "norm" in name or "embedding" in name or "ngram_hash" in name}
    assert "encoder.ngram_hash.tables.weight" in kept
    assert "decoder.output.weight" not in kept


def one_step(batches: list[Batch], model: nn.Module, **optimizer: Any) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The metrics of a step, and the gradient that AdamW was given for each weight."""
    values = byte_lm_run(Path("x"), Path("x"), optimizer={"accumulation": len(batches), "beta1": 0.5, **optimizer})
    asked = settings(values)
    adam = build_optimizer(model, asked.optimizer)
    state = TrainState(model, adam, iter(batches))  # type: ignore[arg-type]
    row = loop.Trainer(
        asked, ParallelPlan(), state, Gradients(lambda batch: cross_entropy(model, batch), CPU)
    ).train_step()
    return row, [adam.state[parameter]["exp_avg"] / (1 - 0.5) for parameter in model.parameters()]


@pytest.mark.parametrize("clip", [1e9, 1e-3])
def test_two_batches_accumulated_are_one_batch_of_both(text: Path, clip: float) -> None:
    small = settings(byte_lm_run(Path("x"), text, data={"shuffle_buffer": 1}))
    large = settings(byte_lm_run(Path("x"), text, data={"shuffle_buffer": 1, "batch_bytes": 512}))
    loader = Loader(small.data, 0)
    parts, both = [next(loader), next(loader)], next(Loader(large.data, 0))
    assert [*parts[0].targets.tolist(), *parts[1].targets.tolist()] == both.targets.tolist()
    # Where the two parts meet, a piece is cut: cut it in the large batch, too, so that both read the same.
    position = torch.cat([part.stream.position for part in parts])
    document = torch.cat([parts[0].stream.document, parts[1].stream.document + 1000])
    both = Batch(type(both.stream)(both.stream.ids, document, position), both.targets, 512, both.num_bytes, 0)
    torch.manual_seed(0)
    one, other = build_model(small.model), build_model(small.model)
    other.load_state_dict(one.state_dict())
    (accumulated, gradients), (at_once, expected) = one_step(parts, one, clip=clip), one_step([both], other, clip=clip)
    assert accumulated["bits_per_byte"] == pytest.approx(at_once["bits_per_byte"], rel=1e-6)
    assert accumulated["gradient_norm"] == pytest.approx(at_once["gradient_norm"], rel=1e-4)
    assert accumulated["bytes_seen"] == at_once["bytes_seen"] == both.num_bytes
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_gradients_are_averaged_over_all_targets_and_clipped(text: Path) -> None:
    asked = settings(byte_lm_run(Path("x"), text))
    loader = Loader(asked.data, 0)
    batches = [next(loader), next(loader)]
    torch.manual_seed(0)
    model = build_model(asked.model)
    nats = [cross_entropy(model, batch) for batch in batches]
    expected = torch.autograd.grad(torch.stack(nats).sum() / 512, list(model.parameters()))
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected))
    row, gradients = one_step(batches, model, clip=norm / 3)
    assert row["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted / 3, rtol=1e-3, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


SPEEDS = {
    *("bytes_per_second", "patches_per_second", "model_flops_utilisation", "data_wait", "peak_memory_gib"),
    *("threads", "seconds", "patches_seen"),
}


@pytest.mark.parametrize("kind", ["byte LM", "BLT"])
def test_a_small_text_is_learned_by_heart(
    tmp_path: Path, byte_lm: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = write_text(tmp_path / "few.jsonl", seed=3, num_documents=4)
    optimizer = {"lr": 1e-2, "warmup_steps": 10, "weight_decay": 0.0}
    more: dict[str, Any] = {"optimizer": optimizer, "checkpoint": {"every": 1000}, "data": {"context": 512}}

    def last_bits(run: Path) -> float:
        values = (
            byte_lm_run(run, few, 200, **dict(more)) if kind == "byte LM" else blt_run(run, few, byte_lm, 200, **more)
        )
        rows = read_metrics(train(settings(values)) / "metrics.jsonl")
        return sum(row["bits_per_byte"] for row in rows[-5:]) / 5

    bound = 0.35 * unigram_bits(few)
    assert last_bits(tmp_path / "run") < bound
    if kind == "BLT":
        return

    def shuffled(model: Any, batch: Batch) -> torch.Tensor:
        order = torch.randperm(len(batch.targets))
        return cross_entropy(model, Batch(batch.stream, batch.targets[order], batch.num_targets, batch.num_bytes, 0))

    monkeypatch.setattr(loop, "cross_entropy", shuffled)
    assert last_bits(tmp_path / "shuffled") > 2 * bound


def test_bfloat16_stays_finite_and_weights_stay_float32(tmp_path: Path, text: Path, byte_lm: Path) -> None:
    run = train(settings(blt_run(tmp_path / "run", text, byte_lm, dtype="bfloat16")))
    exact = train(settings(blt_run(tmp_path / "exact", text, byte_lm)))
    one, other = losses(run), losses(exact)
    assert one != other
    for (_, _, bits, _), (_, _, expected, _) in zip(one, other, strict=True):
        assert bits is not None
        assert math.isfinite(bits)
        assert expected is not None
        assert bits == pytest.approx(expected, rel=0.03)
    assert {value.dtype for value in load(run).model.state_dict().values()} == {torch.float32}


def test_a_run_by_the_clock_ends(tmp_path: Path, text: Path) -> None:
    run = train(settings({**byte_lm_run(tmp_path / "run", text), "steps": None, "minutes": 0.003}))
    rows = read_metrics(run / "metrics.jsonl")
    state = torch.load(run / "checkpoints" / checkpoints(run)[-1] / "progress.pt", weights_only=True)
    assert checkpoints(run)[-1] == f"step-{rows[-1]['step']:08d}"
    assert state["seconds"] >= 0.18
    assert rows[0]["bytes_per_second"] is None  # the first step warms up and does not count
    longest = rows[0]["bytes_seen"] / min(row["bytes_per_second"] for row in rows[1:])
    assert state["seconds"] - 0.18 <= longest * 1.1  # no step begins after the end


def test_all_the_time_between_steps_counts_but_that_of_validation(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)

    def passes(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(loop.Watchdog, "progress", lambda *_: passes(0.1))  # as if a device still computed
    monkeypatch.setattr(loop.Trainer, "evaluate", lambda self, *_: passes(5) or {"step": self.state.step})
    values = {**byte_lm_run(tmp_path / "run", text, steps=4, data={"valid": str(text)}), "validation": {"every": 2}}
    run = train(settings(values))
    state = torch.load(run / "checkpoints" / checkpoints(run)[-1] / "progress.pt", weights_only=True)
    assert state["seconds"] == pytest.approx(0.3)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row.get("bytes_per_second")]
    assert len(rows) == 3
    assert sum(values["data"]["batch_bytes"] / row["bytes_per_second"] for row in rows) == pytest.approx(0.3, rel=0.02)


def test_validation_and_training_have_one_shape(
    tmp_path: Path, text: Path, byte_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would be compiled for itself."""
    seen: list[tuple[bool, tuple[int, int]]] = []

    def noted(model: Any, batch: Batch) -> torch.Tensor:
        assert isinstance(batch.stream, PatchedStream)
        seen.append((model.training, (len(batch.targets), batch.stream.num_patches)))
        return cross_entropy(model, batch)

    monkeypatch.setattr(loop, "cross_entropy", noted)
    values = blt_run(tmp_path / "run", text, byte_lm, steps=2)
    values["data"] |= {"valid": str(text), "batch_patches": values["data"]["batch_bytes"]}
    train(settings({**values, "validation": {"every": 1, "max_bytes": 1000}}))
    assert {is_training for is_training, _ in seen} == {True, False}
    assert len({shape for _, shape in seen}) == 1


@pytest.mark.parametrize("asynchronous", [True, False])
def test_memory_for_copies_is_got_once_after_the_first_step(
    tmp_path: Path, text: Path, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("prepare", "take"):
        call = getattr(CpuCopies, name)
        monkeypatch.setattr(CpuCopies, name, lambda *given, name=name, call=call: (done.append(name), call(*given))[1])
    train(settings(byte_lm_run(tmp_path / "run", text, 6, checkpoint={"every": 2, "asynchronous": asynchronous})))
    assert done == (["prepare", "take", "take", "take"] if asynchronous else [])


def test_metrics_have_their_keys_and_add_up(tmp_path: Path, text: Path, byte_lm: Path) -> None:
    valid = write_text(tmp_path / "valid.jsonl", seed=1)
    run = train(
        settings(
            blt_run(
                tmp_path / "run",
                text,
                byte_lm,
                steps=11,
                log_every=3,
                data={"valid": str(valid)},
                validation={"every": 4, "max_bytes": 700},
            )
        )
    )
    rows = read_metrics(run / "metrics.jsonl")
    trained = [row for row in rows if "bits_per_byte" in row]
    validated = [row for row in rows if "validation_bits_per_byte" in row]
    assert [row["step"] for row in trained] == [3, 6, 9, 11]
    assert [row["step"] for row in validated] == [4, 8, 11]
    assert all(
        row.keys() == {"step", "bytes_seen", "bits_per_byte", "lr", "gradient_norm", "mean_patch_bytes", *SPEEDS}
        for row in trained
    )
    assert all(
        row.keys() == {"step", "bytes_seen", "validation_bits_per_byte", "validation_bytes"} for row in validated
    )
    assert all(row["validation_bytes"] == 700 for row in validated)
    resolved = settings(blt_run(run, text, byte_lm, calibration=None, patching={"mode": "space"}))
    loader = Loader(resolved.data, resolved.seed)
    seen = 0
    for step in range(1, 12):
        seen += next(loader).num_bytes
        assert all(row["bytes_seen"] == seen for row in rows if row["step"] == step)


def test_calibration_is_written_and_done_once(
    tmp_path: Path, text: Path, byte_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = write_text(tmp_path / "valid.jsonl", seed=1)
    run = tmp_path / "run"
    train(settings(blt_run(run, text, byte_lm, steps=10, data={"valid": str(valid)})))
    found = Calibration.model_validate_json((run / "calibration.json").read_text())
    assert found.wanted_patch_bytes == 4.0
    assert found.mean_patch_bytes == pytest.approx(4.0, rel=0.05)
    assert found.held_out_mean_patch_bytes == pytest.approx(4.0, rel=0.25)
    assert found.window == 32
    assert found.data == str(text)
    assert 1900 < found.data_bytes < 2100
    assert found.byte_lm == fingerprint(load_byte_lm(byte_lm))
    assert f"threshold: {found.threshold}" in (run / "settings.yaml").read_text()
    config = load(run).config
    assert config.patching is not None
    assert config.patching.threshold == found.threshold
    assert config.calibration == found
    trained = [row["mean_patch_bytes"] for row in read_metrics(run / "metrics.jsonl") if "mean_patch_bytes" in row]
    assert 2.5 < sum(trained) / len(trained) < 4.5  # BOS and EOS make patches of their own, which hold no bytes

    def again(*_: Any) -> None:
        raise AssertionError("calibrated again")

    monkeypatch.setattr("bytelatent.training.run_setup.calibrate_on", again)
    values = blt_run(run, text, tmp_path / "gone", steps=12, data={"valid": str(valid)})  # its own copy is enough
    train(settings(values))
    assert json.loads((run / "calibration.json").read_text())["threshold"] == found.threshold


def test_batches_that_are_smaller_than_other_settings_ask_are_named(
    tmp_path: Path, text: Path, byte_lm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def said(name: str, **data: int) -> list[str]:
        train(settings(blt_run(tmp_path / name, text, byte_lm, steps=3, data=data)))
        return [line for line in log_of(caplog).splitlines() if line.startswith("data.")]

    assert said("full", context=64, batch_bytes=256, batch_patches=100) == []
    assert said("short", context=64, batch_bytes=48) == [
        "data.batch_bytes=48 is less than data.context=64: no piece of a document is longer than 48 ids"
    ]
    [line] = said("few", context=64, batch_bytes=256, batch_patches=2)
    assert line.startswith("data.batch_patches=2 is full before data.batch_bytes=256 is: the first batch holds ")
    [line] = said("half", context=64, batch_bytes=256, batch_patches=20)
    wanted = int(line.rpartition("data.batch_patches=")[2].split()[0])
    assert said("as said", context=64, batch_bytes=256, batch_patches=2 * wanted) == []
