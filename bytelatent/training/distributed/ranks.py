"""The processes of a job, what they exchange beside gradients, and the watchdog of each.

A process that was started alone is rank 0 of 1. torchrun starts several and sets their ranks in the environment.
"""

import faulthandler
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from bytelatent.device import choose_device
from bytelatent.errors import BAD_INPUT, STOPPED, Interrupted, UserError

Value = TypeVar("Value")
EXIT_HUNG = 1
REPORT_SECONDS = 5.0  # in which the first process of a host reports why it ends
START_ALONE = "start it by torchrun, or for one process: env -u WORLD_SIZE COMMAND"


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job. All of them call its methods, in the same order."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the processes of the same host
    group: Any = None  # process group of the messages; None: the default one

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """For log lines."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def gather(self, value: Value) -> list[Value]:
        """The value of every rank, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, self.group)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, bit for bit the same on each."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def on_first(self, call: Callable[[], Value]) -> Value:
        """The result of `call` on the first rank, returned on all of them; the others wait for it.

        Raises:
            UserError: `call` raised it on the first rank. The others exit silently.
        """
        if self.world_size == 1:
            return call()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = call()
                pickle.dumps(answer[0])
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.group, device=torch.device("cpu"))
        if answer[1] is None:
            return answer[0]
        raise self.common_error(UserError(answer[1]))

    def on_all(self, call: Callable[[], None]) -> None:
        """Call it on every rank.

        Raises:
            UserError: `call` raised it on some ranks. The first of these raises it, the others exit silently.
        """
        error = None
        try:
            call()
        except UserError as raised:
            error = raised
        failed = self.gather(error is not None)
        if any(failed):
            raise error if error is not None and failed.index(True) == self.rank else SystemExit(BAD_INPUT)

    def common_error(self, error: UserError | Interrupted | KeyboardInterrupt) -> BaseException:
        """What to raise for an error that all ranks meet: the first rank reports it, the others exit silently."""
        if self.is_first:
            return error
        return SystemExit(BAD_INPUT if isinstance(error, UserError) else STOPPED)

    def with_own_group(self) -> "Ranks":
        """The same ranks with a process group of their own, for use in another thread."""
        return self if self.world_size == 1 else replace(self, group=dist.new_group(backend="gloo"))


@contextmanager
def reported_once() -> Iterator[None]:
    """For bad input that all processes of a host meet before they are connected: only the first one reports it.

    The others wait, because torchrun ends all processes once one has ended.
    """
    try:
        yield
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(REPORT_SECONDS)
        raise SystemExit(BAD_INPUT) from None


@contextmanager
def open_ranks(device: str, watchdog_minutes: float | None) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the other processes of the job, if there are any.

    Args:
        device: as in the settings.
        watchdog_minutes: a collective times out after twice as long, so that the watchdog reports first; None: a day.

    Returns:
        The ranks, and the device of this one.

    Raises:
        UserError: the device is missing, or the environment describes this process's rank only in part.
    """
    with reported_once():
        ranks = ranks_from(os.environ)
    if ranks.world_size == 1:
        yield ranks, choose_device(device)
        return
    own = _device_of_rank(device, ranks)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    timeout = timedelta(minutes=2 * watchdog_minutes if watchdog_minutes else 24 * 60)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
        store=_rendezvous_store(timeout),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
    )
    all_end = True
    try:
        yield ranks, own
    except Exception as error:
        # After a bug this rank exits at once: another may be waiting inside a collective, and so would this one.
        all_end = isinstance(error, UserError | Interrupted)
        raise
    finally:
        if all_end:
            dist.destroy_process_group()


def ranks_from(environment: Mapping[str, str]) -> Ranks:
    """This process's rank, from torchrun's variables.

    Raises:
        UserError: a variable is missing or invalid.
    """

    def number(name: str, default: str) -> int:
        text = environment.get(name) or default
        if not text.isdecimal():
            raise UserError(f"{name}: '{text}' is no number; {START_ALONE}")
        return int(text)

    world_size = number("WORLD_SIZE", "1")
    if world_size == 1:
        return Ranks()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(f"WORLD_SIZE={world_size} is of several processes, and {name} is not set; {START_ALONE}")
    ranks = Ranks(number("RANK", ""), world_size, number("LOCAL_RANK", "0"))
    if ranks.rank >= world_size:
        raise UserError(f"RANK={ranks.rank}: ranks of WORLD_SIZE={world_size} are numbered from 0; {START_ALONE}")
    return ranks


def _rendezvous_store(timeout: timedelta) -> Any:
    """The store through which the ranks find one another.

    torchrun keeps one store across restarts, with the addresses of ended processes in it. So each start of a job on
    one host uses keys of its own. (On several hosts torchrun does not count restarts alike everywhere.)
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    start = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    return dist.PrefixStore(start, store)  # pyright: ignore[reportPrivateImportUsage]


def _device_of_rank(device: str, ranks: Ranks) -> torch.device:
    with reported_once():
        if ":" in device:
            world = ranks.world_size
            raise UserError(f"device: '{device}' is one, and {world} processes take one each; use device=cuda")
        own = choose_device(device)
    return choose_device(f"cuda:{ranks.local_rank}") if own.type == "cuda" else own


class Watchdog:
    """Ends the process, and prints the stack of every thread, after this many minutes without progress."""

    def __init__(self, minutes: float | None, ranks: Ranks):
        self.seconds = None if minutes is None else 60 * minutes
        self.ranks = ranks
        self._seen, self._doing = time.monotonic(), "starting"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def progress(self, doing: str) -> None:
        """Report progress; `doing` comes next."""
        self._seen, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        while self.seconds is not None and not self._over.wait(min(self.seconds / 10, 5.0)):
            idle = time.monotonic() - self._seen
            if idle > self.seconds:
                line = f"{self.ranks.name} hangs: {idle / 60:.3g} minutes of {self._doing} (faults.watchdog_minutes)"
                # Printed, because the thread that hangs may hold a lock of the log.
                print(f"{line}; the stack of every thread:", file=sys.stderr, flush=True)
                with suppress(OSError, ValueError):  # standard error may not be a file
                    faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_HUNG)
