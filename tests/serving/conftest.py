"""The server and its page; `make test-serve` installs what these tests need, and runs them."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if "TEST_SERVE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    import httpx

import torch

from bytelatent import BLT
from bytelatent.vocab import EOS
from tests.model.tiny import tiny_blt
from tests.processes import Command
from tests.test_blt import wrap

COMMAND = [sys.executable, "-m", "bytelatent.cli", "serve"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
READY_SECONDS = 120  # on a machine that does much else


class Served:
    """`blt serve MODEL` as a process of its own.

    Attributes:
        address: as it prints it.
        client: for raw requests.
    """

    def __init__(self, model: Path, *arguments: str, environment: dict[str, str] | None = None):
        command = [*COMMAND, str(model), "--port", "0", "--name", "tiny-test", *arguments]
        self.process = Command(command, ENVIRONMENT | (environment or {}), model.parent)
        self.address = self.wait_for(lambda: re.search(r"open (http://\S+) in a browser", self.output()))[1]
        self.client = httpx.Client(base_url=self.address, timeout=60)
        self.wait_for(lambda: self.client.get("/ready").status_code == 200)

    def wait_for(self, holds: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            if found := holds():
                return found
            assert self.process.poll() is None, self.log()
            time.sleep(0.05)
        raise AssertionError(f"it does not come: {self.log()}")

    def output(self) -> str:
        return self.process.written(1)

    def log(self) -> str:
        return self.process.written(2)

    def logged(self, text: str) -> str:
        """The newest line of the log with this text, once there is one."""
        return self.wait_for(lambda: [line for line in self.log().splitlines() if text in line])[-1]

    def post(self, path: str, body: Any, **headers: str) -> "httpx.Response":
        return self.client.post(path, json=body, headers=headers)

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[:1] != "#"}

    def is_idle(self) -> bool:
        found = self.metrics()
        return found["bytelatent_busy_slots"] == 0 == found["bytelatent_waiting"]

    def must_become_idle(self) -> None:
        """No slot is leaked."""
        self.wait_for(self.is_idle)

    def stop(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends no text of its own accord where the likeliest byte is taken."""
    folder, model = tmp_path_factory.mktemp("served") / "model", tiny_blt(window=6)
    with torch.no_grad():
        model.decoder.output.weight[EOS] = 0
    wrap(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def blt(folder: Path) -> BLT:
    """The model that is served, in this process."""
    return BLT.from_pretrained(folder, dtype="auto")


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Served]:
    """A server that most tests share."""
    limits = [
        "--max-prompt-bytes",
        "20000",
        "--max-new-bytes",
        "100000",
        "--header-seconds",
        "2",
        "--body-seconds",
        "2",
    ]
    found = Served(folder, *limits, "--batch-size", "4")
    yield found
    found.stop()


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Served]]:
    """Starts a server of a test's own."""
    started: list[Served] = []

    def start(*arguments: str, **more: Any) -> Served:
        started.append(Served(folder, *arguments, **more))
        return started[-1]

    yield start
    for one in started:
        one.stop()
