"""Random schemas and expressions, checked by other packages; what requests ask for; the page about it."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bytelatent.cli import app
from bytelatent.errors import UserError
from bytelatent.inference import Sampling
from bytelatent.inference.constraint import Constraint
from bytelatent.serving.response_format import constraint_of, expression_for
from tests.inference.test_constraint import texts_of
from tests.inference.test_engine import engine_of, shared_decoder
from tests.model.tiny import tiny_blt
from tests.serving.random_constraints import case
from tests.test_blt import wrap
from tests.test_docs import snippets

PAGE = "docs/structured.md"
COUNT = 240  # of the 10,000 of benchmarks/structured.py


def test_random_constraints_are_met() -> None:
    engine = engine_of(shared_decoder("entropy"), "fast", 32)
    asked, refused = [], Counter[str]()
    for number in range(20_000, 20_000 + COUNT):
        one = case(number)
        try:
            constraint = Constraint.of(**one.given)
        except UserError:
            refused[next(iter(one.given))] += 1
            continue
        sampling = Sampling(temperature=1.0, seed=number)
        asked.append((number, one, engine.submit("x", sampling, 600, constraint=constraint)[0]))
    engine.run()
    ended = Counter(text.ended for _, _, text in asked)
    for number, one, text in asked:
        assert text.ended in ("end of text", "length"), f"{number}: {text.failure}"
        assert text.ended == "length" or one.is_met(text.data.decode()), f"{number}: {one.given}: {text.data!r}"
    assert ended["end of text"] > 0.75 * COUNT
    assert refused["regex"] == 0
    assert refused["schema"] < 0.2 * COUNT


SCHEMA = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize("strict", [{}, {"strict": True}, {"strict": None}])
def test_response_formats(strict: dict[str, Any]) -> None:
    about = {"name": "x", "description": "y", "schema": SCHEMA, **strict}
    found = constraint_of({"type": "json_schema", "json_schema": about})
    assert found is constraint_of(None, {"json": SCHEMA})
    assert found is Constraint.of(schema=SCHEMA)
    anything = constraint_of({"type": "json_object"})
    assert anything is constraint_of(structured_outputs={"json_object": True, "regex": None})
    assert anything is not None
    assert anything.start().allowed.nonzero()[0].tolist() == [ord("{") + 4]
    assert constraint_of() is constraint_of({"type": "text"}) is None
    assert constraint_of(None, {"grammar": 'start: "a"'}) is Constraint.of(grammar='start: "a"')


def test_choices_are_taken_as_they_are() -> None:
    choices = ["yes", "no.", "a|b", "(é)", "^$", "語\n", "[x]{2}", "\\d", "a-b ~&#/"]
    found = constraint_of(None, {"choice": choices})
    assert found is not None
    assert texts_of(found) == set(choices)
    assert expression_for("a.b") == "a\\.b"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[]], "response_format: an object is needed, not list"),
        ([{"type": "json"}], "response_format: type 'json' is not one of text, json_object, json_schema; did you mean"),
        ([{"type": ["x"]}], "response_format: type"),
        ([{"type": "json_schema"}], "response_format.json_schema: an object is needed, not NoneType"),
        ([{"type": "json_schema", "json_schema": {"name": "x"}}], 'json_schema: "schema" is missing'),
        ([{"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}], "strict: 1 is not true or false"),
        (
            [{"type": "json_schema", "json_schema": {"schema": {"properties": {"a": {"not": {}}}}}}],
            "response_format: schema: '/properties/a': not: not supported; leave it out",
        ),
        ([None, {"regexp": "a"}], "structured_outputs: 'regexp' is not one of .*; did you mean 'regex'"),
        ([None, {}], "structured_outputs: nothing is given"),
        ([None, {"regex": "a", "grammar": "b"}], "structured_outputs: regex and grammar is given; give one of"),
        ([None, {"regex": 3}], "structured_outputs: regex: a text is needed"),
        ([None, {"choice": []}], "structured_outputs.choice: a list of texts is needed"),
        ([None, {"json_object": False}], "structured_outputs.json_object: False is not true"),
        ([{"type": "text"}, {"regex": "a"}], "structured_outputs is given too; give one of them"),
    ],
)
def test_what_requests_may_not_ask(given: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        constraint_of(*given)
    assert str(error.value).startswith(("response_format", "structured_outputs"))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page names."""
    folder = tmp_path_factory.mktemp("page")
    wrap(tiny_blt(window=6)).save_pretrained(folder / "runs" / "demo")
    schema, *bodies = snippets(PAGE, "json")
    (folder / "person.json").write_text(schema)
    (folder / "sum.lark").write_text(snippets(PAGE, "lark")[0])
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    for line in "".join(bodies).splitlines():
        assert constraint_of(**json.loads(line)) is not None
    return folder


def test_the_pages_commands(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    lines = [line for snippet in snippets(PAGE, "bash") for line in snippet.splitlines() if line.startswith("blt ")]
    assert len(lines) == 4
    ends = (r"\{.*\}", r"20[0-9]{2}-[01][0-9]", r"[0-9(].*", r".*\}")
    for line, end in zip(lines, ends, strict=True):
        arguments = shlex.split(line)[1:]
        result = CliRunner().invoke(app, [*arguments, "--temperature", "1"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        shown = result.stdout.partition(arguments[1])[2] if arguments[1] != "--jsonl" else result.stdout
        assert re.search(f"^{end}$", shown.strip(), re.DOTALL), shown
    row = json.loads(result.stdout)
    assert json.loads(row["text"])["age"] <= 150


def test_the_pages_python(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    names: dict[str, Any] = {}
    for snippet in snippets(PAGE, "python"):
        exec(compile(snippet, PAGE, "exec"), names)
    model = names["model"]
    names["Person"].model_validate_json(names["text"])
    assert re.fullmatch("[a-c]{3}", model.generate("x", regex="[a-c]{3}"))
    assert re.fullmatch("[a-c]{3}", "".join(model.stream("x", regex="[a-c]{3}")))
    for wrong in (model.generate, model.stream):
        with pytest.raises(UserError, match="regex: at character 1"):
            wrong("x", regex="(")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--schema", "absent.json"], "schema: 'absent.json' cannot be read"),
        (["--regex", "(a"], "regex: at character 1"),
        (["--grammar", "sum.lark", "--regex", "a"], "regex and grammar are given"),
        (["--schema", "sum.lark"], "schema: it is no JSON"),
    ],
)
def test_what_the_command_refuses(
    here: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    result = CliRunner().invoke(app, ["generate", "x", "--model", "runs/demo", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
