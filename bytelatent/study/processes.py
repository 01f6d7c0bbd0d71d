"""The jobs of a study on the GPUs of this machine: a process for each, as many at once as there are GPUs."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from bytelatent.config import load_yaml
from bytelatent.errors import in_one_line
from bytelatent.progress import time_left
from bytelatent.run_folder import read_metrics
from bytelatent.signals import sigterm_interrupts
from bytelatent.study.plan import RUNS
from bytelatent.study.worker import BITS, StudyJob

LOGGER = logging.getLogger(__name__)

POLL = 0.2  # seconds
REPORT_EVERY = 30.0  # seconds between the lines of a run
VISIBLE = "CUDA_VISIBLE_DEVICES"
NO_GPU = ""


def gpu_names(count: int) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls the first GPUs that this process sees."""
    visible = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return (visible or [str(number) for number in range(count)])[:count]


class JobPool:
    """Runs jobs, each in a process that sees one GPU, or none where it needs none.

    Args:
        logs: the folder of what the processes print.
        gpus: as `gpu_names` gives them.
    """

    def __init__(self, logs: Path, gpus: Sequence[str]):
        self.logs, self.gpus = logs, gpus
        self._running: dict[str, tuple[StudyJob, str, subprocess.Popen[bytes]]] = {}
        self._reported: dict[str, float] = {}

    def run(self, jobs: Sequence[StudyJob], needs: Mapping[str, Collection[str]]) -> dict[str, str]:
        """Run all jobs; a failed one leaves the others alone, but for those that need it.

        Args:
            needs: by a job's name, the jobs that must be done before it.

        Returns:
            Why each failed job did, and where its log is.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the processes have saved and ended.
        """
        waiting, done, failures = list(jobs), set[str](), dict[str, str]()
        began = time.monotonic()
        with sigterm_interrupts():
            try:
                while waiting or self._running:
                    waiting = self._begin(waiting, needs, done, failures)
                    time.sleep(POLL)
                    for name, (job, _, process) in list(self._running.items()):
                        if process.poll() is None:
                            self._report(job)
                            continue
                        del self._running[name]
                        if process.returncode:
                            failures[name] = f"{self._reason(job, process.returncode)}; log: {self._log(job)}"
                            LOGGER.warning(f"{name} failed: {failures[name]}")
                            continue
                        done.add(name)
                        share = (len(done) + len(failures)) / len(jobs)
                        left = (time.monotonic() - began) * (1 - share) / share
                        more = f", {time_left(left)} at this pace" if share < 1 else ""
                        LOGGER.info(f"{name}: done, {len(done)} of {len(jobs)}{more}")
            finally:
                self._end()
        return failures

    def _begin(
        self, waiting: list[StudyJob], needs: Mapping[str, Collection[str]], done: set[str], failures: dict[str, str]
    ) -> list[StudyJob]:
        """Start what can be started; the jobs that wait on."""
        still: list[StudyJob] = []
        for job in waiting:
            needed = set(needs.get(job.name, ()))
            if failed := sorted(needed & failures.keys()):
                failures[job.name] = f"it needs {failed[0]}, which failed"
                continue
            taken = [gpu for _, gpu, _ in self._running.values()]
            free = NO_GPU if job.is_for_the_cpu else next((gpu for gpu in self.gpus if gpu not in taken), None)
            if free is None or not needed <= done:
                still.append(job)
                continue
            self._running[job.name] = job, free, self._start(job, free)
            LOGGER.info(f"{job.name}: begins" + (f" on GPU {free}" if free != NO_GPU else ""))
        return still

    def _start(self, job: StudyJob, gpu: str) -> "subprocess.Popen[bytes]":
        given = [f"{key}={json.dumps(value)}" for key, value in job.plain().items() if value not in (None, [])]
        command = [sys.executable, "-m", "bytelatent.study.worker", *given]
        self.logs.mkdir(parents=True, exist_ok=True)
        with self._log(job).open("ab") as log:
            # In a session of its own: Ctrl-C comes to this process, which passes it on once.
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, VISIBLE: gpu},
                start_new_session=True,
            )

    def _end(self) -> None:
        """Let the processes that still run save and end; a second Ctrl-C does not let them save."""
        if not self._running:
            return
        LOGGER.info(f"stopping: {', '.join(self._running)}; what is trained is saved")
        for _ in range(2):
            try:
                for _, _, process in self._running.values():
                    process.send_signal(signal.SIGINT)
                for _, _, process in self._running.values():
                    process.wait()
                break
            except KeyboardInterrupt:
                continue
        self._running.clear()

    def _report(self, job: StudyJob) -> None:
        """Show how far a run is, now and then."""
        now = time.monotonic()
        if job.run is None or now - self._reported.setdefault(job.name, now) < REPORT_EVERY:
            return
        self._reported[job.name] = now
        folder = job.place / RUNS / job.run
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if BITS in row]
        if not rows or not rows[-1].get("seconds"):
            return
        steps, step, bits = load_yaml(folder / "settings.yaml")["steps"], rows[-1]["step"], rows[-1][BITS]
        shown = "" if bits is None else f"  {bits:.3f} bits/byte"
        left = time_left(rows[-1]["seconds"] * (steps - step) / step)
        LOGGER.info(f"{job.name}  {step / steps:4.0%}  step {step:,} of {steps:,}{shown}  {left}")

    def _log(self, job: StudyJob) -> Path:
        return self.logs / f"{job.name}.log"

    def _reason(self, job: StudyJob, code: int) -> str:
        if code < 0:
            return f"ended by signal {-code}"
        lines = [line for line in self._log(job).read_text(errors="replace").splitlines() if line.strip()]
        return in_one_line(lines[-1].removeprefix("error: ")) if lines else f"ended with {code}"
