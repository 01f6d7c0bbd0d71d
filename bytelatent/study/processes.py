"""The jobs of a study on the GPUs of this machine: a process for each, as many at once as there are GPUs."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from bytelatent.errors import in_one_line
from bytelatent.progress import time_left
from bytelatent.run_folder import read_metrics
from bytelatent.signals import sigterm_interrupts
from bytelatent.study.cost import PlannedRun
from bytelatent.study.worker import BITS, StudyJob

LOGGER = logging.getLogger(__name__)

POLL = 0.2  # seconds
REPORT_EVERY = 30.0  # seconds between the lines of a run
VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpu_names(count: int) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls the first GPUs that this process sees."""
    visible = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return (visible or [str(number) for number in range(count)])[:count]


class JobPool:
    """Runs jobs, each in a process that sees one GPU.

    Args:
        logs: the folder of what the processes print.
        gpus: as `gpu_names` gives them.
    """

    def __init__(self, logs: Path, gpus: Sequence[str]):
        self.logs, self.gpus = logs, gpus
        self._running: dict[str, tuple[StudyJob, subprocess.Popen[bytes]]] = {}
        self._reported: dict[str, float] = {}

    def run(self, jobs: Sequence[StudyJob], runs: dict[str, PlannedRun]) -> dict[str, str]:
        """Run all jobs; a failed one leaves the others alone.

        Args:
            runs: by name, for the progress; not of jobs that make what runs share.

        Returns:
            Why each failed job did, and where its log is.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM; the processes have saved and ended.
        """
        waiting, failures, ended = deque(jobs), dict[str, str](), 0
        began = time.monotonic()
        with sigterm_interrupts():
            try:
                while waiting or self._running:
                    for gpu in self.gpus:
                        if gpu not in self._running and waiting:
                            job = waiting.popleft()
                            self._running[gpu] = job, self._start(job, gpu)
                            LOGGER.info(f"{job.name}: begins on GPU {gpu}")
                    time.sleep(POLL)
                    for gpu, (job, process) in list(self._running.items()):
                        if process.poll() is None:
                            self._report(job, runs.get(job.name))
                            continue
                        del self._running[gpu]
                        ended += 1
                        if process.returncode:
                            failures[job.name] = f"{self._reason(job, process.returncode)}; log: {self._log(job)}"
                            LOGGER.warning(f"{job.name} failed: {failures[job.name]}")
                        else:
                            left = (time.monotonic() - began) * (len(jobs) - ended) / ended
                            more = f", {time_left(left)} at this pace" if ended < len(jobs) else ""
                            LOGGER.info(f"{job.name}: done, {ended} of {len(jobs)}{more}")
            finally:
                self._end()
        return failures

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
        LOGGER.info(f"stopping: {', '.join(job.name for job, _ in self._running.values())} save what they have")
        for _ in range(2):
            try:
                for _, process in self._running.values():
                    process.send_signal(signal.SIGINT)
                for _, process in self._running.values():
                    process.wait()
                break
            except KeyboardInterrupt:
                continue
        self._running.clear()

    def _report(self, job: StudyJob, run: PlannedRun | None) -> None:
        """Show how far a run is, now and then."""
        now = time.monotonic()
        if run is None or now - self._reported.setdefault(job.name, now) < REPORT_EVERY:
            return
        self._reported[job.name] = now
        rows = [row for row in read_metrics(Path(run.draft.settings.run) / "metrics.jsonl") if BITS in row]
        if not rows or not rows[-1].get("seconds"):
            return
        step, bits = rows[-1]["step"], rows[-1][BITS]
        left = rows[-1]["seconds"] * (run.steps - step) / step
        shown = "" if bits is None else f"  {bits:.3f} bits/byte"
        LOGGER.info(f"{job.name}  {step / run.steps:4.0%}  step {step:,} of {run.steps:,}{shown}  {time_left(left)}")

    def _log(self, job: StudyJob) -> Path:
        return self.logs / f"{job.name}.log"

    def _reason(self, job: StudyJob, code: int) -> str:
        if code < 0:
            return f"ended by signal {-code}"
        lines = [line for line in self._log(job).read_text(errors="replace").splitlines() if line.strip()]
        return in_one_line(lines[-1].removeprefix("error: ")) if lines else f"ended with {code}"
