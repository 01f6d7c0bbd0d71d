"""Runs of several processes: their checkpoints go on in any division, and are exported without any."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bytelatent.blt import BLT
from bytelatent.commands.export import export_checkpoint
from bytelatent.data import Patcher, batches_once
from bytelatent.errors import UserError
from bytelatent.files import find_corruption
from bytelatent.model.loss import bits_per_byte, cross_entropy
from bytelatent.training import read_metrics
from bytelatent.weights import load
from tests.training.crew import Crew
from tests.training.plans import PLANS, Taken, take_steps, train_as, values
from tests.training.tiny_runs import assert_equal_runs, checkpoints, losses, settings

GOING_ON = (["shard", "replicate"], ["shard x tensor"], ["hybrid"])


def same_losses(taken: Taken, expected: Taken) -> None:
    late = expected.rows[-len(taken.rows) :]
    assert [row["step"] for row in taken.rows] == [row["step"] for row in late]
    for row, wanted in zip(taken.rows, late, strict=True):
        assert row["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-5)
        assert row["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-4)


def test_a_checkpoint_goes_on_in_any_division(crew: Crew, tmp_path: Path, text: Path) -> None:
    expected = take_steps(values(text), 4)
    whole, _ = crew.run((2, take_steps, values(text), 4), (2, take_steps, values(text), 2, tmp_path / "begun"))

    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "begun", tmp_path / name))

    alone = take_steps(values(text), 4, copy("alone"))
    assert len(alone.rows) == 2
    same_losses(alone, expected)
    for names in GOING_ON:
        jobs = [(PLANS[name][0], take_steps, values(text, parallel=PLANS[name][1]), 4, copy(name)) for name in names]
        for name, [first, *_] in zip(names, crew.run(*jobs), strict=True):
            same_losses(first, expected)
            if name == "shard":  # the same plan: bit for bit
                assert [r["bits_per_byte"] for r in first.rows] == [r["bits_per_byte"] for r in whole[0].rows[2:]]
                assert all(torch.equal(first.weights[n], weight) for n, weight in whole[0].weights.items())
    # From tensor parallelism to one process, and back from it.
    [[first, *_]] = crew.run((4, take_steps, values(text, parallel=PLANS["shard x tensor"][1]), 6, tmp_path / "alone"))
    back = take_steps(values(text), 6, tmp_path / "shard x tensor")
    assert len(back.rows) == len(first.rows) == 2
    same_losses(first, back)


def test_a_run_of_two_processes(crew: Crew, tmp_path: Path, text: Path) -> None:
    """Cut off and gone on with: bit for bit on the same plan, within rounding on another one."""
    valid = {"data": {"valid": str(text)}, "validation": {"every": 4, "max_bytes": 450}}
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    crew.run((2, train_as, values(text, whole, **valid)), (2, train_as, values(text, cut, **valid), 8))
    assert checkpoints(cut) == ["step-00000005"]
    shutil.copytree(cut, other)
    with pytest.raises(UserError, match=rf"only in the parts of several processes; .* blt export {cut} --out FOLDER"):
        load(cut)
    replicate = {"parallel": {"data": "replicate"}}
    crew.run((2, train_as, values(text, cut, **valid)), (2, train_as, values(text, other, **replicate, **valid)))
    assert_equal_runs(cut, whole)
    for row, expected in zip(losses(other), losses(whole), strict=True):
        assert row == (*row[:2], *(value and pytest.approx(value, rel=1e-5) for value in expected[2:]))
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows if "validation_bits_per_byte" in row] == [4, 8, 12]
    assert all(row["validation_bytes"] == 450 for row in rows if "validation_bits_per_byte" in row)
    assert sum("bits_per_byte" in row for row in rows) == 12  # one process writes them
    found, data = load(whole), settings(values(text, whole, **valid)).data
    assert found.config.patching is not None
    nats = sum(
        float(cross_entropy(found.model, batch).detach())
        for batch in batches_once(data.valid, data.context, data.batch_bytes, Patcher(found.config.patching), 450)
    )
    assert rows[-1]["validation_bits_per_byte"] == pytest.approx(bits_per_byte(nats, 450), rel=1e-5)
    assert BLT.from_pretrained(whole).bits_per_byte("the cat sat on a mat") > 0
    assert find_corruption(whole / "checkpoints" / "step-00000012") is None
    names = {file.name for file in (whole / "checkpoints" / "step-00000012" / "ranks").iterdir()}
    assert names == {"00000.pt", "00001.pt"}
    assert not (whole / "checkpoints" / "step-00000010" / "model.safetensors").exists()


def test_another_number_of_processes_goes_on_with_the_text(crew: Crew, tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    crew.run((2, train_as, values(text, run), 8))
    said = train_as(values(text, run))
    assert any("the state of 2 ranks is divided among 1" in line for line in said)
    rows = losses(run)
    assert [row[0] for row in rows] == list(range(1, 13))
    assert rows[-1][1] == pytest.approx(rows[4][1] * (1 + 7 / 10), rel=0.05)  # a batch a step, and not two
    assert load(run).source.startswith(str(run / "checkpoints" / "step-00000012"))


def test_export(crew: Crew, tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    crew.run((4, train_as, values(text, run, parallel=PLANS["shard x tensor"][1])))
    last = run / "checkpoints" / "step-00000012"
    export_checkpoint(str(run), None, str(tmp_path / "last"))
    exported, expected = load_file(tmp_path / "last" / "model.safetensors"), load_file(last / "model.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    export_checkpoint(str(run), 10, str(tmp_path / "ten"))
    ten, model = load_file(tmp_path / "ten" / "model.safetensors"), BLT.from_pretrained(tmp_path / "ten")
    assert any(not torch.equal(ten[name], tensor) for name, tensor in expected.items())
    assert model.patch("the cat sat")[0].text == "the "
    for step, line in (
        (7, "has no checkpoint after step 7; it has 10, 12"),
        (12, "'.*step-00000012' is corrupt .* is not as it was written"),
    ):
        if step == 12:
            stored = last / "state" / "__1_0.distcp"
            stored.write_bytes(stored.read_bytes()[:-1] + b"x")
        with pytest.raises(UserError, match=line):
            export_checkpoint(str(run), step, str(tmp_path / "none"))
    export_checkpoint(str(run), None, str(tmp_path / "newest"))
    assert all(torch.equal(v, ten[n]) for n, v in load_file(tmp_path / "newest" / "model.safetensors").items())
    with pytest.raises(UserError, match="'nowhere' is no run"):
        export_checkpoint("nowhere", None, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_export_writes_over_nothing(byte_lm: Path, tmp_path: Path, logged: Callable[[], str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_checkpoint(str(byte_lm), 10, str(out))  # nothing is lost of an empty folder
    assert "step-00000010/state: checkpoint of a run, byte LM of " in logged()  # of a single process
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "model.safetensors" in before
    with pytest.raises(UserError, match=rf"^'{out}' holds a model already; name another folder, or move it away$"):
        export_checkpoint(str(byte_lm), None, str(out))
    with pytest.raises(UserError, match=rf"^'{byte_lm}' holds something else than a saved model; name another folder"):
        export_checkpoint(str(byte_lm), None, str(byte_lm))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_an_export_that_reads_otherwise_does_not_appear(
    byte_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    equal, calls = torch.equal, []

    def unlike_at_last(*pair: torch.Tensor) -> bool:
        calls.append(pair)
        return equal(*pair) and len(calls) < 3

    monkeypatch.setattr(torch, "equal", unlike_at_last)
    with pytest.raises(UserError, match=r"'.*/out': \S+ is not as '.*step-00000012' has it; is the disk in order\?"):
        export_checkpoint(str(byte_lm), None, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all(crew: Crew, tmp_path: Path, text: Path, rank: int) -> None:
    run = tmp_path / "run"
    [[first, second]] = crew.run((2, train_as, values(text, run), None, (rank, 6)))
    assert first[-1] == "Interrupted: after step 7; the same command resumes"
    assert second == ["exit code 130"]
    assert checkpoints(run) == ["step-00000005", "step-00000007"]


def test_bad_input_is_said_once(crew: Crew, tmp_path: Path, text: Path) -> None:
    [[first, second]] = crew.run((2, train_as, values(text, tmp_path / "run", data={"train": "absent.jsonl"})))
    assert len(first) == 1
    assert "absent.jsonl" in first[0]
    assert second == ["exit code 2"]
