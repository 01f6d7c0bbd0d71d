"""The commands and the program of docs/serve.md, against a server."""

import re
import subprocess
from typing import Any

import pytest

from bytelatent.cli import VERBS
from tests.serving.conftest import ENVIRONMENT, Served
from tests.test_docs import ROOT, snippets

PAGE = "docs/serve.md"
ADDRESS = "http://127.0.0.1:8000"


def commands() -> list[str]:
    found = "".join(snippets(PAGE, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in found if line.startswith("curl ")]


@pytest.mark.parametrize("command", commands(), ids=lambda command: re.findall(r"8000(\S+)", command)[0])
def test_curl(served: Served, command: str) -> None:
    run = command.replace("curl ", "curl -s --fail-with-body ").replace(ADDRESS, served.address)
    ended = subprocess.run(["bash", "-c", run], env=ENVIRONMENT, capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.startswith((b"{", b"data: {"))


def test_openai(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    [program] = snippets(PAGE, "python")
    exec(compile(program.replace(ADDRESS, served.address), PAGE, "exec"), names)
    assert names["found"].usage.prompt_tokens == len("The history of")
    assert capsys.readouterr().out


def test_options_are_those_of_the_command() -> None:
    shown = set(re.findall(r"--([a-z-]+)", " ".join(re.findall(r"`(--[^`]*)`", (ROOT / PAGE).read_text()))))
    limits = VERBS["serve"].model_fields["limits"].annotation
    assert limits is not None
    known = {name.replace("_", "-") for name in [*VERBS["serve"].model_fields, *limits.model_fields]}
    assert shown - known == set()
