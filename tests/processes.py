"""Commands in processes of their own, forked from one that has imported torch: each start is seconds sooner.

What happens as Python starts and imports is not seen so: tests of that start Python themselves.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import mkdtemp

# What several tests' commands need; a forkserver is one for all of them.
PRELOADED = ["tests.training.plans", "bytelatent.commands.generate", "bytelatent.commands.train", "bytelatent.cli"]
PRELOADED += [
    "torch.distributed.run",
    "bytelatent.training.distributed.parallelize",
    "bytelatent.training.checkpoint.storage",
]


def forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Command:
    """`python -m MODULE ARGUMENT...`, as `subprocess.Popen` shows a process.

    Args:
        arguments: as for `Popen`: the interpreter, `-m`, the module, its own.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: str | Path | None = None):
        assert arguments[:2] == [sys.executable, "-m"]
        self.arguments = arguments
        self._outputs = Path(mkdtemp())
        given = (arguments[2:], environment, str(folder or Path.cwd()), str(self._outputs))
        self._process = forkserver().Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive():
            assert self._process.pid is not None
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it printed to its output and to its error output."""
        self.wait(timeout)
        out, error = ((self._outputs / name).read_text() for name in ("out", "error"))
        return out, error


def ended(
    arguments: list[str], environment: dict[str, str], folder: str | Path | None = None, timeout: float = 120
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    command = Command(arguments, environment, folder)
    try:
        out, error = command.communicate(timeout)
    finally:
        command.kill()
    assert command.returncode is not None
    return subprocess.CompletedProcess(arguments, command.returncode, out, error)


def _run(arguments: list[str], environment: dict[str, str], folder: str, outputs: str) -> None:
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if environment.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(1)
    sys.stdout.flush()
    sys.stderr.flush()
    for number, name in ((1, "out"), (2, "error")):
        file = os.open(os.path.join(outputs, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = arguments
    sys.modules.pop(
        arguments[0], None
    )  # else runpy warns that it is imported already, which it is not in a new process
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
