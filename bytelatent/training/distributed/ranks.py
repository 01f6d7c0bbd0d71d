"""The processes of a job, and what they tell one another beside gradients.

A process that was started alone is all there is. torchrun starts several and says in the environment which each is.
"""

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from bytelatent.device import choose_device
from bytelatent.errors import BAD_INPUT, STOPPED, Interrupted, UserError

Value = TypeVar("Value")
TO_SPEAK = 5.0  # seconds in which the first process of a host says why it ends
START_ALONE = "start it by torchrun, or for one process: env -u WORLD_SIZE COMMAND"


@dataclass(frozen=True)
class Ranks:
    """This process among those of the job. Its methods are called by all of them, in the same order."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those of the same host
    group: Any = None  # whose messages these are; None: the default one

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """For lines that people read."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def gather(self, value: Value) -> list[Value]:
        """What each rank gives, in their order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, self.group)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, the same bits on each."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def on_first(self, call: Callable[[], Value]) -> Value:
        """What `call` gives on the first rank, on all of them; the others wait for it.

        Raises:
            UserError: `call` did, on the first rank. The others end without a word.
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
            UserError: `call` did, on some of them. The first of these says so, the others end without a word.
        """
        error = None
        try:
            call()
        except UserError as met:
            error = met
        has_met = self.gather(error is not None)
        if any(has_met):
            raise error if error is not None and has_met.index(True) == self.rank else SystemExit(BAD_INPUT)

    def common_error(self, error: UserError | Interrupted | KeyboardInterrupt) -> BaseException:
        """What all ranks meet, to be raised: the first one says it, the others end without a word."""
        if self.is_first:
            return error
        return SystemExit(BAD_INPUT if isinstance(error, UserError) else STOPPED)

    def with_own_group(self) -> "Ranks":
        """The same ranks with messages of their own, for another thread."""
        return (
            self
            if self.world_size == 1
            else Ranks(self.rank, self.world_size, self.local_rank, dist.new_group(backend="gloo"))
        )


@contextmanager
def reported_once() -> Iterator[None]:
    """For what all processes of a host complain of alike before they can speak to one another: the first one does.

    The others wait: torchrun ends all processes once one has ended, which should not be before it was said.
    """
    try:
        yield
    except UserError:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        time.sleep(TO_SPEAK)
        raise SystemExit(BAD_INPUT) from None


@contextmanager
def open_ranks(device: str, minutes: float | None) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the other processes of the job, where there are any.

    Args:
        device: as in the settings.
        minutes: of the watchdog, which should be the first to speak: after twice as long without an answer the
            others are taken for dead. None for a day.

    Returns:
        The ranks, and this one's device.

    Raises:
        UserError: the device is not there, or the environment says only in part where this process belongs.
    """
    with reported_once():
        ranks = _own_place(os.environ)
    if ranks.world_size == 1:
        yield ranks, choose_device(device)
        return
    own = _own_device(device, ranks)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    patience = timedelta(minutes=2 * minutes if minutes else 24 * 60)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo",
        store=_own_store(patience),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=patience,
    )
    farewell = True
    try:
        yield ranks, own
    except Exception as error:
        # A rank that met a bug goes at once: another may wait for it in the middle of something, and so would it.
        farewell = isinstance(error, UserError | Interrupted)
        raise
    finally:
        if farewell:
            dist.destroy_process_group()


def _own_place(environment: Mapping[str, str]) -> Ranks:
    """This process among those of the job, as torchrun's variables say.

    Raises:
        UserError: one is missing or will not do.
    """

    def number(name: str, otherwise: str) -> int:
        text = environment.get(name) or otherwise
        if not text.isdecimal():
            raise UserError(f"{name}: '{text}' is no number; {START_ALONE}")
        return int(text)

    world = number("WORLD_SIZE", "1")
    if world == 1:
        return Ranks()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(
                f"WORLD_SIZE={world} says that there are several processes, and {name} is not set; {START_ALONE}"
            )
    ranks = Ranks(number("RANK", ""), world, number("LOCAL_RANK", "0"))
    if ranks.rank >= world:
        raise UserError(f"RANK={ranks.rank}: ranks of WORLD_SIZE={world} are numbered from 0; {START_ALONE}")
    return ranks


def _own_store(patience: timedelta) -> Any:
    """Where the ranks find one another.

    torchrun's is the same after a restart, and holds the addresses of those that were ended then. So each start of a
    job on one host has its own keys. (On several hosts torchrun does not count starts alike everywhere.)
    """
    store, _, _ = next(rendezvous("env://", timeout=patience))
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    start = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
    return dist.PrefixStore(start, store)  # pyright: ignore[reportPrivateImportUsage]


def _own_device(device: str, ranks: Ranks) -> torch.device:
    with reported_once():
        if ":" in device:
            raise UserError(
                f"device: '{device}' is one, and {ranks.world_size} processes take one each; use device=cuda"
            )
        own = choose_device(device)
    return choose_device(f"cuda:{ranks.local_rank}") if own.type == "cuda" else own
