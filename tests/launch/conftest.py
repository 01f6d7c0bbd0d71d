"""A cluster of shell scripts: they do at once, here, what SLURM's commands do later and elsewhere."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bytelatent.commands import launch as stool

COMMANDS = {
    "sbatch": 'echo "sbatch $*" >>{log}; echo 7\n',
    "sinfo": "printf 'gpu*|64|gpu:h100:8(S:0-1)\\ngpu*|96+|gpu:a100:4,shard:2\\ncpu|2|(null)\\n'\n",
    "squeue": "true\n",
    "scontrol": '[[ $1 == show ]] && echo 127.0.0.1 || echo "scontrol $*" >>{log}\n',
    # It becomes the one process that it starts, which so gets the signals that are forwarded.
    "srun": 'echo "srun $*" >>{log}; while [[ $1 == --* ]]; do shift; done; exec "$@"\n',
}
# What SLURM tells a job, and what srun tells its processes.
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NODEID": "0"}
STEP = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
# A script that does what its configuration says. Told to stop, it saves for a while, and waits for the others to have
# saved, as training does.
STAND_IN = """
import glob, os, signal, sys, time
import yaml
import bytelatent
from bytelatent.errors import STOPPED, guarded

def main():
    config = yaml.safe_load(open(sys.argv[1].removeprefix("config=")))
    signals = []
    if config["end"] == "wait":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: signals.append(number))
    print("VERSION", sys.argv[1:], os.environ["RANK"], os.environ["WORLD_SIZE"], bytelatent.__file__, flush=True)
    while config["end"] == "never":
        time.sleep(0.01)
    if config["end"] != "wait":
        sys.exit(config["end"])
    while not signals:
        time.sleep(0.01)
    time.sleep(0.3)
    print("saved after", len(signals), "signals", flush=True)
    while not all("saved" in open(log).read() for log in glob.glob(os.environ["DUMP_DIR"] + "/logs/7/*.out")):
        time.sleep(0.01)
    sys.exit(STOPPED)

guarded(main)
"""
SAVED = "saved after 1 signals"


@dataclass
class Cluster:
    """What was asked of SLURM's commands, and a way to run a job as it would."""

    log: Path
    place: Path
    jobs: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def asked(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def install(self, name: str, script: str) -> None:
        (self.place / name).write_text("#!/usr/bin/env bash\n" + script.replace("{log}", shlex.quote(str(self.log))))
        (self.place / name).chmod(0o755)

    def start(self, script: Path) -> "subprocess.Popen[str]":
        """Run a batch script."""
        environment = {**os.environ, **JOB, **STEP, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
        pipe = subprocess.PIPE
        job = subprocess.Popen(["bash", script], env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        self.jobs.append(job)
        return job


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    place = tmp_path / "bin"
    place.mkdir()
    made = Cluster(tmp_path / "asked", place)
    for name, script in COMMANDS.items():
        made.install(name, script)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    yield made
    for job in made.jobs:
        job.kill()
        job.wait()
        assert job.stdout is not None
        job.stdout.close()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A module of that name in the working folder; called with a version, it is edited."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def edit(version: str) -> None:
        (tmp_path / "stand_in.py").write_text(STAND_IN.replace("VERSION", version))

    edit("first")
    yield edit
    sys.modules.pop("stand_in", None)


def launched(*arguments: object) -> str:
    """The line that a launch ends with."""
    return stool.main([str(argument) for argument in arguments])
