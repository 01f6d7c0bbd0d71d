"""What runs the steps: processes on this machine, or datatrove's executors for SLURM and Ray."""

import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bytelatent.errors import Interrupted, UserError
from bytelatent.prepare.disk import write_text
from bytelatent.prepare.plan import WorkFolder
from bytelatent.prepare.scatter import scatter
from bytelatent.prepare.settings import PrepareSettings
from bytelatent.prepare.shuffle import plan_outputs
from bytelatent.prepare.write import finish, gather, make_room, range_parts
from bytelatent.progress import Progress
from bytelatent.signals import leave_to_parent, noting_interrupts

LOGGER = logging.getLogger(__name__)

KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
POLL_SECONDS = 0.2
MAX_ARRAY = 1000  # jobs in an array; if there are more tasks, jobs do several
Report = Callable[[int], None]  # receives bytes done
Step = Callable[[WorkFolder, int, int, Report], None]  # receives the task and the number of tasks


def _scatter(work: WorkFolder, task: int, tasks: int, report: Report) -> None:
    scatter(work, task, report)


def _plan_outputs(work: WorkFolder, task: int, tasks: int, report: Report) -> None:
    plan_outputs(work)
    make_room(work)


def _finish(work: WorkFolder, task: int, tasks: int, report: Report) -> None:
    finish(work)


STEPS: dict[str, Step] = {"scatter": _scatter, "cut": _plan_outputs, "gather": gather, "finish": _finish}


def run_locally(work: WorkFolder, workers: int) -> None:
    """Do what is not done yet of all steps, in processes of this machine.

    Raises:
        UserError: of a task, or because a worker was killed.
        Interrupted: Ctrl-C.
    """
    plan = work.plan
    sizes = [sum(plan.units[unit].size for unit in range(*task)) for task in plan.tasks]
    left = [task for task in range(len(sizes)) if work.task_files(task).marker() is None]
    _run_step(work, "scatter", left, len(sizes), workers, "reading", sum(sizes[task] for task in left))
    _run_step(work, "cut", [0], 1, 1)
    ranges = json.loads(work.cut_file.read_text(encoding="utf-8"))["ranges"]
    sizes = [end - begin for begin, end in (part["stream"] for part in ranges)]
    left = [number for number in range(len(sizes)) if range_parts(work, number) is None]
    _run_step(work, "gather", left, len(sizes), workers, "writing", sum(sizes[number] for number in left))
    _run_step(work, "finish", [0], 1, 1)


def _run_step(
    work: WorkFolder, step: str, todo: Sequence[int], tasks: int, workers: int, what: str = "", num_bytes: int = 0
) -> None:
    """Do some of a step's tasks; the first that fails, and a worker that dies, ends the others.

    Args:
        what: names the step in its progress bar; empty shows none.
        num_bytes: amount of its work.
    """
    if not todo:
        return
    context = multiprocessing.get_context("fork")  # workers share the memory of what is imported here
    counter = context.Value("q", 0)  # bytes done
    others = set(multiprocessing.active_children())
    with noting_interrupts() as pressed:
        pool = ProcessPoolExecutor(
            min(workers, len(todo)), context, initializer=_begin_worker, initargs=(os.getpid(), counter)
        )
        processes: list[BaseProcess] = []
        pending: set[Future[None]] = set()
        try:
            pending = {pool.submit(_do_task, work.out, step, task, tasks) for task in todo}
            processes = [process for process in multiprocessing.active_children() if process not in others]
            # Only now, for a bar has a thread, and threads and forks do not mix.
            with Progress(what, num_bytes, bar=bool(what)) as progress:
                while pending and not pressed:
                    done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                    for future in done:
                        future.result()
                    if what:
                        progress.advance(counter.value - progress.done)
        except BrokenProcessPool:
            pool.shutdown(cancel_futures=True)
            raise UserError(_why_it_died(processes)) from None
        finally:
            if pending or pressed:
                for process in processes:
                    process.kill()
            pool.shutdown(cancel_futures=True)
    if pressed:
        raise Interrupted("nothing that is done is lost; the same command goes on")


_bytes_done: Any = None  # of a worker: the counter it shares with the others


def _begin_worker(parent: int, counter: Any) -> None:
    global _bytes_done
    _bytes_done = counter
    leave_to_parent()
    if sys.platform == "linux":  # no worker outlives a parent that is killed
        import ctypes

        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _do_task(out: Path, step: str, task: int, tasks: int) -> None:
    STEPS[step](WorkFolder(out), task, tasks, _count)


def _count(num_bytes: int) -> None:
    with _bytes_done.get_lock():
        _bytes_done.value += num_bytes


def _why_it_died(processes: list[BaseProcess]) -> str:
    """About the worker that died first: the pool then ends the others by SIGTERM."""
    codes = [process.exitcode for process in processes if process.exitcode]
    code = next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM)
    if code > 0:
        return f"--workers: a worker ended with code {code}; the same command goes on"
    why = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return (
        f"--workers: a worker was killed ({signal.Signals(-code).name}{why}); nothing that is done is lost; give the "
        "same command again, it goes on, or one with less --memory"
    )


def run_on_slurm(settings: PrepareSettings, work: WorkFolder) -> None:
    """Submit the steps to SLURM as a chain of jobs, and return. While they run, another call submits nothing.

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
        LOGGER.info("still at work: job %s; 'squeue -j %s' shows it", job, job)
        return
    last = None
    for step, tasks in _pipeline_steps(work):
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
        with _datatrove_log(work.folder / "logs" / "submit.log"):
            last.run()
    except (subprocess.CalledProcessError, OSError) as error:
        raise UserError(f"--executor: SLURM did not take the jobs: {error}") from None
    write_text(saved, json.dumps({"last": last.job_id}))
    LOGGER.info("submitted to SLURM; the last job is %s, logs are in '%s'", last.job_id, work.folder / "logs")


def run_on_ray(settings: PrepareSettings, work: WorkFolder) -> None:
    """Run the steps one after the other on Ray.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        raise UserError("--executor: ray is not installed; run: pip install ray") from None
    from datatrove.executor.ray import RayPipelineExecutor

    for step, tasks in _pipeline_steps(work):
        RayPipelineExecutor(
            [step],
            tasks=tasks,
            workers=settings.workers or -1,
            mem_per_cpu_gb=settings.memory,
            logging_dir=str(work.folder / "logs" / step.name),
            skip_completed=False,
        ).run()


def _pipeline_steps(work: WorkFolder) -> list[tuple[Any, int]]:
    """The steps in order, for datatrove, each with its number of tasks."""
    from bytelatent.prepare.pipeline import FolderStep

    plan = work.plan
    # How many ranges there will be is not known yet: the tasks divide them evenly.
    gathering = min(max(sum(file.likely_bytes for file in plan.files) // plan.range_bytes, 1), MAX_ARRAY)
    tasks = {"scatter": len(plan.tasks), "cut": 1, "gather": gathering, "finish": 1}
    return [(FolderStep(step, STEPS[step], str(work.out.absolute())), count) for step, count in tasks.items()]


@contextmanager
def _datatrove_log(file: Path) -> Iterator[None]:
    """Keep datatrove's log in a file."""
    from datatrove.utils.logging import logger, setup_default_logger

    logger.remove()
    logger.add(str(file))
    try:
        yield
    finally:
        setup_default_logger()


def _last_job(saved: Path) -> str | None:
    try:
        return json.loads(saved.read_text(encoding="utf-8"))["last"]
    except (OSError, ValueError, KeyError):
        return None


def _is_active(job: str) -> bool:
    try:
        answer = subprocess.run(
            ["squeue", "-h", "-j", str(job)], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(answer.stdout.strip())
