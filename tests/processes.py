"""Commands in processes of their own, forked from one that has imported torch: each start is seconds sooner.

What happens as Python starts and imports is not seen so: tests of that start Python themselves.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

# What several tests' commands need; a forkserver is one for all of them.
PRELOADED = [
    "tests.uncollected",  # the first
    "tests.training.plans",
    "bytelatent.commands.generate",
    "bytelatent.commands.train",
    "bytelatent.cli",
    "torch.distributed.run",
    "torch._dynamo",
    "bytelatent.launch.torchrun",
    "bytelatent.training.distributed.parallelize",
    "bytelatent.training.checkpoint.storage",
    "tests.frozen",  # the last
]
NOBODY = "nobody"  # in place of a path: a pipe that nobody reads
CLOSED = "closed"  # none, as of a process that is started with `<&-`


def forkserver() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def forked_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that read text ahead, which a user's machine starts anew, are forked too."""
    monkeypatch.setattr("bytelatent.data.reading.get_context", lambda kind: forkserver())


class Command:
    """`python -m MODULE ARGUMENT...`, as `subprocess.Popen` shows a process.

    Args:
        arguments: as for `Popen`: the interpreter, `-m` and a module or `-c` and a program, its own.
        streams: paths, such as of a terminal, for standard streams by number; others are files.
        given: its standard input.
        max_file: the system refuses files of more bytes.
    """

    def __init__(
        self,
        arguments: list[str],
        environment: dict[str, str],
        folder: str | Path | None = None,
        streams: dict[int, str] | None = None,
        given: bytes = b"",
        max_file: int = resource.RLIM_INFINITY,
    ):
        assert arguments[0] == sys.executable
        assert arguments[1] in ("-m", "-c")
        self.arguments = arguments
        self._outputs = Path(mkdtemp())
        (self._outputs / "in").write_bytes(given)
        paths = {number: str(self._outputs / name) for number, name in enumerate(("in", "out", "error"))}
        for number in (1, 2):
            Path(paths[number]).touch()
        how = (arguments[1:], environment, str(folder or Path.cwd()), paths | (streams or {}), max_file)
        self._process = forkserver().Process(target=_run, args=how, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return self._process.exitcode

    def written(self, stream: int) -> str:
        """What it has written so far, 1 to its output, 2 to its error output."""
        return (self._outputs / ("in", "out", "error")[stream]).read_text()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it printed to its output and to its error output."""
        self.wait(timeout)
        return self.written(1), self.written(2)


def ended(
    arguments: list[str],
    environment: dict[str, str],
    folder: str | Path | None = None,
    timeout: float = 120,
    **more: Any,
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; `more` as for `Command`."""
    command = Command(arguments, environment, folder, **more)
    try:
        out, error = command.communicate(timeout)
    finally:
        command.kill()
    assert command.returncode is not None
    return subprocess.CompletedProcess(arguments, command.returncode, out, error)


def _run(
    arguments: list[str], environment: dict[str, str], folder: str, streams: dict[int, str], max_file: int
) -> None:
    import torch

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if environment.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(1)
    sys.stdout.flush()
    sys.stderr.flush()
    for number, path in streams.items():
        if path == CLOSED:
            continue
        if path == NOBODY:
            reader, file = os.pipe()
            os.close(reader)
        else:
            file = os.open(path, (os.O_WRONLY if number else os.O_RDONLY) | os.O_NOCTTY)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if streams[number] == CLOSED:  # so does Python as it starts
            os.close(number)
            setattr(sys, name, None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file, max_file))
    kind, name, *_ = arguments
    if kind == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(name, "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = arguments[1:]
    sys.modules.pop(name, None)  # else runpy warns that it is imported already, which it is not in a new process
    runpy.run_module(name, run_name="__main__", alter_sys=True)
