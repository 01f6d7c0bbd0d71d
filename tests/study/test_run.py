"""Studies from a plan to rows: two families at two budgets, stopped at any moment, on a CPU."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app
from bytelatent.data import Loader, Patcher
from bytelatent.errors import UserError
from bytelatent.model.flops import costs
from bytelatent.patching import PatchSettings
from bytelatent.study.processes import JobPool
from bytelatent.study.results import HeldOut, StudyRow, read_rows, row_path, write_row
from bytelatent.study.run import StudyOptions, run_study
from bytelatent.study.tables import trials_table
from bytelatent.text.tokenizer import Tokenizer
from bytelatent.training import TrainSettings, read_metrics
from bytelatent.weights import load_byte_lm
from tests import processes
from tests.study.study_plans import BUDGETS, FAMILIES, PLAN, study, without_clock, write_plan, write_texts
from tests.training.tiny_runs import checkpoints, environment


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_texts(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Path:
    return write_plan(tmp_path_factory.mktemp("plan") / "plan.yaml", texts)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that tests start, so that results are the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    return tmp_path_factory.mktemp("undisturbed") / "study"


@pytest.fixture(scope="module")
def rows(folder: Path, plan: Path) -> dict[str, StudyRow]:
    """Of the study that nothing disturbs."""
    return {row.name: row for row in study(plan, folder)}


def test_rows_are_of_all_runs(rows: dict[str, StudyRow]) -> None:
    assert rows.keys() == {"token-4e08-0", "token-9e08-0", "entropy-4e08-0", "entropy-9e08-0"}
    for row in rows.values():
        assert row.steps == row.settings["steps"]
        assert row.training_flops == pytest.approx(row.budget, rel=0.1)
        assert row.training_flops == row.bytes_read * sum(row.training_flops_per_byte.values())
        assert row.held_out is not None
        assert row.held_out.bytes != row.tuning.bytes
        assert set(row.held_out.by_category) == {"prose", "code"}
        assert sum(group.bytes for group in row.held_out.by_category.values()) == row.held_out.bytes
        assert row.curve[-1].training_flops == row.training_flops
        assert any(point.validation_bits_per_byte for point in row.curve)
        TrainSettings.parse(row.settings)
    assert rows["token-4e08-0"].entropy_model_training_flops == 0


def test_a_row_counts_what_the_counters_count_by_hand(folder: Path, rows: dict[str, StudyRow]) -> None:
    for row in rows.values():
        settings = TrainSettings.parse(row.settings)
        assert row.context_bytes is not None
        context = round(row.context_bytes)
        expected = 3 * sum(part.flops_per_byte for part in costs(settings.model, row.mean_patch_bytes, context))
        inference = expected / 3
        if row.family == "entropy":
            frozen = load_byte_lm(folder / "entropy_models" / "tiny").settings
            own = sum(part.flops_per_byte for part in costs(frozen, 1.0, context))
            assert row.training_flops_per_byte["entropy model"] == own
            expected, inference = expected + own, inference + own
            read = read_metrics(folder / "entropy_models" / "tiny" / "metrics.jsonl")[-1]["bytes_seen"]
            assert row.entropy_model_training_flops == pytest.approx(3 * own * read, rel=0.01)
            assert row.table_bytes == 4 * 2 * 101 * 16 == 4 * row.table_parameters
        assert sum(row.training_flops_per_byte.values()) == pytest.approx(expected)
        assert row.inference_flops_per_byte == pytest.approx(inference)
        parameters = sum(part.num_parameters for part in costs(settings.model))
        assert row.num_parameters + row.table_parameters == parameters


def test_a_row_counts_the_batches_that_were_read(folder: Path, rows: dict[str, StudyRow]) -> None:
    for row in rows.values():
        settings = TrainSettings.parse(row.settings)
        patcher, vocabulary = None, {}
        if settings.patching is not None:
            assert settings.patching.threshold is not None
            byte_lm = load_byte_lm(folder / "entropy_models" / "tiny")
            patcher = Patcher(PatchSettings(mode="entropy", threshold=settings.patching.threshold), byte_lm)
        else:
            assert settings.data.tokenizer is not None
            vocabulary = {"vocabulary": Tokenizer.read(folder / settings.data.tokenizer)}
        loader = Loader(settings.data, settings.seed, patcher, **vocabulary)
        batches = [next(loader) for _ in range(row.steps)]
        num_bytes = sum(batch.num_bytes for batch in batches)
        assert row.bytes_read == num_bytes
        assert row.mean_patch_bytes == pytest.approx(num_bytes / sum(batch.num_patches for batch in batches))
        lines = Path(settings.data.train[0].path).read_text().splitlines()
        assert row.epochs == pytest.approx(num_bytes / sum(len(json.loads(line)["text"]) for line in lines))


def test_held_out_bits_are_those_of_the_final_model(
    folder: Path, rows: dict[str, StudyRow], texts: dict[str, str]
) -> None:
    """Piece by piece, by the public class."""
    row = rows["entropy-9e08-0"]
    model = BLT.from_pretrained(folder / "runs" / row.name)
    documents = [json.loads(line) for line in Path(texts["held_out"]).read_text().splitlines()]
    nats = {"prose": 0.0, "code": 0.0}
    for document in documents:
        text = document["text"].encode()
        ids = torch.tensor([[1, *(byte + 4 for byte in text), 2]])
        pieces = [ids[:, at : at + 65] for at in range(0, len(text) + 1, 64)]
        for piece in pieces:
            logits = model.logits(piece[:, :-1])
            nats[document["kind"]] += float(F.cross_entropy(logits[0], piece[0, 1:], reduction="sum"))
    assert row.held_out is not None
    for kind, group in row.held_out.by_category.items():
        num_bytes = sum(len(document["text"]) for document in documents if document["kind"] == kind)
        assert group.bytes == num_bytes
        assert group.bits_per_byte == pytest.approx(nats[kind] / num_bytes / 0.6931471805599453, rel=1e-5)


def test_finished_runs_are_not_run_again(
    folder: Path, plan: Path, rows: dict[str, StudyRow], texts: dict[str, str], tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {row.name: row for row in study(plan, folder)} == rows
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    tiny = {**PLAN["entropy_models"]["tiny"], "optimizer": {"lr": 3e-3}}
    other = write_plan(tmp_path / "plan.yaml", texts, base__optimizer={"lr": 4e-3}, entropy_models__tiny=tiny)
    with pytest.raises(
        UserError, match=r"settings than the plan's \(optimizer.lr is 0.004 in the plan, and was 0.003\)"
    ):
        run_study(other, StudyOptions(folder))
    other = write_plan(tmp_path / "plan.yaml", {**texts, "tuning": texts["train"]})
    with pytest.raises(UserError, match=r"text.tuning: it is not the text that the study"):
        run_study(other, StudyOptions(folder))


@pytest.fixture
def copied(folder: Path, rows: dict[str, StudyRow], tmp_path: Path) -> Path:
    """The finished study, without its trainings."""
    return shutil.copytree(folder, tmp_path / "study", ignore=shutil.ignore_patterns("runs"))


def test_rows_of_another_entropy_model_are_refused(copied: Path, texts: dict[str, str], tmp_path: Path) -> None:
    family = {**FAMILIES["entropy"], "settings": {**FAMILIES["entropy"]["settings"], "entropy_model": "other"}}
    models = dict.fromkeys(("tiny", "other"), PLAN["entropy_models"]["tiny"])
    other = write_plan(tmp_path / "plan.yaml", texts, families__entropy=family, entropy_models=models)
    line = r"entropy-4e08-0.json' is of .* \(entropy_model is entropy_models/other in the plan, and was .*/tiny\)"
    with pytest.raises(UserError, match=line):
        run_study(other, StudyOptions(copied))


def test_labels_are_those_of_the_plan(
    copied: Path, texts: dict[str, str], rows: dict[str, StudyRow], tmp_path: Path
) -> None:
    other = write_plan(tmp_path / "plan.yaml", texts, families__token__label="another")
    outcome = run_study(other, StudyOptions(copied, only=["token"], budgets=[BUDGETS[0]]))
    assert [row.label for row in outcome.rows.values()] == ["another"]
    for row in read_rows([copied]):
        label = "another" if row.family == "token" else rows[row.name].label
        assert row == rows[row.name].model_copy(update={"label": label})


def test_a_file_that_is_no_row_is_found_before_training(copied: Path, plan: Path) -> None:
    row_path(copied, "token-4e08-0").unlink()
    row_path(copied, "other").write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"rows/other.json'.*a: unknown key.*; put back what .*, or remove the file"):
        run_study(plan, StudyOptions(copied))
    assert not (copied / "runs").exists()


def test_discarded_models_are_trained_again_with_a_word(
    copied: Path, plan: Path, rows: dict[str, StudyRow], monkeypatch: pytest.MonkeyPatch, logged: Callable[[], str]
) -> None:
    monkeypatch.setattr("bytelatent.study.run.perform", lambda job: None)
    write_row(copied, rows["token-4e08-0"].model_copy(update={"held_out": None}))
    logged()
    assert run_study(plan, StudyOptions(copied, tuning_only=True)).rows.keys() == rows.keys()
    assert "again" not in logged()
    run_study(plan, StudyOptions(copied))
    assert "1 runs are trained again (token-4e08-0 ...): their models were discarded before" in logged()


def test_a_killed_study_gives_the_same_rows(plan: Path, tmp_path: Path, rows: dict[str, StudyRow]) -> None:
    folder = tmp_path / "study"
    program = "from bytelatent.cli import main; import sys; main(sys.argv[1:])"
    arguments = [processes.sys.executable, "-c", program, "study", str(plan), "--out", str(folder), "--gpus", "0"]
    for stop in (signal.SIGKILL, signal.SIGINT):
        command = processes.Command(arguments, environment())
        run = "entropy-4e08-0" if stop == signal.SIGKILL else "token-9e08-0"
        wait_for(lambda run=run: (folder / "runs" / run / "checkpoints" / "step-00000005").is_dir(), command)
        command.send_signal(stop)
        _, printed = command.communicate(60)
        assert command.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[stop]
        assert ("stopped: the same command resumes" in printed) == (stop == signal.SIGINT)
    assert_same(study(plan, folder), rows)


def test_a_killed_run_leaves_the_others_alone(
    plan: Path, tmp_path: Path, folder: Path, rows: dict[str, StudyRow]
) -> None:
    """In processes, as on GPUs."""
    undisturbed = folder
    folder = tmp_path / "study"
    shutil.copytree(
        undisturbed, folder, ignore=lambda *_: ["runs", *(f"{name}.json" for name in rows if "entropy" in name)]
    )
    pool, killed = JobPool(folder / "logs", ["0", "1"]), "entropy-9e08-0"

    def kill() -> None:
        wait_for(lambda: (folder / "runs" / killed / "checkpoints" / "step-00000005").is_dir())
        pool._running[killed][-1].send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("bytelatent.study.run.JobPool", lambda logs, gpus: pool)
        thread.start()
        outcome = run_study(plan, StudyOptions(folder, gpus=["0", "1"]))
        thread.join()
    assert outcome.rows.keys() == rows.keys() - {killed}
    assert outcome.failures == {killed: f"ended by signal 9; log: {folder / 'logs' / killed}.log"}
    with pytest.raises(UserError, match=f"1 failed: {killed}"):
        outcome.raise_failures()
    assert_same(study(plan, folder), rows)


def test_a_failed_run_is_named_with_its_log(tmp_path: Path, texts: dict[str, str]) -> None:
    bad = {
        **FAMILIES["token"],
        "sizes": {BUDGETS[0]: {"model": {"num_layers": 1}}},
        "settings": {**FAMILIES["token"]["settings"], "optimizer": {"lr": 1e30, "clip": 1e30}},
    }
    small = {"settings": {"model": {"kind": "byte_lm", "dim": 16, "num_layers": 1, "num_heads": 2}}}
    plan = write_plan(
        tmp_path / "plan.yaml", texts, families={"bad": bad, "small": small}, budgets=[BUDGETS[0]], entropy_models={}
    )
    folder = tmp_path / "study"
    outcome = run_study(plan, StudyOptions(folder))
    assert outcome.rows.keys() == {"small-4e08-0"}
    assert "the loss" in outcome.failures["bad-4e08-0"]
    log = outcome.failures["bad-4e08-0"].rpartition("log: ")[2]
    assert Path(log).is_file()


def test_tuning_only_and_trials_leave_the_held_out_text_alone(tmp_path: Path, texts: dict[str, str]) -> None:
    family = {"settings": {"model": {"kind": "byte_lm", "dim": 16, "num_layers": 1, "num_heads": 2}}}
    trials = {"budget": BUDGETS[0], "of": {"small": {"slow": {"optimizer": {"lr": 1e-5}}, "same": {}}}}
    closed = {**texts, "held_out": str(tmp_path / "later.jsonl")}
    changes: dict[str, Any] = {"families": {"small": family}, "budgets": [BUDGETS[0]], "trials": trials}
    plan = write_plan(tmp_path / "plan.yaml", closed, entropy_models={}, **changes)
    folder = tmp_path / "study"
    run_study(plan, StudyOptions(folder, trials=True, prepare=True))
    assert not (folder / "runs").exists()
    measured = {path: path.stat().st_mtime_ns for path in (folder / "measured").iterdir()}
    same, slow = study(plan, folder, trials=True)
    assert measured
    assert all(path.stat().st_mtime_ns == written for path, written in measured.items())
    [tuned] = study(plan, folder, tuning_only=True)
    assert tuned.held_out is same.held_out is None
    assert same.tuning == tuned.tuning
    assert same.tuning.bits_per_byte < slow.tuning.bits_per_byte
    assert not (folder / "rows" / "small-same-4e08-0.json").exists()
    with pytest.raises(UserError, match=r"text.held_out: .*later.jsonl"):
        study(plan, folder)
    os.link(texts["held_out"], closed["held_out"])
    trained = checkpoints(folder / "runs" / "small-4e08-0")
    [row] = study(plan, folder)
    assert row.held_out is not None
    assert without_clock(row) == {**without_clock(tuned), "held_out": row.held_out.plain()}
    assert checkpoints(folder / "runs" / "small-4e08-0") == trained


def test_two_studies_do_not_share_a_folder(plan: Path, tmp_path: Path) -> None:
    from bytelatent.files import only_writer

    with only_writer(tmp_path / "study"), pytest.raises(UserError, match="is in use by another blt study"):
        run_study(plan, StudyOptions(tmp_path / "study"))
    assert not row_path(tmp_path / "study", "token-4e08-0").exists()


def assert_same(found: list[StudyRow], expected: dict[str, StudyRow]) -> None:
    assert [row.name for row in found] == sorted(expected)
    for row in found:
        assert without_clock(row) == without_clock(expected[row.name])


def wait_for(is_so: Any, command: processes.Command | None = None) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        assert command is None or command.poll() is None
        time.sleep(0.002)


def blt(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_shows_what_is_planned_and_what_came_out(
    folder: Path, plan: Path, rows: dict[str, StudyRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[list[str]] = []

    def write_study(rows: list[StudyRow], folder: Path) -> list[Path]:  # its own tests draw, which takes seconds
        pages.append([row.name for row in rows])
        return [folder / "index.html"]

    monkeypatch.setattr("bytelatent.commands.study.write_study", write_study)
    table = blt("study", plan, "--out", folder, "--gpus", 0, "--dry-run").splitlines()
    assert [line.split()[:3] for line in table[1:3]] == [["token", "4e08", "1"], ["entropy", "4e08", "1"]]
    assert table[-1].startswith("4 runs, ")
    values = json.loads(blt("study", plan, "--out", folder, "--dry-run", "--json", "--budget", "9e8"))
    assert [value["steps"] for value in values] == [rows[value["name"]].steps for value in values]
    assert {value["name"] for value in values} == {"token-9e08-0", "entropy-9e08-0"}
    shown = blt("study", plan, "--out", folder, "--gpus", 0).splitlines()
    best = min((row for row in rows.values() if row.budget == BUDGETS[0]), key=lambda row: row.held_out.bits_per_byte)
    assert shown[1].split()[:4] == [best.family, "4e08", "1", f"{best.held_out.bits_per_byte:.4f}"]
    assert pages == [sorted(rows)]


def test_trials_are_ranked_in_each_family(rows: dict[str, StudyRow]) -> None:
    bits = {"a": 1.3, "b": 1.1, "c": 1.2}
    token, entropy = rows["token-4e08-0"], rows["entropy-4e08-0"]
    trials = [
        (name, row.model_copy(update={"tuning": HeldOut(bits_per_byte=bits[name] + more, bytes=9)}))
        for row, more in ((token, 0.0), (entropy, 1.0))
        for name in bits
    ]
    lines = [line.split() for line in trials_table(trials).splitlines()]
    assert [line[:5] for line in lines[1:]] == [
        ["entropy", "1", "b", "2.1000", "–"],
        ["entropy", "2", "c", "2.2000", "+0.1000"],
        ["entropy", "3", "a", "2.3000", "+0.2000"],
        ["token", "1", "b", "1.1000", "–"],
        ["token", "2", "c", "1.2000", "+0.1000"],
        ["token", "3", "a", "1.3000", "+0.2000"],
    ]
