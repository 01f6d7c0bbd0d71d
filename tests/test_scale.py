"""The benchmark of many GPUs, at a size for a test."""

import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent.errors import UserError
from bytelatent.model import build_model
from bytelatent.model.flops import costs
from bytelatent.training.distributed.parallelize import fsdp_groups

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from gpu_trace import Communication, communication
from scale import Links, predict
from scale_calls import HEAD, calls_of, count_calls
from scale_measure import SAVE_HEAD, Row, measure, underline
from scale_plans import TINY, Configuration
from scale_tables import distinct_rows, sent


def cells(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def test_a_configuration_and_its_line() -> None:
    found = Configuration.parse("tiny/500:tensor+dense+float8+full@1000", size=8)
    assert found.model.ngram_hash is not None
    settings = found.settings
    assert (settings.parallel.data, settings.parallel.tensor, settings.parallel.tables) == ("shard", 2, "gather")
    assert settings.parallel.activation_checkpointing == "full"
    assert (settings.float8, settings.data.batch_bytes) == ("rowwise", 2000)  # of two ranks
    spent = Communication(span=2.0, total=0.5, exposed=0.1, idle=0.2)
    line = Row(4, found, torch.bfloat16, 0.5, 0.25, 3 << 29, spent, 9.4, 0.03).line()
    row = dict(zip(cells(Row.HEAD), cells(line), strict=True))
    assert row == {
        "GPUs": "4",
        "model": "tiny",
        "plan": "FSDP, tensor 2, recomputing full",
        "hash tables": "dense, 500 a table",
        "products": "float8",
        "bytes a GPU": "1,000",
        "ms a step": "500.0",
        "bytes/s a GPU": "2,000",
        "of the peak": "25.0%",
        "GiB": "1.5",
        "communicating": "25.0%",
        "of it exposed": "5.0%",
        "nothing runs": "10.0%",
        "first step, s": "9",
        "optimizer, ms": "30.0",
    }
    assert len(cells(underline(Row.HEAD))) == len(row)
    assert Configuration.parse("tiny:alone+rows", 8).settings.optimizer.hash_gradients == "rows"
    assert Configuration.parse("tiny:shard", 8).settings.optimizer.hash_gradients == "dense"
    by_rows = Configuration.parse("tiny:shard+rows", 8)
    assert by_rows.settings.optimizer.hash_gradients == by_rows.settings.parallel.tables == "rows"
    assert by_rows.tables == "rows, gradients too"
    assert Configuration.parse("tiny:shard+muon", 8).settings.optimizer.name == "muon"


@pytest.mark.parametrize(
    "text",
    [
        "tiny",
        "tiny:rows",
        "tiny:shard+tensor",
        "tiny:shard+what",
        "tiny:shard+rows+dense",
        "entropy:shard",
        "tiny:shard@x",
    ],
)
def test_what_is_no_configuration(text: str) -> None:
    with pytest.raises(UserError, match=text.replace("+", r"\+")):
        Configuration.parse(text, 8)


def test_a_table_of_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["tiny:alone", "tiny:shard+muon+rows", "tiny:hybrid"]
    measure(texts, [300], 1, "cpu", compiled=False, folder=tmp_path / "saves")
    lines = [cells(line) for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    plans = [line[2] for line in lines]
    assert plans[:4] == ["plan", "---", "no FSDP", "FSDP, Muon"]
    assert [len(line) for line in lines[:5]] == [len(cells(Row.HEAD))] * 5
    assert lines[4][6:] == ["UserError: hybrid is for four processes and more; there are 1", *["-"] * 8]
    assert lines[5] == cells(SAVE_HEAD)
    num_weights = sum(part.num_parameters for part in costs(TINY))
    for line in lines[7:]:
        # Each with two moments, and the model once more in our format; the rest says what lies where.
        assert 1.0 < float(line[2]) * 1e9 / (4 * 4 * num_weights) < 1.2
    assert len(lines) == 9
    assert not (tmp_path / "saves").exists()


@pytest.mark.parametrize(("gpus", "speed"), [(8, 100e9), (64, 50e9)])
def test_a_prediction_adds_up_what_is_sent(gpus: int, speed: float) -> None:
    """Against the formulas of docs/internals/scaling.md, written down again: 30 us a call and doubling of GPUs."""
    links = Links(in_host=100e9, between_hosts=50e9)
    alone, found = (predict(TINY, number, 1000, 2e-6, links) for number in (1, gpus))
    assert (alone.step, alone.exposed) == (pytest.approx(2e-3), 0)
    parts = costs(TINY, 4.5, 8192)
    tables = sum(part.num_parameters for part in parts if part.name == "n-gram hash tables")
    weights, share = sum(part.num_parameters for part in parts) - tables, (gpus - 1) / gpus
    calls = 30e-6 * (3 if gpus == 8 else 6) * len(fsdp_groups(build_model(TINY)))
    assert found.compute == alone.compute
    assert found.gather == pytest.approx(2 * (2 * weights * share / speed + calls))
    assert found.reduce == pytest.approx(4 * weights * share / speed + calls)
    assert found.tables == pytest.approx(1000 * 2 * 32 * 4 * 2 * share / speed)  # two tables of width 32, both ways
    two = predict(TINY, 2, 1000, 2e-6, links)  # ranks, which send sums
    assert two.tables == pytest.approx(1000 * 32 * 4 * 2 / 100e9)
    assert found.exposed > found.tables
    assert found.step == pytest.approx(found.compute + found.exposed)


def test_communication_is_exposed_where_nothing_else_runs() -> None:
    def event(name: str, begin: float, end: float, kind: str = "kernel") -> dict[str, Any]:
        return {"name": name, "cat": kind, "ts": begin, "dur": end - begin}

    events = [
        event("nvjet", 1000, 3000),
        event("ncclDevKernel_AllGather", 2000, 6000),  # half of it beside products
        event("nvjet", 4500, 5500),
        event("ncclDevKernel_ReduceScatter", 5000, 7000),  # two at a time count once
        event("Memcpy HtoD", 6500, 8000, "gpu_memcpy"),
        event("nvjet", 9000, 10_000),
        event("aten::mm", 0, 99_000, "cpu_op"),
        event("nccl:all_gather", 0, 99_000, "gpu_user_annotation"),
        {"name": "process_name", "ph": "M"},
    ]
    expected = Communication(span=9e-3, total=5e-3, exposed=2.5e-3, idle=1e-3)
    assert astuple(communication(reversed(events))) == pytest.approx(astuple(expected), abs=1e-12)
    assert communication(events[-3:]) == Communication(0.0, 0.0, 0.0, 0.0)


def test_what_is_sent_for_tables() -> None:
    """A text that repeats itself looks up few rows; both ways send the same to as many ranks as there are tables."""
    assert TINY.ngram_hash is not None
    assert distinct_rows(TINY.ngram_hash, b"abc" * 50) == (2 + 3) + (3 + 3)  # at the beginning, and after it
    found = sent(TINY, 2, 100, 200)
    assert found["sums"] == found["rows"] == 2 * 4 * 32 * 100
    assert found["gathered"] == 2 * 4 * 32 * 2 * 1009 / 2


def test_calls_count_what_the_host_starts() -> None:
    x = torch.randn(8, 8)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    weight.grad = torch.ones_like(weight)
    found = calls_of(lambda: (x.relu(), (x @ x).sum().item(), x.nonzero()))  # a product calls others, which count not
    assert (found["all"], found["waits"], found["optimizer"]) == (5, 2, 0)
    stepped = calls_of(torch.optim.SGD([weight], lr=0.1).step)
    assert stepped["all"] == stepped["optimizer"] > 0


def test_calls_of_one_rank(capfd: pytest.CaptureFixture[str]) -> None:
    count_calls(["tiny:alone", "tiny:shard"], 256)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| 1 |")]
    alone, sharded = (dict(zip(cells(HEAD), cells(line), strict=True)) for line in lines)
    assert int(alone["of FSDP"]) == 0 < int(sharded["of FSDP"])
    assert int(alone["operations"]) < int(sharded["operations"])
