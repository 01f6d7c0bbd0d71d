"""Jobs of a study: submitted once, with what the worker reads. What `launch` writes is tested there."""

import shutil
from pathlib import Path

import pytest

from bytelatent.config import load_yaml
from bytelatent.errors import UserError
from bytelatent.launch import slurm
from bytelatent.launch.slurm import SlurmNode
from bytelatent.study.slurm_jobs import submit_job
from bytelatent.study.worker import StudyJob


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[Path, str]:
    """Batch scripts that are in the queue of a cluster whose nodes have GPUs."""
    waiting: dict[Path, str] = {}

    def submit(script: Path, environment: dict[str, str]) -> str:
        return waiting.setdefault(script, f"{len(waiting) + 1}")

    monkeypatch.setattr(slurm, "submit", submit)
    monkeypatch.setattr(slurm, "job_of", waiting.get)
    monkeypatch.setattr(slurm, "largest_node", lambda partition: SlurmNode(8, 64))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    return waiting


def test_a_job_is_in_the_queue_once(queue: dict[Path, str], tmp_path: Path) -> None:
    job = StudyJob(folder=str(tmp_path), run="token-1e16-0", only=["token"], tuning_only=True)
    given = {"partition": "gpu", "copy_code": "false"}
    assert submit_job(job, given).startswith("token-1e16-0: job 1 submitted; tail -F ")
    assert submit_job(job, given) == "token-1e16-0: job 1 is pending or runs"
    [script] = queue
    assert script == tmp_path / "jobs" / "token-1e16-0" / "submit.slurm"
    text = script.read_text()
    for part in ("--gres=gpu:1", "--partition=gpu", "bytelatent.study.worker", "--requeue", "SLURM_RESTART_COUNT"):
        assert part in text
    assert StudyJob.parse(load_yaml(script.parent / "config.yaml")) == job
    queue.clear()  # it ended without its row
    assert "submitted" in submit_job(job, given)


def test_a_run_is_one_process(queue: dict[Path, str], tmp_path: Path) -> None:
    job = StudyJob(folder=str(tmp_path), part="all")
    with pytest.raises(UserError, match="a run of a study is one process, not 2; take nodes=1 ngpu=1"):
        submit_job(job, {"nodes": "2"})
    with pytest.raises(UserError, match="slurm: partitoin: unknown key; did you mean 'partition'"):
        submit_job(job, {"partitoin": "gpu"})
    assert not queue
