"""Jobs of many clients on one engine: each text is what it is alone."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bytelatent import BLT
from bytelatent.inference import Sampling, prompt_ids
from bytelatent.patching import PatchSettings
from bytelatent.serving.scheduler import Job, QueueFull, Scheduler, Stopping, Ticket, Update
from tests.inference.test_engine import decoder_of, wide_blt

__all__ = ["wide_blt"]


class Client:
    """Collects what a job gives."""

    def __init__(self, scheduler: Scheduler, prompt: str, size: int, samples: int = 1, **sampling: Any):
        self.updates: queue.Queue[list[Update]] = queue.Queue()
        self.num_alternatives = sampling.pop("num_alternatives", 0)
        job = Job(prompt_ids(prompt), Sampling(**sampling), size, samples, self.num_alternatives)
        self.samples = samples
        self.ticket: Ticket = scheduler.submit(job, self.updates.put)

    def results(self, timeout: float = 60) -> list[list[Update]]:
        """Of each sample its updates, once all have ended."""
        found: list[list[Update]] = [[] for _ in range(self.samples)]
        while any(not updates or updates[-1].ended is None for updates in found):
            for update in self.updates.get(timeout=timeout):
                assert not found[update.sample] or found[update.sample][-1].ended is None
                found[update.sample].append(update)
        return found

    def texts(self) -> list[str]:
        return [b"".join(update.data for update in updates).decode(errors="replace") for updates in self.results()]


@pytest.fixture(scope="module")
def blt() -> BLT:
    decoder = decoder_of("entropy")
    return BLT.from_config(
        decoder.model.settings, PatchSettings(threshold=5.12), entropy_model=decoder.byte_lm, device="cpu"
    )


@pytest.fixture
def scheduler(blt: BLT) -> Iterator[Scheduler]:
    scheduler = Scheduler(blt, batch_size=3, max_waiting=20, prefill_chunk=16, prefix_cache_bytes=1 << 20)
    yield scheduler
    scheduler.close()


def test_texts_are_those_of_generate(blt: BLT, scheduler: Scheduler) -> None:
    prompts = ["The", "", "a longer prompt than the chunk of sixteen bytes", "it", "The", "two\nlines"]
    clients = [Client(scheduler, prompt, 30, seed=number) for number, prompt in enumerate(prompts)]
    for number, (prompt, client) in enumerate(zip(prompts, clients, strict=True)):
        assert client.texts() == [blt.generate(prompt, 30, seed=number)]
    twice = Client(scheduler, "The", 12, samples=5, seed=3)
    assert twice.texts() == blt.generate("The", 12, samples=5, seed=3)
    assert scheduler.drain(5)
    with pytest.raises(Stopping):
        Client(scheduler, "The", 12)
    statistics = scheduler.statistics()
    assert statistics.busy == statistics.waiting == 0
    assert sum(statistics.ended.values()) == 11
    assert sum(statistics.time_to_first_byte.counts) <= 11


def test_a_full_queue_and_cancelled_jobs(scheduler: Scheduler) -> None:
    clients = [Client(scheduler, "abc", 100_000) for _ in range(23)]
    with pytest.raises(QueueFull) as full:
        Client(scheduler, "abc", 10)
    assert full.value.retry_after_s >= 1
    for client in clients:
        scheduler.cancel(client.ticket)
    assert {updates[-1].ended for client in clients for updates in client.results()} <= {"cancelled", "end of text"}
    assert Client(scheduler, "abc", 3).results()
    assert scheduler.drain(5)


def test_a_receiver_that_fails_harms_no_other(blt: BLT, scheduler: Scheduler) -> None:
    def fails(updates: list[Update]) -> None:
        raise RuntimeError("the client is gone")

    scheduler.submit(Job(prompt_ids("abc"), Sampling(), 100_000), fails)
    assert Client(scheduler, "The", 20, seed=1).texts() == [blt.generate("The", 20, seed=1)]
    assert scheduler.drain(5)


def test_calls_run_on_the_engines_thread(blt: BLT, scheduler: Scheduler) -> None:
    assert scheduler.call(lambda: threading.current_thread().name).result(5) == "engine"
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 // 0).result(5)
    assert scheduler.call(lambda: blt.patch("abc")).result(5) == blt.patch("abc")
