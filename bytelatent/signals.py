"""Signals: Ctrl-C of a command, requests to stop a training, and the warnings of a cluster.

Every signal handler of the package is set here, but for that of a command's first moments (`bytelatent.__main__`).
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Self

STOPPED = 130  # exit code of work that a signal stopped: batch scripts requeue such a job, and the same command resumes
TERMINATED = -signal.SIGTERM  # exit code that subprocesses report
ONE_PRESS = 2.0  # seconds in which a second signal is the same one: a double press, or one that torchrun passes on
NOT_SAVED = "without saving; the same command resumes from the last checkpoint, if there is one"
STOPPING = "stopping after this step; press again to quit without saving"
WARNINGS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]  # SLURM's, to a job
HANGUP = getattr(signal, "SIGHUP", None)  # Windows lacks these three
PARENT = os.getppid()


class Interrupted(Exception):
    """Work was asked to stop and stopped in good order. The message says how to resume."""


def begin() -> None:
    """Raise `KeyboardInterrupt` on Ctrl-C from now on: there is work that may have to clean up."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        _set({signal.SIGINT: signal.default_int_handler})


def _ending(line: str) -> Callable[..., None]:
    def end(*_: object) -> None:
        _write(line)
        os._exit(STOPPED)

    return end


def _write(line: str) -> None:
    """Write past Python's streams, to which a line may be under way when the signal comes."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode() if line else b"")


def _set(handlers: dict[int, Any]) -> dict[int, Any]:
    """Set signal handlers and return the earlier ones. Python lets only the main thread do so; others set none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number, handler in handlers.items()}


@contextmanager
def _handling(handlers: dict[int, Any]) -> Iterator[None]:
    before = _set(handlers)
    try:
        yield
    finally:
        _set(before)


def ignore_interrupts() -> None:
    """Ignore Ctrl-C: the parent process answers it, or this process ends already."""
    _set({signal.SIGINT: signal.SIG_IGN})


def leave_to_parent() -> None:
    """Ignore Ctrl-C in a worker, and let SIGTERM end it."""
    _set({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL})


def leave_to_children() -> None:
    """Let SIGINT and SIGTERM do nothing in this process; the processes that it starts handle them."""
    _set(dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda *_: None))  # children would inherit SIG_IGN


@contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """A list that is not empty any more once Ctrl-C was pressed.

    An exception would be lost while Python forks: it only prints those of its callbacks.
    """
    pressed: list[int] = []
    with _handling({signal.SIGINT: lambda number, _: pressed.append(number)}):
        yield pressed


def sigterm_interrupts() -> AbstractContextManager[None]:
    """Let SIGTERM raise `KeyboardInterrupt` within a block, as Ctrl-C does."""
    return _handling({signal.SIGTERM: signal.default_int_handler})


def hearing_stops(hear: Callable[[], None]) -> AbstractContextManager[None]:
    """Let each signal that asks to stop call a function within a block."""
    return _handling(dict.fromkeys(_stop_signals(), lambda *_: hear()))


def _stop_signals() -> list[int]:
    """The signals that ask to stop, SIGHUP (the terminal is gone) only where it is not ignored, as under nohup."""
    numbers = [signal.SIGINT, signal.SIGTERM, *WARNINGS]
    return numbers if HANGUP is None or signal.getsignal(HANGUP) is signal.SIG_IGN else [*numbers, HANGUP]


class StopSignals:
    """Lets a signal end a training after its step; a second one quits at once, by KeyboardInterrupt.

    An instance is called to learn whether training is to stop. That torchrun was killed is a reason, too.

    Args:
        is_first: this is the first rank, which reports it. On other ranks the block raises SystemExit when it quits.
    """

    def __init__(self, is_first: bool = True):
        self.is_first = is_first
        self.quits = False
        self._asked: float | None = None

    def __enter__(self) -> Self:
        self._before = _set(dict.fromkeys(_stop_signals(), self._hear))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _set(self._before)
        if self.quits and kind is not None:  # torch.save turns the KeyboardInterrupt into an error of its own
            raise KeyboardInterrupt(NOT_SAVED) if self.is_first else SystemExit(STOPPED) from None

    def __call__(self) -> bool:
        if self.quits:  # something between has caught the KeyboardInterrupt, and may have left a file half written
            raise KeyboardInterrupt(NOT_SAVED)
        return self._asked is not None or ("TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT)

    def _hear(self, *_: object) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            if self.is_first:
                _write(STOPPING)
        elif now - self._asked > ONE_PRESS:
            self.quits = True
            raise KeyboardInterrupt(NOT_SAVED)


@contextmanager
def unattended(imports: Callable[[], Any]) -> Iterator[None]:
    """Each signal that asks to stop ends the block. Of several processes the first one reports that it stopped.

    Args:
        imports: called before the block. A signal ends the process then: imports swallow errors here and there.

    Raises:
        Interrupted, SystemExit: there was a signal.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    asked: float | None = None

    def stop(*_: object) -> None:
        nonlocal asked
        before, asked = asked, time.monotonic()
        if before is None or asked - before > ONE_PRESS:
            raise Interrupted(NOT_SAVED) if is_first else SystemExit(STOPPED)

    end = _ending(f"stopped: {NOT_SAVED}" if is_first else "")
    earlier = _set(dict.fromkeys(_stop_signals(), end))
    try:
        imports()
        _set(dict.fromkeys(earlier, stop))
        yield
    finally:
        if asked is None:  # else the same press may come again on the way out
            _set(earlier)


def block_warnings() -> None:
    """Block SLURM's warnings here and in the processes that this one starts: they go to all, and would end these."""
    signal.pthread_sigmask(signal.SIG_BLOCK, WARNINGS)


def interrupt_when_warned() -> None:
    """Turn a cluster's warning into one Ctrl-C of this process, and block it for the processes that it starts.

    The end of the parent process is a warning, too: not every cluster ends what a killed torchrun leaves behind.
    """
    block_warnings()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background processes with it ignored
    parent, main_thread = os.getppid(), threading.get_ident()

    def wait() -> None:
        while signal.sigtimedwait(WARNINGS, 1.0) is None and os.getppid() == parent:
            pass
        signal.pthread_kill(main_thread, signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()
