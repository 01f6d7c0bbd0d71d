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
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from bytelatent.errors import Interrupted, UserError
from bytelatent.files import json_if_any, write_whole_json
from bytelatent.prepare.plan import PrepareSettings, WorkFolder
from bytelatent.prepare.scatter import scatter_rows
from bytelatent.prepare.shuffle import plan_outputs
from bytelatent.prepare.write import finish, gather_rows, range_parts
from bytelatent.progress import Progress
from bytelatent.signals import leave_to_parent, noting_interrupts

LOGGER = logging.getLogger(__name__)

MB, GB = 1_000_000, 1_000_000_000
WORKING_BYTES = 24 * MB  # of a worker beside its run or range: blocks read, slices written, Arrow's caches
MIN_RUN_BYTES = 20 * MB  # a block of the shortest lines takes 18
MAX_RUN_BYTES = 1 << 30
MAX_RANGE_BYTES = 1 << 28  # more is not faster
BINS_IN_RANGE = 16
MAX_BITS = 17
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
POLL_SECONDS = 0.2
MAX_ARRAY = 1000  # jobs in an array; if there are more tasks, jobs do several

STEPS: dict[str, Callable[[WorkFolder, int, int, Callable[[int], None]], None]] = {
    # receive the task, the number of tasks, and what receives bytes done
    "scatter": lambda work, task, tasks, report: scatter_rows(work, task, report),
    "cut": lambda work, *_: plan_outputs(work),
    "gather": gather_rows,
    "finish": lambda work, *_: finish(work),
}


@dataclass(frozen=True)
class Budget:
    """Memory of the workers.

    Attributes:
        workers: number of processes beside the first.
        run_bytes: memory of a worker for a sorted run, or for a range of bins, with the index.
    """

    workers: int
    run_bytes: int

    @property
    def range_bytes(self) -> int:
        return min(self.run_bytes, MAX_RANGE_BYTES)

    def bits(self, likely_bytes: int) -> int:
        """Number of a key's bits that name its bin, so that a range has several bins."""
        bins = likely_bytes * BINS_IN_RANGE / self.range_bytes
        return min(max(math.ceil(math.log2(max(bins, 1))), 4), MAX_BITS)


def divide_memory(memory: float, workers: int | None, own_bytes: int | None = None) -> Budget:
    """Divide the memory among the workers.

    Args:
        memory: GB for all processes.
        workers: their number; None for one per core, or fewer where the memory is little.
        own_bytes: memory of a process before it starts work; measured if left out.

    Raises:
        UserError: the memory is too small.
    """
    own = memory_of_this_process() if own_bytes is None else own_bytes
    for count in [workers] if workers else range(os.cpu_count() or 1, 0, -1):
        left = (memory * GB - own * (count + 1)) / count - WORKING_BYTES
        if left >= MIN_RUN_BYTES:
            return Budget(count, int(min(left, MAX_RUN_BYTES)))
    least = ((workers or 1) * (own + WORKING_BYTES + MIN_RUN_BYTES) + own) / GB
    fewer = ", or fewer --workers" if (workers or 1) > 1 else ""
    raise UserError(f"--memory: {memory:g} GB are too little; the least is {math.ceil(least * 100) / 100:.2f}{fewer}")


def memory_of_this_process() -> int:
    """Bytes resident now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 120 * MB  # no Linux


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
    """Do some of a step's tasks; the first that fails, and a worker that dies, ends the others. `what` names a bar."""
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
        raise Interrupted("nothing that is done is lost; the same command resumes")


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
        return f"--workers: a worker ended with code {code}; the same command resumes"
    why = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return (
        f"--workers: a worker was killed ({signal.Signals(-code).name}{why}); nothing that is done is lost; give the "
        "same command again, it resumes, or one with less --memory"
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
    from datatrove.utils.logging import logger, setup_default_logger

    saved, logs = work.folder / "jobs.json", work.folder / "logs"
    if (jobs := json_if_any(saved)) is not None and _is_active(job := str(jobs["last"])):
        LOGGER.info("still at work: job %s; 'squeue -j %s' shows it", job, job)
        return
    last: Any = None
    for name, (step, tasks) in _pipeline_steps(work).items():
        last = SlurmPipelineExecutor(
            [step],
            tasks=tasks,
            time=settings.time,
            partition=str(settings.partition),
            mem_per_cpu_gb=max(1, math.ceil(settings.memory)),
            workers=settings.workers or -1,
            job_name=f"prepare-{name}",
            qos=None,  # type: ignore[arg-type]
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
            logging_dir=str(logs / name),
            skip_completed=False,  # the steps' own markers say what is done
            depends=last,
            tasks_per_job=-(-tasks // MAX_ARRAY),
        )
    try:
        logger.remove()  # datatrove's log goes into a file
        logger.add(str(logs / "submit.log"))
        last.run()
    except (subprocess.CalledProcessError, OSError) as error:
        raise UserError(f"--executor: SLURM did not take the jobs: {error}") from None
    finally:
        setup_default_logger()
    write_whole_json(saved, {"last": last.job_id})
    LOGGER.info("submitted to SLURM; the last job is %s, logs are in '%s'", last.job_id, logs)


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

    for name, (step, tasks) in _pipeline_steps(work).items():
        RayPipelineExecutor(
            [step],
            tasks=tasks,
            workers=settings.workers or -1,
            mem_per_cpu_gb=settings.memory,
            logging_dir=str(work.folder / "logs" / name),
            skip_completed=False,
        ).run()


def _pipeline_steps(work: WorkFolder) -> dict[str, tuple[Callable[..., None], int]]:
    """The steps in order, for datatrove, each with its number of tasks."""
    plan = work.plan
    # How many ranges there will be is not known yet: the tasks divide them evenly.
    gathering = min(max(sum(file.likely_bytes for file in plan.files) // plan.range_bytes, 1), MAX_ARRAY)
    tasks = {"scatter": len(plan.tasks), "cut": 1, "gather": gathering, "finish": 1}
    return {name: (partial(_do_on_cluster, str(work.out.absolute()), name), count) for name, count in tasks.items()}


def _do_on_cluster(out: str, step: str, data: Any, rank: int, world_size: int) -> None:
    """A step as datatrove calls it; it passes no documents on."""
    STEPS[step](WorkFolder(Path(out)), rank, world_size, lambda num_bytes: None)


def _is_active(job: str) -> bool:
    try:
        answer = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return bool(answer.stdout.strip())
