"""The same on a real SLURM, where there is one."""

import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.conftest import SAVED, launched


def why_not() -> str | None:
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        return "there is no SLURM on this machine"
    ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True)
    return None if " UP" in ping.stdout else "no SLURM controller answers"


WHY_NOT = why_not()
NAME = 'it\'s \\a "1" #$HOME'
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def queued(job: str, column: str) -> str:
    command = ["squeue", "-h", "-j", job, "-o", column]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.rstrip("\n")


def state(job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"(\w+)=(\S*)", shown))


def wait_for(happened: Callable[[], object], log: Path, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, log.read_text() if log.exists() else "it has not begun"
        time.sleep(0.1)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_warned_it_saves_and_waits_to_go_on(tmp_path: Path, stand_in: Callable[[str], None], launcher: str) -> None:
    folder = tmp_path / 'it\'s "1" $HOME'
    asked = ["script=stand_in", f"dump_dir={folder}", f"launcher={launcher}", "requeue=true", "ngpu=0", "ncpu=1"]
    job = launched(*asked, "time=5", f"name={NAME}", "--", "end=wait").split()[1]
    log, own = folder / "logs" / f"{job}.out", folder / "logs" / job / "0.out"
    try:
        wait_for(lambda: own.exists() and "\n" in own.read_text(), log)
        assert queued(job, "%j") == NAME
        subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
        wait_for(lambda: state(job)["JobState"] == "PENDING", log)
        assert state(job)["Restarts"] == "1"
        assert own.read_text().splitlines()[-1] == SAVED
        assert "ended with 130" in log.read_text()
    finally:
        subprocess.run(["scancel", job], check=True)


def test_cancelled_it_saves_and_does_not_go_on(tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    folder = tmp_path / "run"
    asked = ["script=stand_in", f"dump_dir={folder}", "requeue=true", "ngpu=0", "ncpu=1"]
    job = launched(*asked, "--", "end=wait").split()[1]
    log, own = folder / "logs" / f"{job}.out", folder / "logs" / job / "0.out"
    wait_for(lambda: own.exists() and "\n" in own.read_text(), log)
    subprocess.run(["scancel", job], check=True)
    wait_for(lambda: log.exists() and "ended with" in log.read_text(), log)
    assert own.read_text().splitlines()[-1] == SAVED
    time.sleep(1)
    assert state(job)["JobState"] in ("CANCELLED", "COMPLETING")
