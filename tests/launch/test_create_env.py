"""setup/create_env.sh, with an interpreter that only writes down what it is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "setup" / "create_env.sh"
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$ASKED"
case "$1 $2" in
  "-c "*) exit "${TOO_OLD:-0}" ;;
  "-m venv") mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
  "-m pip") exit "${BROKEN:-0}" ;;
esac
"""


class Shell:
    def __init__(self, place: Path):
        self.place = place
        self.asked = place / "asked"
        self.python = place / "some python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def run(self, *arguments: object, script: Path = SCRIPT, **more: str) -> subprocess.CompletedProcess[str]:
        self.asked.write_text("")
        environment = {**os.environ, "PYTHON": str(self.python), "ASKED": str(self.asked), **more}
        command = ["bash", str(script), *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=self.place, capture_output=True, text=True)

    def commands(self) -> list[str]:
        return self.asked.read_text().splitlines()[1:]  # the first one asks for the version


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def install(extras: str = "data,hf") -> str:
    return f"-m pip install --quiet -c {ROOT}/constraints.txt -e {ROOT}[{extras}]"


def test_it_makes_an_environment_and_brings_it_up_to_date(shell: Shell) -> None:
    ended = shell.run("my env")
    env = shell.place / "my env"
    assert (ended.returncode, ended.stdout) == (0, f"ready: . '{env}/bin/activate'\n"), ended.stderr
    assert shell.commands() == [f"-m venv {env}", install()]
    assert not (env / ".unfinished").exists()
    (env / "mine").touch()
    assert shell.run(env, "data,track").returncode == 0
    assert shell.commands() == [install("data,track")]
    assert (env / "mine").exists()


def test_one_whose_making_broke_off_is_made_again(shell: Shell) -> None:
    env = shell.place / "env"
    assert shell.run("env", BROKEN="1").returncode == 1
    (env / "half").touch()
    assert shell.run("env").returncode == 0
    assert shell.commands() == [f"-m venv {env}", install()]
    assert not (env / "half").exists()


@pytest.mark.parametrize("inside", ["", "setup"])
def test_as_a_job_it_finds_the_repository_where_sbatch_was_called(shell: Shell, inside: str) -> None:
    spool = shell.place / "spool" / "job1"
    spool.mkdir(parents=True)
    copy = Path(shutil.copy(SCRIPT, spool / "slurm_script"))
    assert shell.run("env", script=copy, SLURM_SUBMIT_DIR=str(ROOT / inside)).returncode == 0
    assert shell.commands()[-1] == install()
    ended = shell.run("env", script=copy, SLURM_SUBMIT_DIR=str(shell.place))
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "call it from its top: sbatch setup/create_env.sh" in ended.stderr


def test_what_will_not_do_is_one_line(shell: Shell) -> None:
    ended = shell.run("env", TOO_OLD="1")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "is not Python 3.11 or newer; name one: PYTHON=python3.12" in ended.stderr
    (shell.place / "notes").mkdir()
    (shell.place / "notes" / "a.txt").touch()
    ended = shell.run("notes")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert "notes' is something else than an environment; name another folder" in ended.stderr
    assert os.listdir(shell.place / "notes") == ["a.txt"]
