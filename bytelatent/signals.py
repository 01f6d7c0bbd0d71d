"""A command that runs for days: signals ask it to stop, and whoever read what it prints may be gone.

Nothing heavy is imported here: it is there before torch is.
"""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from bytelatent.errors import STOPPED, Interrupted

ONE_PRESS = 2.0  # seconds in which a second signal is the same one: a double press, or one that torchrun passes on
NOT_SAVED = "without saving; the same command goes on from the last checkpoint, if there is one"
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Windows has but the first two
WARNINGS = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]  # SLURM's, to a job
TERMINATED = -signal.SIGTERM  # exit code that subprocesses report


def stop_signals() -> list[int]:
    """The signals that ask to stop. That the terminal is gone is none where it is ignored, as under nohup."""
    numbers = {name: getattr(signal, name) for name in NAMES if hasattr(signal, name)}
    if "SIGHUP" in numbers and signal.getsignal(numbers["SIGHUP"]) is signal.SIG_IGN:
        del numbers["SIGHUP"]
    return list(numbers.values())


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the parent process: for worker processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def unattended(imports: Callable[[], Any]) -> Iterator[None]:
    """Each signal that asks to stop ends the block; and what nobody can read any more is dropped.

    Of several processes the first one says that it stopped.

    Args:
        imports: called before the block. A signal ends the process then: an error would be passed over here and there.

    Raises:
        Interrupted, SystemExit: there was a signal.
    """
    _drop_what_nobody_reads()
    is_first = os.environ.get("RANK", "0") == "0"
    asked: float | None = None

    def end(_number: int, _frame: object) -> None:
        if is_first:
            with suppress(OSError):
                os.write(2, f"stopped: {NOT_SAVED}\n".encode())
        os._exit(STOPPED)

    def stop(_number: int, _frame: object) -> None:
        nonlocal asked
        before, asked = asked, time.monotonic()
        if before is None or asked - before > ONE_PRESS:
            raise Interrupted(NOT_SAVED) if is_first else SystemExit(STOPPED)

    if threading.current_thread() is not threading.main_thread():
        imports()
        yield
        return
    previous = {number: signal.signal(number, end) for number in stop_signals()}
    try:
        imports()
        for number in previous:
            signal.signal(number, stop)
        yield
    finally:
        if asked is None:  # else the same press may come again on the way out
            for number, handler in previous.items():
                signal.signal(number, handler)


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
