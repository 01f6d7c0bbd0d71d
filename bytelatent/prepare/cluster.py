"""The same steps as jobs of a SLURM cluster, or on Ray."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.log import Console
from bytelatent.prepare.disk import write_text
from bytelatent.prepare.settings import PrepareSettings
from bytelatent.prepare.work import Plan, Work

MAX_ARRAY = 1000  # jobs in an array; more tasks than that share jobs


def jobs_of(plan: Plan, work: Work) -> list[tuple[Any, int]]:
    """The steps in order, each with its number of tasks."""
    from bytelatent.prepare.steps import Cut, Finish, Gather, Scatter

    out = str(work.out.absolute())
    gathering = min(max(sum(file.likely_bytes for file in plan.files) // plan.range_bytes, 1), MAX_ARRAY)
    return [(Scatter(out), len(plan.tasks)), (Cut(out), 1), (Gather(out), gathering), (Finish(out), 1)]


def submit(settings: PrepareSettings, work: Work, console: Console) -> None:
    """Hand the work to SLURM as a chain of jobs, and return; nothing is handed over twice.

    Raises:
        UserError: this is no cluster, or SLURM refuses.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--executor: there is no 'sbatch' here; run this where SLURM's commands are, or use local")
    if settings.partition is None:
        raise UserError("--partition: name the partition of the cluster; 'sinfo' lists them")
    from datatrove.executor.slurm import SlurmPipelineExecutor

    saved = work.folder / "jobs.json"
    if (job := _last_job(saved)) is not None and _is_active(job):
        console.print(f"still at work: job {job}; 'squeue -j {job}' shows it", soft_wrap=True)
        return
    last = None
    for step, tasks in jobs_of(work.plan, work):
        last = SlurmPipelineExecutor(
            [step],
            tasks=tasks,
            time=settings.time,
            partition=settings.partition,
            mem_per_cpu_gb=max(1, math.ceil(settings.memory)),
            workers=settings.workers or -1,
            job_name=f"prepare-{step.name}",
            qos=None,  # type: ignore[arg-type]
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
            logging_dir=str(work.folder / "logs" / step.name),
            skip_completed=False,  # the steps' own markers say what is done
            depends=last,
            tasks_per_job=-(-tasks // MAX_ARRAY),
        )
    assert last is not None
    try:
        _quietly(work, last.run)
    except (subprocess.CalledProcessError, OSError) as error:
        raise UserError(f"--executor: SLURM did not take the jobs: {error}") from None
    write_text(saved, json.dumps({"last": last.job_id}))
    console.print(
        f"handed to SLURM; the last job is {last.job_id}, logs are in '{work.folder / 'logs'}'", soft_wrap=True
    )


def run_on_ray(settings: PrepareSettings, work: Work) -> None:
    """Run the steps one after the other on Ray.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("--executor: ray is not installed; run: pip install ray") from None
    from datatrove.executor.ray import RayPipelineExecutor

    for step, tasks in jobs_of(work.plan, work):
        RayPipelineExecutor(
            [step],
            tasks=tasks,
            workers=settings.workers or -1,
            mem_per_cpu_gb=settings.memory,
            logging_dir=str(work.folder / "logs" / step.name),
            skip_completed=False,
        ).run()


def _quietly(work: Work, call: Any) -> None:
    """Call with datatrove's log in a file."""
    from datatrove.utils.logging import logger, setup_default_logger

    logger.remove()
    logger.add(str(work.folder / "logs" / "submit.log"))
    try:
        call()
    finally:
        setup_default_logger()


def _last_job(saved: Path) -> str | None:
    try:
        return json.loads(saved.read_text(encoding="utf-8"))["last"]
    except (OSError, ValueError, KeyError):
        return None


def _is_active(job: str) -> bool:
    try:
        asked = subprocess.run(
            ["squeue", "-h", "-j", str(job)], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(asked.stdout.strip())
