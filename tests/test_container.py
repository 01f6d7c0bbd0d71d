"""The Dockerfile, the compose files and Prometheus's settings agree with the package and with one another."""

import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.routing import Route
from typer.testing import CliRunner

from bytelatent.cli import app
from bytelatent.commands import serve
from bytelatent.commands.serve_options import ServeSettings
from bytelatent.serving.service import router
from dev.container import ROOT, Instruction, instructions, stages
from tests.test_wheel import BUILT_FROM


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


FOUND = instructions((ROOT / "Dockerfile").read_text())
BUILD, LAST = stages(FOUND)
COMPOSE = read_yaml(ROOT / "compose.yaml")
DOCS = (ROOT / "docs" / "container.md").read_text()


def one(stage: list[Instruction], name: str) -> Instruction:
    (found,) = [step for step in stage if step.name == name]
    return found


def served(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> ServeSettings:
    """The settings of a command that begins with `blt serve`."""
    caught: list[ServeSettings] = []
    monkeypatch.setattr(serve, "run", caught.append)
    result = CliRunner().invoke(app, command[1:], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return caught[0]


def test_all_that_the_wheel_is_built_from_is_copied_and_nothing_else() -> None:
    copied = [word for step in BUILD if step.name == "COPY" for word in step.words[:-1]]
    assert sorted(copied) == sorted([*BUILT_FROM, "constraints.txt"])
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(copied)


def test_it_runs_as_a_user_without_rights_over_what_it_runs() -> None:
    names = [step.name for step in LAST]
    assert int(one(LAST, "USER").value) >= 1000
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :])


@pytest.mark.parametrize(("device", "index", "code"), [("cpu", "file:///a b", 0), ("cuda", "", 0), ("tpu", "", 2)])
def test_torch_comes_from_the_index_that_is_named(device: str, index: str, code: int, tmp_path: Path) -> None:
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    pip.chmod(0o755)
    step = next(step for step in BUILD if step.name == "RUN" and "DEVICE" in step.value)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device, "TORCH_INDEX": index}
    ended = subprocess.run(step.value, shell=True, env=environment, capture_output=True, text=True)
    assert ended.returncode == code
    asked = ["install", "-c", "constraints.txt", *(["--extra-index-url", index] if index else []), "torch"]
    assert ended.stdout.splitlines() == (asked if code == 0 else [])
    assert bool(ended.stderr) == (code != 0)


def test_the_health_check(unused_port: int) -> None:
    answers = [503, 200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/ready"
            self.send_response(answers.pop(0))
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    check = [word.replace(":8000", f":{unused_port}") for word in one(LAST, "HEALTHCHECK").words]
    check[0] = sys.executable

    def code() -> int:
        return subprocess.run(check, stderr=subprocess.DEVNULL).returncode

    assert code() == 1
    with HTTPServer(("127.0.0.1", unused_port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert [code(), code()] == [1, 0]
        server.shutdown()


@pytest.fixture
def unused_port() -> int:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return server.server_address[1]


def test_the_server_is_started_as_its_options_are(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = one(LAST, "ENTRYPOINT").words
    settings = served(monkeypatch, [*entry, *one(LAST, "CMD").words])
    assert (settings.model, settings.host, str(settings.port)) == ("tiny", "0.0.0.0", one(LAST, "EXPOSE").value)
    server = COMPOSE["services"]["server"]
    command = [re.sub(r"\$\{MODEL:-(\w+)\}", r"\1", word) for word in server["command"]]
    settings = served(monkeypatch, [*entry, *command])
    assert settings.model == "tiny"
    assert settings.drain_seconds < float(server["stop_grace_period"].removesuffix("s"))
    (target,) = read_yaml(ROOT / "setup" / "prometheus.yaml")["scrape_configs"][0]["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert name in COMPOSE["services"]
    assert {name, "127.0.0.1", "localhost"} == set(settings.allow_host)  # Prometheus, the health check, a browser
    assert port == one(LAST, "EXPOSE").value
    paths = {route.path for route in router.routes if isinstance(route, Route)}
    assert {"/metrics", "/ready"} <= paths


def test_the_compose_files_name_what_is_there() -> None:
    services = COMPOSE["services"]
    assert services.keys() >= read_yaml(ROOT / "compose.cuda.yaml")["services"].keys()
    assert services["prometheus"]["depends_on"]["server"]["condition"] == "service_healthy"
    (mounted,) = [volume for volume in services["prometheus"]["volumes"] if volume.startswith("./")]
    assert (ROOT / mounted.partition(":")[0]).is_file()
    arguments = {step.value.partition("=")[0] for step in FOUND if step.name == "ARG"}
    assert services["server"]["build"]["args"].keys() <= arguments
    for service in services.values():  # only this machine reaches them
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_page_about_containers_names_arguments_that_there_are() -> None:
    arguments = {step.value.partition("=")[0] for step in FOUND if step.name == "ARG"}
    assert set(re.findall(r"--build-arg (\w+)=", DOCS)) <= arguments
    variables = set(re.findall(r"\$\{(\w+):", (ROOT / "compose.yaml").read_text()))
    assert set(re.findall(r"^(?:([A-Z_]+)=\S+ )+docker compose", DOCS, flags=re.MULTILINE)) <= variables
    files = re.findall(r"-f (\S+)", DOCS)
    assert files
    assert all((ROOT / name).is_file() for name in files)
