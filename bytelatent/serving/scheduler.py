"""Requests of many clients on one engine: a thread owns it, any other one may submit, cancel and call.

Each step the thread takes what was asked since the last one, lets the engine read prompts and decode, and gives each
request what is new of it.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bytelatent.blt import BLT
from bytelatent.errors import UserError, in_one_line
from bytelatent.inference import Continuation, Engine, Sampling
from bytelatent.inference.constraint import Constraint
from bytelatent.inference.continuation import Alternatives, Reason
from bytelatent.inference.prefix_cache import PrefixCache
from bytelatent.inference.prompts import PromptQueue
from bytelatent.serving.statistics import Histogram, Statistics
from bytelatent.serving.warm_up import reserve, warm_up

LOGGER = logging.getLogger(__name__)

NUM_ENDS = 64  # newest ends of sequences, from which it is estimated when a place becomes free
RETRY_AFTER_S = 1.0, 60.0  # the shortest and the longest estimate

OnUpdate = Callable[[list["Update"]], None]


class QueueFull(Exception):
    """There is no room for another request.

    Attributes:
        retry_after_s: when there may be some.
    """

    def __init__(self, retry_after_s: float):
        super().__init__(f"the queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class Stopping(Exception):
    """The scheduler ends, and takes no more requests."""

    def __init__(self) -> None:
        super().__init__("the server is stopping and takes no more requests")


@dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
        ids: [N] the prompt's, BOS first.
        samples: continuations; their seeds follow one another.
        num_alternatives: most likely ids to report for each byte.
        constraint: what the output must match.
    """

    ids: Tensor
    sampling: Sampling
    max_new_bytes: int
    samples: int = 1
    num_alternatives: int = 0
    constraint: Constraint | None = None


class Update(NamedTuple):
    """What is new of a sample.

    Attributes:
        data: new bytes, without any that may turn out to begin a stop text. `ids` and the lists after it have an
            element for each of them; a stop text and EOS are not among them.
        starts: whether each byte begins a patch.
        ended: why nothing more comes; None: more may.
        failure: what went wrong, in one line, where `ended` is "failed".
    """

    sample: int
    data: bytes
    ids: list[int]
    log_probabilities: list[float]
    alternatives: list[Alternatives]
    starts: list[bool]
    ended: Reason | None
    failure: str = ""


@dataclass(eq=False)
class Ticket:
    """A job that was accepted."""

    job: Job
    on_update: OnUpdate
    samples: list[Continuation]
    submitted_s: float
    newest_s: list[float | None] = field(default_factory=list)  # of each sample, when its newest bytes came


class Scheduler:
    """Jobs on one engine.

    Args:
        batch_size: sequences that are decoded at once.
        max_waiting: sequences that may wait beside them.
        prefill_chunk: ids of prompts that are read between two steps at most.
        prefix_cache_bytes: memory for states of prompts, for prompts that begin alike.
    """

    def __init__(
        self, blt: BLT, *, batch_size: int, max_waiting: int, prefill_chunk: int, prefix_cache_bytes: int
    ) -> None:
        self.blt, self.batch_size = blt, batch_size
        self.places = batch_size + max_waiting
        self.prefill_chunk = prefill_chunk
        self._cache = PrefixCache(prefix_cache_bytes)
        self._prefill_ids = 0  # that earlier engines have read
        self._engine, self._prompts = self._new_engine()
        self._condition = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._num_live, self._stops, self._closed = 0, False, False
        self._ticket_of: dict[Continuation, tuple[Ticket, int]] = {}
        self._ends: deque[float] = deque(maxlen=NUM_ENDS)
        self._requests = self._refused = self._bytes = self._patches = 0
        self._ended: Counter[str] = Counter()
        self._time_to_first_byte, self._between_bytes = Histogram(), Histogram()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # From any thread

    def submit(self, job: Job, on_update: OnUpdate) -> Ticket:
        """Ask for what follows a prompt.

        Args:
            on_update: is called on the engine's thread with what is new, in order; the last update of each sample says
                why it ended. It must not wait. If it raises, the job is cancelled.

        Raises:
            QueueFull: as many sequences as may wait do.
            Stopping: `drain` or `close` was called.
            UserError: the job is not valid.
        """
        if job.samples > self.places:
            raise UserError(f"samples: {job.samples:,} are more than the {self.places:,} that can be asked for at once")
        samples = self._engine.asked(
            job.ids, job.sampling, job.max_new_bytes, job.samples, job.num_alternatives, job.constraint
        )
        ticket = Ticket(job, on_update, samples, time.monotonic(), [None] * len(samples))
        with self._condition:
            if self._stops:
                raise Stopping
            if self._num_live + len(samples) > self.places:
                self._refused += 1
                raise QueueFull(self._retry_after_s())
            self._num_live += len(samples)
            self._requests += 1
            self._command(lambda: self._enqueue(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End what has not ended of a job; its slots are free at the next step."""
        with self._condition:
            self._command(lambda: self._cancel(ticket))

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Run a function between two steps on the engine's thread, and give its result.

        Raises:
            Stopping: `close` was called.
        """
        future: Future[Any] = Future()
        with self._condition:
            if self._closed:
                raise Stopping
            self._calls.append((future, function))
            self._condition.notify_all()
        return future

    def drain(self, timeout_s: float) -> bool:
        """Take no more jobs, and wait until all have ended; False if some have not in time."""
        with self._condition:
            self._stops = True
            return self._condition.wait_for(lambda: self._num_live == 0, timeout_s)

    def close(self, timeout_s: float | None = None) -> bool:
        """Cancel what has not ended, and end the thread; False if what it runs has not ended in time."""
        with self._condition:
            self._stops = self._closed = True
            self._condition.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def statistics(self) -> Statistics:
        engine, cache = self._engine, self._cache
        return Statistics(
            slots=self.batch_size,
            busy=engine.num_busy,
            waiting=max(self._num_live - engine.num_busy, 0),
            places=self.places,
            requests=self._requests,
            refused=self._refused,
            ended=dict(self._ended),
            bytes=self._bytes,
            patches=self._patches,
            prefill_bytes=self._prefill_ids + self._prompts.num_read,
            reused_bytes=cache.num_reused,
            hits=cache.hits,
            lookups=cache.lookups,
            cached_bytes=cache.num_bytes,
            time_to_first_byte=self._time_to_first_byte.copy(),
            between_bytes=self._between_bytes.copy(),
        )

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._condition.notify_all()

    def _retry_after_s(self) -> float:
        """When a sequence may end: the mean time between the newest ends."""
        shortest, longest = RETRY_AFTER_S
        if not self._ends:
            return shortest
        return min(max((time.monotonic() - self._ends[0]) / len(self._ends), shortest), longest)

    # On the engine's thread

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._commands or self._calls or self._closed or not self._engine.is_idle
                )
                commands, self._commands = self._commands, deque()
                closed = self._closed
                calls = [self._calls.popleft() for _ in range(len(self._calls) if closed else min(len(self._calls), 1))]
            run = [partial(_run_call, future, _refuse if closed else function) for future, function in calls]
            for command in (*commands, *run):  # a single call, since it may take long
                command()
            if closed:
                for ticket in {id(ticket): ticket for ticket, _ in self._ticket_of.values()}.values():
                    self._cancel(ticket)
                return
            if not self._engine.is_idle:
                self._advance()

    def _new_engine(self) -> tuple[Engine, PromptQueue]:
        engine = self.blt.engine(self.batch_size, varies=True)
        try:
            if self.blt.device.type == "cuda":
                reserve(engine, self.blt.context)
                warm_up(engine, self.batch_size, self.prefill_chunk)
        except torch.OutOfMemoryError:
            LOGGER.warning("memory does not hold %d short texts at once; give a smaller --batch-size", self.batch_size)
            del engine
            engine = self.blt.engine(self.batch_size, varies=True)
        return engine, engine.serve(self.prefill_chunk, self._cache if self._cache.max_bytes else None)

    def _replace_engine(self, waiting: list[list[Continuation]]) -> None:
        """Go on with a new engine after an error that nobody knows the extent of."""
        self._cache.clear()
        self._prefill_ids += self._prompts.num_read
        self._engine, self._prompts = self._new_engine()
        for samples in waiting:
            self._engine.enqueue(samples)

    def _enqueue(self, ticket: Ticket) -> None:
        for number, which in enumerate(ticket.samples):
            self._ticket_of[which] = ticket, number
        self._engine.enqueue(ticket.samples)

    def _cancel(self, ticket: Ticket) -> None:
        live = [which for which in ticket.samples if which in self._ticket_of]
        for which in live:
            self._engine.cancel(which)
        self._deliver(live)

    def _advance(self) -> None:
        try:
            longer = self._engine.advance()
            if self._engine.is_broken:
                self._replace_engine(self._engine.waiting)
        except Exception as error:
            LOGGER.exception("decoding failed")
            longer = list(self._ticket_of)
            for which in longer:
                which.fail(error.with_traceback(None))
            self._replace_engine([])
        self._deliver(longer)

    def _deliver(self, changed: list[Continuation]) -> None:
        """Give each job what is new of its samples."""
        now = time.monotonic()
        updates: dict[int, tuple[Ticket, list[Update]]] = {}
        for which in changed:
            if (found := self._ticket_of.get(which)) is None:
                continue
            ticket, sample = found
            update = self._update(which, sample)
            if update.data:
                self._measure(ticket, update, now)
            elif update.ended is None:
                continue
            if update.ended is not None:
                self._end(which, update.ended, now)
            updates.setdefault(id(ticket), (ticket, []))[1].append(update)
        for ticket, new in updates.values():
            try:
                ticket.on_update(new)
            except Exception as error:
                LOGGER.warning("a request was cancelled, since its receiver failed: %s", in_one_line(repr(error)))
                self._drop(ticket)

    def _drop(self, ticket: Ticket) -> None:
        """Cancel a job whose receiver no longer takes updates."""
        now = time.monotonic()
        for which in ticket.samples:
            if which in self._ticket_of:
                self._engine.cancel(which)
                self._end(which, "cancelled", now)

    def _update(self, which: Continuation, sample: int) -> Update:
        begin, data = which.num_given, which.new_bytes()
        new = slice(begin, begin + len(data))
        failure = "" if which.failure is None else _in_words(which.failure)
        lists = which.ids[new], which.log_probabilities[new], which.alternatives[new], which.starts[new]
        return Update(sample, data, *lists, which.ended, failure)

    def _measure(self, ticket: Ticket, update: Update, now: float) -> None:
        count, newest = len(update.data), ticket.newest_s[update.sample]
        self._bytes += count
        self._patches += sum(update.starts)
        if newest is None:
            self._time_to_first_byte.add(now - ticket.submitted_s)
        else:
            self._between_bytes.add((now - newest) / count, count)
        ticket.newest_s[update.sample] = now

    def _end(self, which: Continuation, reason: Reason, now: float) -> None:
        del self._ticket_of[which]
        self._ended[reason] += 1
        self._ends.append(now)
        with self._condition:
            self._num_live -= 1
            self._condition.notify_all()


def _run_call(future: "Future[Any]", function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:  # belongs to whoever asked
        future.set_exception(error)


def _refuse() -> None:
    raise Stopping


def _in_words(failure: Exception) -> str:
    """A failure in a line for who asked; the log has the rest."""
    if isinstance(failure, UserError):
        return str(failure)
    if isinstance(failure, torch.OutOfMemoryError):
        return "there is not enough memory for this request; ask for less, or try again later"
    return f"the server failed on this request ({type(failure).__name__}); its log says why"
