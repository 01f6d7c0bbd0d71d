"""Signals: Ctrl-C of a command, requests to stop a long training, and warnings of a cluster.

Every signal handler of the package is set here. Nothing heavy is imported, because commands listen before they import.
"""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Self

# The exit code of work that stopped because it was asked to: it is not done, and the same command resumes it.
# Batch scripts of a cluster requeue a job that ends with it.
STOPPED = 130
ONE_PRESS = 2.0  # seconds in which a second signal is the same one: a double press, or one that torchrun passes on
NOT_SAVED = "without saving; the same command goes on from the last checkpoint, if there is one"
STOPPING = "stopping after this step; press again to quit without saving"
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Windows has only the first two
WARNINGS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]  # SLURM's, to a job
TERMINATED = -signal.SIGTERM  # exit code that subprocesses report
PARENT = os.getppid()


_working = False


class Interrupted(Exception):
    """Work was asked to stop and stopped in good order. The message says how to resume."""


def listen() -> None:
    """End the process with one line on Ctrl-C, also while modules are imported, unless the process ignores it.

    An exception would not do: modules swallow it inside an import, or raise another one.
    """
    process = os.getpid()

    def answer(number: int, frame: object) -> None:
        if os.getpid() == process and (not _working or _is_importing(frame)):
            os.write(2, b"stopped\n")
            os._exit(STOPPED)
        signal.default_int_handler(number, None)

    with suppress(ValueError):  # not in the main thread
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, answer)


def begin() -> None:
    """Raise `KeyboardInterrupt` on Ctrl-C from now on: there is work that may have to clean up."""
    global _working
    _working = True


def _is_importing(frame: object) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):  # pyright: ignore[reportAttributeAccessIssue]
            return True
        frame = frame.f_back  # pyright: ignore[reportAttributeAccessIssue]
    return False


def in_main_thread() -> bool:
    """Whether this thread can set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def ignore_interrupts() -> None:
    """Ignore Ctrl-C: the parent process answers it, or this process ends already."""
    if in_main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave_to_parent() -> None:
    """Ignore Ctrl-C in a worker, and let SIGTERM end it."""
    ignore_interrupts()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def handling(handlers: dict[int, Any]) -> Iterator[None]:
    """Set signal handlers within a block. In another thread than the main one nothing is set."""
    if not in_main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """A list that is not empty any more once Ctrl-C was pressed.

    An exception would be lost while Python forks: it only prints those of its callbacks.
    """
    pressed: list[int] = []
    with handling({signal.SIGINT: lambda number, frame: pressed.append(number)}):
        yield pressed


def sigterm_interrupts() -> AbstractContextManager[None]:
    """Let SIGTERM raise `KeyboardInterrupt` within a block, as Ctrl-C does."""
    return handling({signal.SIGTERM: signal.default_int_handler})


def stop_signals() -> list[int]:
    """The signals that ask to stop. SIGHUP, a terminal that is gone, is not one where it is ignored, as under nohup."""
    numbers = {name: getattr(signal, name) for name in NAMES if hasattr(signal, name)}
    if "SIGHUP" in numbers and signal.getsignal(numbers["SIGHUP"]) is signal.SIG_IGN:
        del numbers["SIGHUP"]
    return list(numbers.values())


class Handlers:
    """Handlers of the signals that ask to stop, until they are restored. Another thread than the main one has none."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}

    def set(self, handler: Callable[[int, Any], None]) -> None:
        if in_main_thread():
            self._install(dict.fromkeys(self._previous or stop_signals(), handler))

    def restore(self) -> None:
        self._install(self._previous)

    def _install(self, handlers: dict[int, Any]) -> None:
        for number, handler in handlers.items():
            before = signal.signal(number, handler)
            self._previous.setdefault(number, before)


class StopSignals:
    """Lets a signal end a training after its step; a second one quits at once.

    An instance is called to learn whether training is to stop. That torchrun was killed is a reason, too.

    Args:
        is_first: this is the first rank, which reports it.

    Raises:
        KeyboardInterrupt: at the second signal, in the middle of anything; and from the block, whatever became of it
            there. On other ranks than the first the block raises SystemExit.
    """

    def __init__(self, is_first: bool = True):
        self.is_first = is_first
        self.quits = False
        self._asked: float | None = None
        self._handlers = Handlers()

    def __enter__(self) -> Self:
        self._handlers.set(self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handlers.restore()
        if self.quits and kind is not None:  # torch.save turns the KeyboardInterrupt into an error of its own
            raise KeyboardInterrupt(NOT_SAVED) if self.is_first else SystemExit(STOPPED) from None

    def __call__(self) -> bool:
        if self.quits:  # something between has caught the KeyboardInterrupt, and may have left a file half written
            raise KeyboardInterrupt(NOT_SAVED)
        return self._asked is not None or ("TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT)

    def _hear(self, _number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            if self.is_first:
                _write(STOPPING)
        elif now - self._asked > ONE_PRESS:
            self.quits = True
            raise KeyboardInterrupt(NOT_SAVED)


def _write(line: str) -> None:
    """Write past Python's streams, to which a line may be under way when the signal comes."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


@contextmanager
def unattended(imports: Callable[[], Any]) -> Iterator[None]:
    """Each signal that asks to stop ends the block; output that nobody can read any more is dropped.

    Of several processes the first one reports that it stopped.

    Args:
        imports: called before the block. A signal ends the process then: imports swallow errors here and there.

    Raises:
        Interrupted, SystemExit: there was a signal.
    """
    _drop_what_nobody_reads()
    is_first = os.environ.get("RANK", "0") == "0"
    asked: float | None = None

    def end(_number: int, _frame: object) -> None:
        if is_first:
            _write(f"stopped: {NOT_SAVED}")
        os._exit(STOPPED)

    def stop(_number: int, _frame: object) -> None:
        nonlocal asked
        before, asked = asked, time.monotonic()
        if before is None or asked - before > ONE_PRESS:
            raise Interrupted(NOT_SAVED) if is_first else SystemExit(STOPPED)

    handlers = Handlers()
    handlers.set(end)
    try:
        imports()
        handlers.set(stop)
        yield
    finally:
        if asked is None:  # else the same press may come again on the way out
            handlers.restore()


def block_warnings() -> None:
    """Block the signals by which SLURM warns a job, in this process and those that it starts.

    SLURM sends them to every process of a job, and one that does not handle them would die: those that read ahead or
    compile.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)


def leave_to_children() -> None:
    """Let SIGINT and SIGTERM do nothing in this process; the processes that it starts handle them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # children would inherit SIG_IGN


def interrupt_when_warned() -> None:
    """Turn a cluster's warning into one Ctrl-C of this process, and block it for the processes that it starts.

    The end of the parent process is a warning, too: after torchrun is killed, not every cluster ends the processes that
    it leaves behind, and they would train on without a job.
    """
    block_warnings()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background processes with it ignored
    parent, main_thread = os.getppid(), threading.get_ident()

    def wait() -> None:
        while signal.sigtimedwait(WARNINGS, 1.0) is None and os.getppid() == parent:
            pass
        signal.pthread_kill(main_thread, signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


class _Dropping(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:  # a pipe that was closed, a terminal that is gone, a full disk
            return len(data)


def _drop_what_nobody_reads() -> None:
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):  # there is none, or somebody reads it here
            continue
        raw = _Dropping(stream.fileno(), "w", closefd=False)
        layer: Any = raw if stream.write_through else io.BufferedWriter(raw)
        how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        setattr(sys, name, io.TextIOWrapper(layer, stream.encoding, stream.errors, **how))
