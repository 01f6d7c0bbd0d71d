"""A job as it runs: the batch script under bash, with signals, and what it starts."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from bytelatent.errors import STOPPED
from bytelatent.training import read_metrics
from tests.launch.conftest import JOB, SAVED, STAND_IN, STEP, Cluster, launched
from tests.processes import Command
from tests.training.tiny_runs import byte_lm_run, checkpoints, write_text

NAME = 'it\'s "1" $HOME'


def wait_for(happened: Callable[[], object], job: "subprocess.Popen[str] | Command", seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.01)


def begun(job: "subprocess.Popen[str] | Command", log: Path) -> None:
    wait_for(lambda: log.is_file() and "\n" in log.read_text(), job)


def start(cluster: Cluster, end: object, *arguments: str) -> tuple["subprocess.Popen[str]", Path]:
    """A job of the stand-in by srun alone, and the log of its one process."""
    folder = Path("runs", NAME)
    launched("script=stand_in", f"dump_dir={folder}", "ngpu=0", "launcher=srun", *arguments, "--", f"end={end}")
    return cluster.start(folder / "submit.slurm"), folder / "logs" / "7" / "0.out"


@pytest.mark.parametrize("end", [0, 3, 1])
def test_the_job_ends_as_its_script_does(cluster: Cluster, stand_in: Callable[[str], None], end: int) -> None:
    job, log = start(cluster, end, "requeue=true")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == end, said
    assert f"ended with {end}" in said.splitlines()[-1]
    config = Path("runs", NAME).absolute() / "config.yaml"
    code = Path("runs", NAME).absolute() / "code" / "bytelatent" / "__init__.py"
    assert log.read_text() == f"first {[f'config={config}']} 0 1 {code}\n"
    assert not any("requeue" in line for line in cluster.asked)


def test_what_is_edited_later_changes_no_job(cluster: Cluster, stand_in: Callable[[str], None]) -> None:
    launched("script=stand_in", "dump_dir=copied", "launcher=srun", "ngpu=0", "--", "end=0")
    launched("script=stand_in", "dump_dir=shared", "launcher=srun", "ngpu=0", "copy_code=false", "--", "end=0")
    stand_in("second")
    for name, version in (("copied", "first"), ("shared", "second")):
        # Without a copy the working folder is not on the path either; here PYTHONPATH names it.
        os.environ["PYTHONPATH"], before = os.getcwd(), os.environ.get("PYTHONPATH")
        try:
            cluster.start(Path(name, "submit.slurm")).communicate(timeout=60)
        finally:
            os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
        assert Path(name, "logs", "7", "0.out").read_text().startswith(version)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_stops_the_script_and_requeues_the_job(
    cluster: Cluster, stand_in: Callable[[str], None], number: signal.Signals
) -> None:
    job, log = start(cluster, "wait", "requeue=true")
    begun(job, log)
    job.send_signal(number)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == STOPPED, said
    assert log.read_text().splitlines()[-1] == SAVED
    assert cluster.asked[-1] == "scontrol requeue 7"


def test_a_warning_before_the_script_has_begun(cluster: Cluster, stand_in: Callable[[str], None]) -> None:
    cluster.install("srun", 'while [[ $1 == --* ]]; do shift; done; echo waits >>{log}; sleep 0.3; exec "$@"\n')
    job, _ = start(cluster, "wait", "requeue=true")
    wait_for(lambda: "waits" in cluster.asked, job)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode in (128 + signal.SIGUSR1, STOPPED)
    assert cluster.asked[-1] == "scontrol requeue 7"


def test_a_warning_before_anything_has_begun(cluster: Cluster, stand_in: Callable[[str], None]) -> None:
    cluster.install("scontrol", 'echo "scontrol $*" >>{log}; if [[ $1 == show ]]; then sleep 0.3; echo here; fi\n')
    job, _ = start(cluster, "wait", "requeue=true")
    wait_for(lambda: "scontrol show hostnames here" in cluster.asked, job)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode in (128 + signal.SIGUSR1, STOPPED)
    assert cluster.asked[-1] == "scontrol requeue 7"


def test_a_script_that_answers_no_signals_is_stopped_and_not_requeued(
    cluster: Cluster, stand_in: Callable[[str], None]
) -> None:
    job, log = start(cluster, "never")
    begun(job, log)
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == STOPPED
    assert log.read_text().splitlines()[-1] == "stopped"
    assert not any("requeue" in line for line in cluster.asked)


def test_a_cancelled_job_is_not_requeued(cluster: Cluster, stand_in: Callable[[str], None]) -> None:
    cluster.install("srun", 'while [[ $1 == --* ]]; do shift; done; echo $$ >>{log}; exec "$@"\n')
    job, log = start(cluster, "wait", "requeue=true")
    begun(job, log)
    for process in (job.pid, int(cluster.asked[-1])):  # scancel sends it to the batch script and to every process
        os.kill(process, signal.SIGTERM)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == STOPPED, said
    assert not any("requeue" in line for line in cluster.asked)


def test_a_requeue_that_slurm_refuses_names_the_way_out(cluster: Cluster, stand_in: Callable[[str], None]) -> None:
    cluster.install("scontrol", "[[ $1 == show ]] && echo 127.0.0.1\n")
    job, _ = start(cluster, STOPPED, "requeue=true")
    said, _ = job.communicate(timeout=60)
    assert f"sbatch {Path('runs', NAME).absolute()}/submit.slurm" in said.splitlines()[-1]


def test_training_is_warned_requeued_and_goes_on(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = write_text(tmp_path / "text.jsonl", seed=0)
    values = byte_lm_run(Path("elsewhere"), text, steps=100_000, checkpoint={"every": 100_000})
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(values))
    run = tmp_path / NAME
    launched("config=given.yaml", f"dump_dir={run}", "ngpu=0", "ncpu=1", "launcher=srun", "time=1")
    job = cluster.start(run / "submit.slurm")
    wait_for(lambda: len(read_metrics(run / "metrics.jsonl")) >= 5, job)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == STOPPED, said
    step = read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert checkpoints(run) == [f"step-{step:08d}"]
    assert cluster.asked[-1] == "scontrol requeue 7"
    # The same job again. So that it comes to an end: fewer steps.
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("steps: 100000", f"steps: {step + 3}"))
    job = cluster.start(run / "submit.slurm")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    log = (run / "logs" / "7" / "0.out").read_text()
    assert f"stopped: after step {step}; the same command resumes\n" in log
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [*range(1, step + 4)]
    assert checkpoints(run)[-1] == f"step-{step + 3:08d}"


def run_torchrun(folder: Path, end: object, processes: int, script: str = STAND_IN) -> Command:
    (folder / "stand_in.py").write_text(script)
    (folder / "config.yaml").write_text(yaml.safe_dump({"end": end}))
    (folder / "logs" / "7").mkdir(parents=True)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, **JOB, **STEP, "DUMP_DIR": str(folder), "PYTHONPATH": f"{root}:{folder}"}
    torchrun = [sys.executable, "-m", "bytelatent.launch.torchrun", f"--nproc-per-node={processes}", "--standalone"]
    command = [*torchrun, "-m", "bytelatent.launch.worker", "stand_in", f"config={folder / 'config.yaml'}"]
    return Command(command, environment)


def test_torchrun_ends_with_the_code_of_its_processes(tmp_path: Path) -> None:
    job = run_torchrun(tmp_path, 3, processes=1)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 3, errors
    assert "rank 0 was the first to end, with 3" in errors


# Rank 1 meets an error a little earlier, and is ended by torchrun as rank 0 has ended.
ENDED_BY_TORCHRUN = """
import json, os, sys, time
mark = os.environ["DUMP_DIR"] + "/mark"
if os.environ["RANK"] == "1":
    with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
        json.dump({"message": {"message": "", "extraInfo": {"timestamp": "1"}}}, file)
    open(mark, "w").close()
    time.sleep(100)
while not os.path.exists(mark):
    time.sleep(0.01)
sys.exit(130)
"""


def test_what_torchrun_ended_itself_is_not_the_reason(tmp_path: Path) -> None:
    job = run_torchrun(tmp_path, None, processes=2, script=ENDED_BY_TORCHRUN)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == STOPPED, errors
    assert "rank 0 was the first to end, with 130" in errors


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_all_of_a_torchrun_reaches_its_processes_once(tmp_path: Path, number: signal.Signals) -> None:
    job = run_torchrun(tmp_path, "wait", processes=2)
    logs = [tmp_path / "logs" / "7" / f"{rank}.out" for rank in (0, 1)]
    for rank, log in enumerate(logs):
        begun(job, log)
        assert f" {rank} 2 " in log.read_text()
    for process in processes_below(job.pid):
        os.kill(process, number)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == STOPPED, errors
    assert [log.read_text().splitlines()[-1] for log in logs] == [SAVED, SAVED]


def test_no_process_outlives_its_torchrun(tmp_path: Path) -> None:
    job = run_torchrun(tmp_path, "wait", processes=2)
    logs = [tmp_path / "logs" / "7" / f"{rank}.out" for rank in (0, 1)]
    for log in logs:
        begun(job, log)
    _, *ranks = processes_below(job.pid)
    job.kill()
    job.communicate(timeout=60)
    try:
        until = time.monotonic() + 10
        while [log.read_text().splitlines()[-1] for log in logs] != [SAVED, SAVED]:
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)


def processes_below(parent: int) -> list[int]:
    """A process and all that it started, as SLURM finds the processes of a job."""
    with open(f"/proc/{parent}/task/{parent}/children", encoding="ascii") as file:
        children = [int(child) for child in file.read().split()]
    return [parent, *(below for child in children for below in processes_below(child))]
