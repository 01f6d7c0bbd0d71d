"""Jobs of many clients on one engine: each text is what it is alone."""

import gc
import queue
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bytelatent import BLT
from bytelatent.inference import Sampling, prompt_ids
from bytelatent.inference.kv_cache import BLOCK, CacheCapacity
from bytelatent.inference.prefix_cache import PrefixCache
from bytelatent.inference.prompts import NUM_READERS
from bytelatent.inference.step import SizedSlots
from bytelatent.inference.step.step import BLTStep
from bytelatent.patching import PatchSettings
from bytelatent.serving import scheduler as module
from bytelatent.serving.scheduler import Job, QueueFull, Scheduler, Stopping, Ticket, Update
from bytelatent.serving.warm_up import reserve, warm_up
from tests.inference.test_engine import decoder_of


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


def test_random_cancels_leave_nothing_behind(blt: BLT) -> None:
    """Jobs that wait, are read or decoded are cancelled at any time; the others' texts are those of `generate`."""
    scheduler = Scheduler(blt, batch_size=3, max_waiting=20, prefill_chunk=16, prefix_cache_bytes=0)
    chance = random.Random(0)
    counts = []
    for _ in range(4):
        clients = []
        for number in range(14):
            prompt, seed = "abcd " * chance.randint(0, 20), chance.randint(0, 9)
            size = chance.choice([5, 25, 100_000])
            client = Client(scheduler, prompt, size, samples=chance.randint(1, 2) if number < 6 else 1, seed=seed)
            clients.append((client, prompt, size, seed))
            time.sleep(chance.choice([0, 0, 0.01]))
            if size > 1000 or chance.random() < 0.4:
                threading.Timer(chance.random() * 0.1, scheduler.cancel, [client.ticket]).start()
        for client, prompt, size, seed in clients:
            results = client.results()
            expected = [blt.generate(prompt, size, seed=seed + sample) for sample in range(len(results)) if size < 1000]
            for updates, text in zip(results, expected, strict=False):
                found = b"".join(update.data for update in updates).decode(errors="replace")
                assert found == text or (updates[-1].ended == "cancelled" and text.startswith(found[:-1]))
        assert scheduler.drain(5)
        scheduler._stops = False
        assert scheduler.statistics().busy == 0
        assert not scheduler._ticket_of
        del client, clients
        scheduler.call(gc.collect).result(5)
        counts.append(sum(tensor.numel() for tensor in gc.get_objects() if type(tensor) is torch.Tensor))
    scheduler.close()
    assert counts[1:] == counts[1:2] * 3


def test_a_request_that_fails_harms_no_other(blt: BLT, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose prompt cannot be read; then an error in a step, after which those that wait go on."""
    read = scheduler._engine.decoder.prefill

    def prefill(prompts: Any, last_only: bool = False) -> Any:
        if any(len(prompt) == 5 for prompt in prompts):
            raise torch.OutOfMemoryError("no memory")
        return read(prompts, last_only)

    monkeypatch.setattr(scheduler._engine.decoder, "prefill", prefill)
    clients = [Client(scheduler, text, 20, seed=1) for text in ("The", "abcd", "it is")]
    [failed] = clients[1].results()
    assert (failed[-1].ended, failed[-1].failure[:22]) == ("failed", "there is not enough me")
    assert [clients[0].texts(), clients[2].texts()] == [[blt.generate(text, 20, seed=1)] for text in ("The", "it is")]
    engine = scheduler._engine
    monkeypatch.setattr(engine.slots, "advance", lambda: 1 // 0)
    clients = [Client(scheduler, "The", 20, seed=number) for number in range(8)]
    results = [client.results()[0] for client in clients]
    assert scheduler._engine is not engine
    assert "ZeroDivisionError" in results[0][-1].failure
    assert results[-1][-1].ended in ("length", "end of text")
    assert b"".join(update.data for update in results[-1]).decode(errors="replace") == blt.generate("The", 20, seed=7)


def test_prompts_that_begin_alike(blt: BLT) -> None:
    """They are read from a stored state, with the same text; alternatives and patch starts come with the bytes."""
    scheduler = Scheduler(blt, batch_size=2, max_waiting=20, prefill_chunk=64, prefix_cache_bytes=1 << 24)
    system = "You are a careful assistant, and write short answers. " * 8
    for number, question in enumerate(["Why?", "Is it?", "And when?", "Is it?"]):
        client = Client(scheduler, system + question, 30, seed=number, num_alternatives=2)
        [updates] = client.results()
        found = b"".join(update.data for update in updates)
        assert found.decode(errors="replace") == blt.generate(system + question, 30, seed=number)
        read = blt.read((system + question).encode() + found)
        assert [start for update in updates for start in update.starts] == read.starts[-len(found) :].tolist()
        for update in updates:
            assert len(update.ids) == len(update.log_probabilities) == len(update.alternatives) == len(update.data)
            assert all(len(likely) == 2 for likely in update.alternatives)
    statistics = scheduler.statistics()
    assert statistics.hits == 2
    assert statistics.reused_bytes >= 2 * len(system)
    assert statistics.prefill_bytes < 3 * len(system)
    assert 0 < statistics.cached_bytes <= 1 << 24
    assert sum(statistics.between_bytes.counts) > 20
    scheduler.close()


def test_every_set_of_slots_is_warmed_up(blt: BLT, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = blt.engine(16, varies=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    reserve(engine, 1000)
    warm_up(engine, 16, 64)
    assert isinstance(engine.slots, SizedSlots)
    assert all(slots.num_steps for slots in engine.slots.sets.values())
    assert engine.is_idle
    keys = [slots.step.state.patches.k for slots in engine.slots.sets.values()]
    asked = engine.submit("ab", Sampling(temperature=1.0, seed=3), 900, 3)
    engine.run()
    kept = [
        slots.step.state.patches.k is before for slots, before in zip(engine.slots.sets.values(), keys, strict=True)
    ]
    assert all(kept)
    assert [each.text for each in asked] == blt.generate("ab", 900, 3, temperature=1.0, seed=3)


def test_caches_that_memory_does_not_hold_grow_later(blt: BLT, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = blt.engine(2, varies=True)
    assert isinstance(engine.slots, SizedSlots)
    more = [slots.more_bytes(CacheCapacity(1024, 512)) for slots in engine.slots.sets.values()]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (more[-1] + 2, 1 << 40))
    states = [slots.step.state for slots in engine.slots.sets.values()]
    before = [state.patches.k.nbytes + state.patches.v.nbytes for state in states]
    reserve(engine, 1024)
    taken = [state.patches.k.nbytes + state.patches.v.nbytes - size for state, size in zip(states, before, strict=True)]
    assert taken == [more[0], 0]


@pytest.mark.parametrize(("batch_size", "chunk"), [(1, 1), (7, 2**20)])
def test_warming_up_grows_no_caches(blt: BLT, batch_size: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long prompts that it reads take no slots, each of which would have to hold as much."""
    engine = blt.engine(batch_size, varies=True)
    assert isinstance(engine.slots, SizedSlots)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    reserve(engine, 100)
    sets = engine.slots.sets.values()
    assert all(slots._room == CacheCapacity() for slots in sets)  # it holds more already
    warm_up(engine, batch_size, chunk)
    assert engine.is_idle
    longest = 2 * (512 + 2 * BLOCK)
    assert all(max(vars(slots._room).values()) <= longest for slots in sets)
    assert all(slots.step.state.open_k.shape[2] <= longest for slots in sets if isinstance(slots.step, BLTStep))


def test_it_serves_where_memory_does_not_hold_a_warm_up(
    blt: BLT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def warm_up(engine: Any, batch_size: int, chunk: int) -> None:
        engine.submit("abc", Sampling(), 20, batch_size)
        engine.advance()
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(module, "warm_up", warm_up)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
    with monkeypatch.context() as there:
        there.setattr(BLT, "device", torch.device("cuda"))
        scheduler = Scheduler(blt, batch_size=2, max_waiting=2, prefill_chunk=16, prefix_cache_bytes=0)
    assert "memory does not hold 2 short texts at once; give a smaller --batch-size" in caplog.text
    assert scheduler.statistics().busy == 0
    assert Client(scheduler, "The", 20, seed=1).texts() == [blt.generate("The", 20, seed=1)]
    scheduler.close()


@pytest.mark.parametrize(("chunk", "cached"), [(16, False), (16, True), (2, False)])
def test_a_stream_waits_for_one_chunk_at_most(blt: BLT, chunk: int, cached: bool) -> None:
    """However many long prompts arrive at once."""
    engine = blt.engine(12, varies=True)
    queue = engine.serve(chunk, PrefixCache(1 << 30, shortest=8) if cached else None)
    engine.submit("a", Sampling(temperature=1.0), 10_000)
    engine.advance()
    for number in range(11):
        engine.submit(f"The same beginning, {number}", Sampling(seed=number), 2)
    while queue.groups:
        before = queue.num_read
        engine.advance()
        assert queue.num_read - before <= max(chunk, NUM_READERS)


def test_calls_run_on_the_engines_thread(blt: BLT, scheduler: Scheduler) -> None:
    assert scheduler.call(lambda: threading.current_thread().name).result(5) == "engine"
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 // 0).result(5)
    assert scheduler.call(lambda: blt.patch("abc")).result(5) == blt.patch("abc")
