"""Ctrl-C in the first moments of the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A module that takes its time to import, and passes over an error inside it as some do.
SLOW = """
import time
try:
    print("importing", flush=True)
    time.sleep(60)
except BaseException:
    pass
"""


@pytest.mark.parametrize(
    "arguments", [["patch", "x", "--mode", "space"], ["info", "blt-1b"], ["train", "config=debug"]]
)
def test_while_modules_are_imported(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "bytelatent", *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1
    assert errors.startswith("stopped")


@pytest.mark.parametrize("module", ["typer", "signal"])  # and what is imported before any other
def test_before_a_verb_begins(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(SLOW)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "from bytelatent.__main__ import main; main()"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "stopped\n")
