"""Workers on this machine, each watched.

datatrove's own local executor waits forever when one of its processes is killed (`multiprocessing.Pool` does), prints
every task's log to the terminal, and shows no progress. This one runs the same tasks of the same pipeline.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor

from bytelatent.errors import Interrupted, UserError
from bytelatent.files import own_file
from bytelatent.signals import leave_to_parent, noting_interrupts

KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG
ANSWER_SECONDS = 0.2


class WatchedExecutor(LocalPipelineExecutor):
    """Runs tasks in forked processes; the first that fails or dies ends the work.

    Args:
        pipeline: one step, which has a `report`.
        ranks: of the tasks to run, out of `tasks`.
        report: told the bytes done, here in this process, and 0 from time to time.
    """

    def __init__(
        self,
        pipeline: list[Any],
        tasks: int,
        ranks: Iterable[int],
        workers: int,
        logs: Path,
        report: Callable[[int], None],
    ) -> None:
        super().__init__(pipeline, tasks, workers, logging_dir=str(logs), skip_completed=False, start_method="fork")
        self.step: Any = pipeline[0]
        self.ranks, self.logs, self.report = list(ranks), logs, report

    def run(self) -> None:
        """
        Raises:
            UserError: of a task, or since a worker was killed.
            Interrupted: Ctrl-C.
        """
        waiting = iter(self.ranks)
        context = get_context("fork")
        workers: dict[Any, Any] = {}
        with noting_interrupts() as asked:
            self._run(context, workers, waiting, asked)
        if asked:
            raise Interrupted("nothing that is done is lost; the same command goes on")

    def _run(self, context: Any, workers: dict[Any, Any], waiting: Any, asked: list[int]) -> None:
        try:
            for number in range(min(self.workers, len(self.ranks))):
                ours, theirs = context.Pipe()
                arguments = (theirs, [*workers, ours], number, os.getpid())
                worker = context.Process(target=self._work, args=arguments, daemon=True)
                worker.start()
                theirs.close()
                workers[ours] = worker
                ours.send(next(waiting))
            while workers and not asked:
                self._listen(workers, waiting)
        finally:
            for connection, worker in workers.items():
                worker.kill()
                worker.join()
                connection.close()

    def _listen(self, workers: dict[Connection, Any], waiting: Any) -> None:
        """Take what the workers say, and give those that are done more to do or let them go."""
        for connection in wait(list(workers), timeout=ANSWER_SECONDS) or [None]:
            if not isinstance(connection, Connection):
                self.report(0)
                continue
            try:
                kind, value = connection.recv()
            except (EOFError, OSError):
                raise UserError(_how_it_died(workers[connection], self.logs)) from None
            if kind == "bytes":
                self.report(value)
            elif kind == "user error":
                raise UserError(value)
            elif kind == "error":
                raise RuntimeError(f"{value}; see '{self.logs}'")
            else:
                rank = next(waiting, None)
                with suppress(OSError):  # one that died just now is met at its next word
                    connection.send(rank)
                if rank is None:
                    worker = workers.pop(connection)
                    worker.join()
                    connection.close()

    def _work(self, connection: Connection, not_mine: list[Connection], number: int, parent: int) -> None:
        """A worker: do the tasks sent, until None comes or the parent is gone."""
        _die_with(parent)
        leave_to_parent()
        for other in not_mine:
            other.close()
        _write_to(self.logs / f"worker-{number:02d}.log")
        self.step.report = lambda count: connection.send(("bytes", count))
        while (rank := connection.recv()) is not None:
            try:
                self._run_for_rank(rank, local_rank=number)
                connection.send(("done", rank))
            except UserError as error:
                connection.send(("user error", str(error)))
            except BaseException as error:
                connection.send(("error", f"{type(error).__name__}: {error}"))


def _die_with(parent: int) -> None:
    """Have the system kill this process when its parent dies, so that none is left behind."""
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _write_to(log: Path) -> None:
    """Keep this process, with all libraries in it, from writing to the terminal."""
    file = own_file(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115


def _how_it_died(worker: Any, logs: Path) -> str:
    worker.join()
    code = worker.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return (
            f"--workers: a worker was killed ({name}{why}); nothing that is done is lost; give the same command again, "
            "it goes on, or one with less --memory"
        )
    return f"--workers: a worker ended with code {code}; see '{logs}'; the same command goes on"
