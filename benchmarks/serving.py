"""How much of the engine's speed reaches the clients of a server, and how long do they wait?

    python benchmarks/serving.py MODEL [rate] [long] [prefix] [soak] [--clients 1,64,200] [--device cpu]
    python benchmarks/serving.py blt-1b --clients 1,64,200 --new 512       # random weights, on a card

The scheduler is driven directly, without HTTP. A MODEL that is a preset's name gets random weights in bfloat16 and the
patches that `benchmarks/decode.py` gives it; texts of random weights do not end before their length.

rate    closed loop: each client asks again once it has its text. Bytes per second, also of the engine alone with the
        same prompts at once; time to the first byte, and between bytes
long    half of the slots stream while a prompt of --long bytes arrives: the longest wait between two bytes of a stream,
        before and meanwhile, for several sizes of chunks; whole: a chunk as long as the prompt
soak    200 clients for --minutes, half of whose texts are cancelled at a random time: memory, places in use, and
        whether texts equal those of `generate`. Not part of the default
prefix  prompts that begin with the same --shared bytes, with and without the cache: seconds to the first byte
"""

import argparse
import gc
import itertools
import random
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bytelatent import BLT
from bytelatent.device import choose_device
from bytelatent.inference import Sampling, prompt_ids
from bytelatent.model import BLTModel
from bytelatent.serving.scheduler import Job, QueueFull, Scheduler, Ticket, Update
from bytelatent.vocab import decode

TEXT = (
    "The engine reads a prompt in chunks between two steps, so that those who stream need not wait for it. "
    "What is read once can be used again by prompts that begin alike, as those of a conversation do. "
)
CACHE_BYTES = 4 << 30


def model_of(name: str, device: str) -> BLT:
    from bytelatent.model.settings import PRESETS

    if name not in PRESETS:
        return BLT.from_pretrained(name, device=device)
    import decode_models  # beside this file

    from bytelatent.inference.step import sampling
    from bytelatent.vocab import BYTES
    from bytelatent.weights import Config

    decoder = decode_models.decoder_of(name)
    BYTES.eos = sampling.EOS = -1
    config = Config(model=decoder.model.settings, context=8192, patching=decoder.patching)
    assert isinstance(decoder.model, BLTModel)
    return BLT(decoder.model, config, decoder.byte_lm)


def prompt_of(number: int, size: int) -> torch.Tensor:
    return prompt_ids(f"{number}: " + TEXT * (size // len(TEXT) + 1))[: size + 1]


def draw(seed: int) -> Sampling:
    return Sampling(temperature=1.0, seed=seed)


@dataclass
class Client:
    """Asks again and again; holds the times at which bytes came."""

    scheduler: Scheduler
    jobs: list[Job]
    done: threading.Semaphore
    first_s: list[float] = field(default_factory=list)
    times: list[tuple[float, int]] = field(default_factory=list)
    num_bytes: int = 0
    ticket: Ticket | None = None
    _asked: float = 0.0
    _has_any: bool = False

    def ask(self) -> None:
        if not self.jobs:
            self.done.release()
            return
        self._asked, self._has_any = time.perf_counter(), False
        try:
            self.ticket = self.scheduler.submit(self.jobs.pop(), self.take)
        except QueueFull as full:
            raise SystemExit(f"the queue is full: {full}") from None

    def take(self, updates: list[Update]) -> None:
        now = time.perf_counter()
        for update in updates:
            if update.data:
                if not self._has_any:
                    self.first_s.append(now - self._asked)
                    self._has_any = True
                self.times.append((now, len(update.data)))
                self.num_bytes += len(update.data)
            if update.ended is not None:
                self.ask()


def share(values: list[float], part: float) -> str:
    ordered = sorted(values)
    return f"{1000 * ordered[min(int(part * len(ordered)), len(ordered) - 1)]:8.1f}" if ordered else "       -"


def scheduler_of(blt: BLT, args: Any, chunk: int | None = None, cache_bytes: int = 0) -> Scheduler:
    return Scheduler(
        blt,
        batch_size=args.batch_size,
        max_waiting=10_000,
        prefill_chunk=chunk or args.chunk,
        prefix_cache_bytes=cache_bytes,
    )


def engine_rate(blt: BLT, args: Any, jobs: list[Job], count: int) -> float:
    """Bytes per second of the engine alone, in as many slots as there are clients at once."""
    engine = blt.engine(min(args.batch_size, count))
    clock = time.process_time if args.cpu_time else time.perf_counter
    for warm in (True, False):
        began = clock()
        asked = [
            engine.submit(job.ids, job.sampling, 16 if warm else job.max_new_bytes)[0]
            for job in (jobs[:count] if warm else jobs)
        ]
        engine.run()
    return sum(len(which.data) for which in asked) / (clock() - began)


def rate(blt: BLT, args: Any) -> None:
    print(f"{'clients':>8} {'engine B/s':>11} {'served B/s':>11} {'share':>6}  first byte, ms: p50, p99   between: p99")
    clock = time.process_time if args.cpu_time else time.perf_counter
    for count in args.clients:
        jobs = [Job(prompt_of(number, args.prompt), draw(number), args.new) for number in range(count * args.rounds)]
        alone = engine_rate(blt, args, jobs, count)
        scheduler = scheduler_of(blt, args)
        clients: list[Client] = []
        for warm in (True, False):
            done = threading.Semaphore(0)
            given = [Job(job.ids, job.sampling, 16) for job in jobs[:count]] if warm else jobs
            clients = [Client(scheduler, given[number::count], done) for number in range(count)]
            began, counted = time.perf_counter(), clock()
            for client in clients:
                client.ask()
            for _ in clients:
                done.acquire()
        took = clock() - counted
        served = sum(client.num_bytes for client in clients) / took
        first = [value for client in clients for value in client.first_s]
        between = [gap for client in clients for gap in gaps(client, began)]
        print(
            f"{count:8} {alone:11,.0f} {served:11,.0f} {served / alone:6.0%}  {share(first, 0.5)} {share(first, 0.99)}"
            f"            {share(between, 0.99)}",
            flush=True,
        )
        scheduler.close()


def gaps(client: Client, since: float) -> list[float]:
    moments = [moment for moment, _ in client.times if moment >= since]
    return [after - before for before, after in pairwise(moments)]


def long(blt: BLT, args: Any) -> None:
    print(f"a prompt of {args.long:,} bytes beside {args.batch_size // 2} streams")
    print(f"{'chunk':>8} {'longest wait before, ms':>24} {'meanwhile, ms':>14} {'its first byte, s':>18}")
    for chunk in (*args.chunks, args.long + 1):
        beside_long(blt, args, chunk)
        gc.collect()  # the scheduler's caches, before the next one has its own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def beside_long(blt: BLT, args: Any, chunk: int) -> None:
    scheduler = scheduler_of(blt, args, chunk)
    done = threading.Semaphore(0)
    streams = [
        Client(scheduler, [Job(prompt_of(number, args.prompt), draw(number), 10**6)], done)
        for number in range(args.batch_size // 2)
    ]
    for stream in streams:
        stream.ask()
    while not all(len(stream.times) > 20 for stream in streams):
        time.sleep(0.05)
    began = time.perf_counter()
    time.sleep(1)
    before = max(gap for stream in streams for gap in gaps(stream, began))
    found: list[tuple[float, float]] = []
    for number in range(3):
        began = time.perf_counter()
        late = Client(scheduler, [Job(prompt_of(-1 - number, args.long), draw(0), 8)], done)
        late.ask()
        done.acquire()
        found.append((max(gap for stream in streams for gap in gaps(stream, began)), late.first_s[0]))
    name = "whole" if chunk > args.long else f"{chunk:,}"
    waits, firsts = (
        ", ".join(f"{scale * each[part]:.{digits}f}" for each in found)
        for part, scale, digits in ((0, 1000, 0), (1, 1, 2))
    )
    print(f"{name:>8} {1000 * before:24.1f} {waits:>14} {firsts:>18}", flush=True)
    scheduler.close()


def prefix(blt: BLT, args: Any) -> None:
    shared = prompt_of(0, args.shared)
    jobs = [Job(torch.cat([shared, prompt_of(number, 100)[1:]]), draw(number), 8) for number in range(12)]
    print(f"12 prompts that share {args.shared:,} bytes; first byte of the third to the last, ms: p50, p99")
    for cache_bytes in (0, CACHE_BYTES):
        scheduler, done = scheduler_of(blt, args, cache_bytes=cache_bytes), threading.Semaphore(0)
        client = Client(scheduler, jobs[::-1], done)
        client.ask()
        done.acquire()
        found, statistics = client.first_s[2:], scheduler.statistics()
        name = "no cache" if not cache_bytes else f"cache of {statistics.cached_bytes / 2**20:,.0f} MB"
        print(f"{name:>20} {share(found, 0.5)} {share(found, 0.99)}   {statistics.prefill_bytes:,} bytes read")
        scheduler.close()


def soak(blt: BLT, args: Any) -> None:
    scheduler, chance = scheduler_of(blt, args, cache_bytes=64 << 20), random.Random(0)
    until, whole, lock = time.perf_counter() + 60 * args.minutes, [], threading.Lock()
    done, count, counter = threading.Semaphore(0), 200, itertools.count()

    def ask() -> None:
        if time.perf_counter() > until:
            done.release()
            return
        with lock:
            number = next(counter)
            size, new, hangs_up = chance.randint(1, 600), chance.randint(1, args.new), chance.random() < 0.5
            after = chance.randint(0, new)
        found, tickets = bytearray(), list[Ticket]()

        def take(updates: list[Update]) -> None:
            [update] = updates
            found.extend(update.data)
            if update.ended in ("cancelled", "failed"):
                assert hangs_up, update
            elif update.ended is not None and len(whole) < 5000:
                whole.append((size, new, number, bytes(found)))
            elif hangs_up and update.ended is None and len(found) >= after:
                for ticket in tickets:  # none yet: the next byte asks again
                    scheduler.cancel(ticket)
            if update.ended is not None:
                ask()

        tickets.append(scheduler.submit(Job(prompt_of(0, size), draw(number), new), take))

    for _ in range(count):
        ask()
    print(f"{'s':>6} {'MB':>8} {'busy':>5} {'waiting':>8} {'texts':>7} {'cached MB':>10}")
    began = time.perf_counter()
    while time.perf_counter() < until:
        time.sleep(5 * args.minutes)
        now = scheduler.statistics()
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
        texts = sum(now.ended.values())
        print(
            f"{time.perf_counter() - began:6.0f} {memory:8.0f} {now.busy:5} {now.waiting:8} {texts:7} "
            f"{now.cached_bytes / 2**20:10.1f}",
            flush=True,
        )
    for _ in range(count):
        done.acquire()
    now = scheduler.statistics()
    scheduler.close()
    tried = chance.sample(whole, min(40, len(whole)))
    same = sum(
        blt.generate(decode(prompt_of(0, size).numpy()), new, seed=seed, temperature=1.0)
        == text.decode("utf-8", "replace")
        for size, new, seed, text in tried
    )
    print(f"at the end {now.busy} busy, {now.waiting} waiting; {now.ended}; {same} of {len(tried)} texts as alone")


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("parts", nargs="*", default=["rate", "long", "prefix"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--clients", type=numbers, default=[1, 64, 200])
    parser.add_argument("--rounds", type=int, default=2, help="texts of each client")
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--long", type=int, default=8_000)
    parser.add_argument("--chunks", type=numbers, default=[256, 1024, 4096])
    parser.add_argument("--cpu-time", action="store_true", help="rates per CPU second, on a machine with other work")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--shared", type=int, default=4000)
    args = parser.parse_args()
    blt = model_of(args.model, str(choose_device(args.device)))
    for part in args.parts or ["rate", "long", "prefix"]:
        {"rate": rate, "long": long, "prefix": prefix, "soak": soak}[part](blt, args)
    if torch.cuda.is_available():
        print(f"memory at most: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
