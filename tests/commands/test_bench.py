"""`blt bench train`, as a person meets it."""

import gc
import io
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bytelatent import device
from bytelatent.cli import app, main
from bytelatent.commands import bench
from bytelatent.commands.bench import BYTES_PER_WEIGHT
from bytelatent.model import PRESETS, preset
from bytelatent.model.flops import costs, training_flops
from bytelatent.training.profiling import measure
from bytelatent.training.profiling.measure import random_batch
from tests.model.tiny import tiny_blt_settings


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls are timed, and rates are known."""

    measured = measure.seconds_of
    monkeypatch.setattr(measure, "seconds_of", lambda *given, **_: measured(*given[:2], times=2, warm=1))
    monkeypatch.setattr(measure, "matrix_rate", lambda device, dtype: 5e10)
    monkeypatch.setattr(measure, "copy_rate", lambda device: 8e9)


def measured(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["bench", "train", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_demo_on_a_cpu() -> None:
    found = measured("demo-blt", "--bytes", "100", "--device", "cpu", "--dtype", "float32")
    rows = found["rows"]
    assert [(row["hash_gradients"], row["num_bytes"], row["work"]) for row in rows] == [
        (kind, 100, work) for kind in ("dense", "rows") for work in ("gradients", "step")
    ]
    cpu = torch.device("cpu")
    for row in rows:
        patches = measure.num_patches(random_batch(row["num_bytes"], cpu)[0])
        assert patches
        assert row["bytes_per_second"] == pytest.approx(row["num_bytes"] / row["seconds"])
        assert row["patches_per_second"] == pytest.approx(patches / row["seconds"])
        flops = training_flops(preset("demo-blt"), row["num_bytes"] / patches, row["num_bytes"])
        assert row["of_measured_rate"] == pytest.approx(flops * row["bytes_per_second"] / 5e10)
        assert row["of_stated_peak"] is None
        assert row["peak_memory"] > 2**20
    assert found["too_large"] == []
    parts = costs(preset("demo-blt"))
    weights = sum(part.num_parameters for part in parts)
    tables = next(part.num_parameters for part in parts if part.name == "n-gram hash tables")
    assert [split["num_bytes"] for split in found["splits"]] == [100, 100]
    for split, moved in zip(found["splits"], (weights, weights - tables), strict=True):
        shares = {share["kind"]: share for share in split["shares"]}
        assert sum(share["share"] for share in shares.values()) == pytest.approx(1)
        assert shares["products"]["share"] > 0.1
        assert all(share["seconds"] > 0 for share in shares.values()), shares
        assert shares["optimizer and clipping"]["needed"] == pytest.approx(moved * BYTES_PER_WEIGHT / 8e9)
        assert shares["rest"]["share"] < 0.3


@pytest.mark.parametrize("fits", [True, False])
def test_one_model_is_gone_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch, fits: bool) -> None:
    """Two of them would not fit where one does."""
    monkeypatch.setattr(bench, "preset", lambda _: tiny_blt_settings())
    seen: list[weakref.ref[torch.nn.Module]] = []
    alive: list[int] = []

    class Noted(measure.SyntheticTraining):
        def __init__(self, plan: measure.TrainingSetup):
            alive.append(sum(model() is not None for model in seen))
            super().__init__(plan)
            self.itself = self  # as what is compiled holds it
            seen.append(weakref.ref(self.model))

        def forward_backward(self, *given: Any) -> None:
            if not fits and len(seen) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().forward_backward(*given)

    monkeypatch.setattr(bench, "SyntheticTraining", Noted)
    gc.disable()
    try:
        measured("tiny", "--bytes", "64", "--device", "cpu", "--dtype", "float32")
    finally:
        gc.enable()
    assert alive == [0, 0]


def test_the_table_of_a_byte_lm() -> None:
    arguments = ["bench", "train", "demo-byte-lm", "--bytes", "200,100", "--device", "cpu"]
    arguments += ["--checkpointing", "full"]
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, arguments, catch_exceptions=False)
    assert "demo-byte-lm on cpu (threads: " in result.stdout
    assert "activation checkpointing full" in result.stdout
    assert "products 0.05 TFLOP/s (rate)" in result.stdout
    assert "copies 8 GB/s" in result.stdout
    for word in ("gradients", "step", "where a step of 100 bytes goes", "attention", "norms and pointwise"):
        assert word in result.stdout
    assert len([line for line in result.stdout.splitlines() if line.split()[:1] == ["200"]]) == 2
    assert max(map(len, result.stdout.splitlines()[3:])) <= 80
    for absent in ("hash", "patch", "peak"):  # a byte LM has none
        assert absent not in result.stdout
    assert "measuring: gradients of 200 bytes" in result.stderr


def test_the_widest_table_fits_a_terminal() -> None:
    row = bench.Speed("rows", 1_048_576, "gradients", 12.3456, 1_234_567, 274_348, 1.111, 1.111, 140 * 2**30)
    output = io.StringIO()
    Console(file=output, width=80).print(bench._speeds(None, [row]))
    shown = output.getvalue()
    for word in ("1,048,576", "gradients", "12,345.6", "1,234,567", "274,348", "111.1%", "140", "patches/s"):
        assert word in shown


def test_a_size_that_memory_does_not_hold_leaves_the_others() -> None:
    found = measured("demo-byte-lm", "--bytes", f"{10**15},200", "--device", "cpu", "--dtype", "float32")
    assert [row["num_bytes"] for row in found["rows"]] == [200, 200]
    assert found["too_large"] == [
        "gradients of 1,000,000,000,000,000 bytes: not enough memory; take fewer --bytes, or --checkpointing full"
    ]
    assert [split["num_bytes"] for split in found["splits"]] == [200]


def test_an_optimizer_that_memory_does_not_hold_leaves_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = measure.build_optimizer

    def build_optimizer(model: Any, settings: Any) -> Any:
        if settings.hash_gradients == "dense":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12 GiB")
        return inner(model, settings)

    monkeypatch.setattr(measure, "build_optimizer", build_optimizer)
    monkeypatch.setitem(PRESETS, "tiny", tiny_blt_settings())
    found = measured("tiny", "--bytes", "200", "--device", "cpu", "--dtype", "float32")
    assert {row["hash_gradients"] for row in found["rows"]} == {"rows"}
    assert found["too_large"] == [
        "weights, gradients and the optimizer's state, dense hash gradients: not enough memory; take a smaller preset"
    ]


def test_another_error_is_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(measure, "random_batch", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        measured("demo-blt", "--bytes", "200", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo-bl"], "model: no preset 'demo-bl'; did you mean 'demo-blt'?"),
        (["zzz"], "model: no preset 'zzz'. Presets: demo-byte-lm, "),
        (["demo-blt", "--bytes", "0"], "bytes: '0' is not a batch size; write a number, or several with commas"),
        (["demo-byte-lm", "--bytes", "9" * 20], "9' is not a batch size"),
        (["demo-blt", "--bytes", "100,x"], "bytes: '100,x' is not a batch size"),
        (["demo-blt", "--bytes", ""], "bytes: '' is not a batch size"),
        (["demo-blt", "--device", "cpu", "--cuda-graph"], "not for device cpu; do without it\n"),
        (["demo-blt", "--checkpointing", "half"], "checkpointing: Input should be 'none', 'selective' or 'full'"),
        (["demo-blt", "--device", "gpu"], "device: 'gpu' is not known"),
        (["demo-blt", "--device", "cpu", "--float8"], "float8: cpu does not multiply 8-bit floats"),
        (["demo-byte-lm", "--float8"], "float8 is for the global transformer, and 'demo-byte-lm' has none"),
    ],
)
def test_one_line_for_what_will_not_do(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["blt", "bench", "train", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert message in captured.err


def test_help() -> None:
    for arguments, words in ((["bench", "--help"], ["train"]), (["bench", "train", "--help"], ["Example:", "--bytes"])):
        shown = CliRunner().invoke(app, arguments).stdout
        assert all(word in shown for word in words)
    assert "bench" in CliRunner().invoke(app, ["--help"]).stdout


def test_a_model_that_the_machine_cannot_hold_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "free_memory", lambda: 23 * 10**9)
    monkeypatch.setattr(bench, "SyntheticTraining", None)  # nothing is built
    monkeypatch.setattr(sys, "argv", ["blt", "bench", "train", "blt-8b", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    parts = {part.name: part.num_parameters for part in costs(preset("blt-8b"))}
    needed = 8 * sum(parts.values()) - 4 * parts["n-gram hash tables"]
    assert line == (
        f"error: model: weights and gradients of 'blt-8b' take {needed / 1e9:,.1f} GB (float32), and 23.0 GB of memory "
        "are free; take a smaller preset"
    )


def test_free_memory_is_within_the_limit_of_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    whole = device.free_memory()
    if whole is None:
        pytest.skip("this system does not say")
    (tmp_path / "memory.max").write_text("max\n")
    assert (device.free_memory() or 0) > 1_000_000
    (tmp_path / "memory.max").write_text("1000\n")
    assert device.free_memory() == 1000
