"""Jobs on GPUs: who begins when, and what follows where one fails. Real processes: test_run.py."""

from pathlib import Path

import pytest

from bytelatent.study.processes import JobPool, gpu_names
from bytelatent.study.worker import StudyJob


class Process:
    """One that ends when it is asked for the third time, with what its job's name says."""

    def __init__(self, name: str):
        self.name, self.polls = name, 0
        self.returncode = -9 if name.startswith("bad") else 0

    def poll(self) -> int | None:
        self.polls += 1
        return None if self.polls < 3 else self.returncode


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, list[str]]]:
    """The jobs as they began: name, GPU, and those that ran beside it."""
    found: list[tuple[str, str, list[str]]] = []

    def start(pool: JobPool, job: StudyJob, gpu: str) -> Process:
        found.append((job.name, gpu, list(pool._running)))
        return Process(job.name)

    monkeypatch.setattr(JobPool, "_start", start)
    monkeypatch.setattr("bytelatent.study.processes.POLL", 0.0)
    return found


def test_jobs_wait_for_what_they_need_and_for_a_gpu(tmp_path: Path, begun: list[tuple[str, str, list[str]]]) -> None:
    parts = [StudyJob(folder="x", part=part) for part in ("tokenizer 8192", "entropy_model small")]
    runs = [StudyJob(folder="x", run=name) for name in ("token", "entropy", "flat", "space")]
    needs = {"token": ["tokenizer-8192"], "entropy": ["entropy_model-small"]}
    assert JobPool(tmp_path, ["3", "5"]).run([*parts, *runs], needs) == {}
    # The tokenizer takes no GPU, and what needs nothing begins on the other one.
    assert begun[:3] == [
        ("tokenizer-8192", "", []),
        ("entropy_model-small", "3", ["tokenizer-8192"]),
        ("flat", "5", ["tokenizer-8192", "entropy_model-small"]),
    ]
    assert sorted(name for name, _, _ in begun) == sorted(job.name for job in [*parts, *runs])
    order = [name for name, _, _ in begun]
    assert order.index("entropy") > order.index("entropy_model-small")
    assert all(len([other for other in beside if other != "tokenizer-8192"]) < 2 for _, _, beside in begun)


def test_what_needs_a_failed_job_fails_with_it(tmp_path: Path, begun: list[tuple[str, str, list[str]]]) -> None:
    jobs = [StudyJob(folder="x", run=name) for name in ("bad", "needs-it", "other")]
    failures = JobPool(tmp_path, ["0"]).run(jobs, {"needs-it": ["bad"]})
    assert failures == {
        "bad": f"ended by signal 9; log: {tmp_path / 'bad.log'}",
        "needs-it": "it needs bad, which failed",
    }
    assert [name for name, _, _ in begun] == ["bad", "other"]


def test_names_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_names(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert gpu_names(2) == ["4", "6"]
