"""Each command and the snippet of docs/chat.md run, one after another, with a tiny model; and the check counts."""

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import chat as benchmark
from bytelatent import BLT
from bytelatent.cli import app
from bytelatent.text.chat import DEFAULT_TEMPLATE
from tests.test_docs import ROOT, snippets

PAGE = "docs/chat.md"
SMALL = {
    "write": ["--number", "30", "--questions", "5"],
    "train": ["steps=2", "device=cpu", "validation.max_bytes=300", "data.batch_bytes=256", "data.context=256"],
    "chat": ["-n", "8"],
}


def blt(*given: str, stdin: str = "") -> str:
    result = CliRunner().invoke(app, list(given), input=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


def asked(command: list[str], input: str, **_: Any) -> SimpleNamespace:
    return SimpleNamespace(returncode=0, stdout=blt(*command[3:], stdin=input), stderr="")


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=asked))
    outputs = []
    for line in "".join(snippets(PAGE, "bash")).splitlines():
        *pipe, command = line.split(" | ")
        program, *given = shlex.split(command)
        stdin = "".join(shlex.split(each)[1] + "\n" for each in pipe)
        if program == "blt":
            given = [each for each in given if not each.startswith("steps=")]
            outputs.append(blt(*given, *SMALL[given[0]], stdin=stdin))
            continue
        script, verb, *rest = given
        assert (program, ROOT / script) == ("python", Path(benchmark.__file__))
        monkeypatch.setattr(sys, "argv", [script, verb, *rest, *SMALL.get(verb, [])])
        if verb == "write":
            benchmark.main()
            continue
        with pytest.raises(SystemExit, match="1"):  # a tiny model has learned nothing in two steps
            benchmark.main()
        assert "answers in format: 0 of 5; right: 0" in capsys.readouterr().out
    assert json.loads(outputs[-1])["role"] == "assistant"
    names: dict[str, Any] = {}
    for snippet in snippets(PAGE, "python"):
        exec(compile(snippet, PAGE, "exec"), names)
    assert BLT.from_pretrained("mine", device="cpu").chat_template == DEFAULT_TEMPLATE
    for snippet in snippets(PAGE, "json"):
        assert json.loads(snippet)["messages"][2]["role"] == "assistant"


def test_the_check_counts_forms_and_right_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark.write(tmp_path, 20, 30, seed=1)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    known = (tmp_path / "train.jsonl").read_text()
    assert all(row["messages"][1]["content"] not in known for row in rows)
    answers = [{"content": row["answer"], "ended": "stop"} for row in rows]
    answers[0] |= {"ended": "length"}
    answers[1] |= {"content": answers[1]["content"] + " "}
    at = next(number for number, row in enumerate(rows) if row["kind"] == "sum" and number > 1)
    answers[at] |= {"content": re.sub(r"\d+\.$", "77.", answers[at]["content"])}
    done = SimpleNamespace(returncode=0, stdout="".join(json.dumps(each) + "\n" for each in answers), stderr="")
    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=lambda *_, **more: done))
    found = benchmark.check("x", tmp_path / "questions.jsonl", [])
    assert (found["asked"], found["in_format"], found["right"]) == (30, 28, 27)
    assert found["sum"]["in_format"] == found["sum"]["right"] + 1
