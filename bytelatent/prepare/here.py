"""The steps run on this machine, with progress bars."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from bytelatent.log import Console
from bytelatent.prepare.gather import range_parts
from bytelatent.prepare.local import WatchedExecutor
from bytelatent.prepare.steps import Cut, Finish, Gather, Scatter, silent
from bytelatent.prepare.work import Work


def run_here(work: Work, workers: int, console: Console) -> None:
    """Do what is not done yet of all steps.

    Raises:
        UserError: of a task, or since a worker was killed.
        Interrupted: Ctrl-C.
    """
    out = str(work.out)
    plan = work.plan

    def execute(step: Any, tasks: int, ranks: list[int], report: Callable[[int], None] = silent) -> None:
        WatchedExecutor([step], tasks, ranks, workers, work.folder / "logs", report).run()

    sizes = [sum(plan.units[unit].size for unit in range(*task)) for task in plan.tasks]
    left = [task for task in range(len(plan.tasks)) if work.task_files(task).marker() is None]
    with _bar(console, "read and scatter", sum(sizes), sum(sizes) - sum(sizes[task] for task in left)) as report:
        execute(Scatter(out), len(plan.tasks), left, report)
    execute(Cut(out), 1, [0])
    ranges = json.loads(work.cut_file.read_text(encoding="utf-8"))["ranges"]
    sizes = [end - begin for begin, end in (part["stream"] for part in ranges)]
    left = [number for number in range(len(ranges)) if range_parts(work, number) is None]
    with _bar(console, "gather and write", sum(sizes), sum(sizes) - sum(sizes[number] for number in left)) as report:
        execute(Gather(out), len(ranges), left, report)
    execute(Finish(out), 1, [0])


@contextmanager
def _bar(console: Console, what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes; it is drawn in this process's own time, for threads and forks do not mix."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, auto_refresh=False) as progress:
        bar = progress.add_task(what, total=total, completed=done)
        drawn = progress.get_time()

        def report(count: int) -> None:
            nonlocal drawn
            progress.update(bar, advance=count)
            if progress.get_time() - drawn > 0.1:
                drawn = progress.get_time()
                progress.refresh()

        yield report
        progress.refresh()
