"""How fast a number of slots decodes, and where a step's time goes; for `decode.py`."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from decode_models import DEVICE, DRAW, lower_bound, random_prompts, wait

from bytelatent.inference import Decoder, Engine
from bytelatent.inference.step import QUORUM, CapturedSlots
from bytelatent.inference.step.cuda_graph import SideStream
from bytelatent.inference.step.step import BLTStep
from bytelatent.kernels.skinny_launch import PROGRAMS, SkinnyLaunch, launch_for
from bytelatent.training.profiling.measure import kernels_of

WARM, PROFILED = 60, 40  # steps


def spread(M: int, N: int, K: int, gated: bool = False, itemsize: int = 2) -> SkinnyLaunch:
    """As `launch_for`, with a program's rows halved, to 16 at least, while a product leaves half of the GPU idle."""
    launch = launch_for(M, N, K, gated, itemsize)
    block_m, block_n = launch.block_m, launch.block_n
    while block_m > 16 and -(-M // block_m) * -(-N // block_n) * launch.splits * 2 <= PROGRAMS:
        block_m //= 2
    return replace(launch, block_m=block_m)


@dataclass(frozen=True)
class Closing:
    """When the global transformer runs, of several slots: see `CapturedSlots`."""

    quorum: float = QUORUM
    most: int | None = None
    beside: bool = False

    def slots(self, decoder: Decoder, count: int) -> CapturedSlots:
        if count == 1:
            return CapturedSlots(decoder, 1)
        most = None if self.most is None else min(self.most, count)
        return CapturedSlots(decoder, count, self.quorum, most, beside=self.beside)


@dataclass(frozen=True)
class Rate:
    """What sequences in as many slots wrote, from the first drawn byte on."""

    bytes_per_second: float
    limit: float  # of it
    per_byte: float  # seconds, of each sequence
    per_step: float
    bytes_per_patch: float
    warm_up: float  # seconds before


def measure(engine: Engine, slots: CapturedSlots, count: int, new: int, quorum: float) -> Rate:
    """Warm up, then time `count` sequences of `new` bytes."""
    began = time.perf_counter()
    for prompt in random_prompts(count, 16, seed=3):
        engine.submit(prompt, DRAW, 24)
    engine.run()
    warm = time.perf_counter() - began
    asked = [engine.submit(prompt, DRAW, new)[0] for prompt in random_prompts(count, 512)]
    engine.advance()
    wait()
    state: Any = slots.step.state
    position, num_patches, first_step = state.position.sum(), state.num_patches.sum(), slots.num_steps
    began = time.perf_counter()
    before = sum(len(one.ids) for one in asked)
    engine.run()
    wait()
    took = time.perf_counter() - began
    drawn = sum(len(one.ids) for one in asked) - before
    return Rate(
        bytes_per_second=drawn / took,
        limit=count / lower_bound(slots.decoder, count, quorum, 512 + new // 2),
        per_byte=took / (drawn / count),
        per_step=took / (slots.num_steps - first_step),
        bytes_per_patch=float((state.position.sum() - position) / (state.num_patches.sum() - num_patches)),
        warm_up=warm,
    )


def generate(
    decoder: Decoder,
    count: int,
    new: int,
    quorum: float = 0.0,
    max_closing: int | None = None,
    beside: bool = False,
) -> None:
    slots = CapturedSlots(decoder, count, quorum, max_closing, beside=beside)
    rate = measure(Engine(decoder, slots, count), slots, count, new, quorum)
    print(
        f"{count} sequences, quorum {quorum:.2f}, {max_closing or count} closing{', beside' * beside}: "
        f"{rate.bytes_per_second:,.0f} bytes/s, {rate.bytes_per_second / rate.limit:.0%} of the limit's "
        f"{rate.limit:,.0f}; "
        f"{rate.per_byte * 1e3:.3f} ms per byte of each, {rate.bytes_per_patch:.2f} bytes per patch, "
        f"warm-up {rate.warm_up:.1f} s, {rate.per_step * 1e3:.3f} ms per step",
        flush=True,
    )


def first_bytes(engine: Engine, count: int, seed: int) -> list[float]:
    """Seconds until each of `count` prompts of 512 bytes, all asked at once, has its first byte."""
    wait()
    began = time.perf_counter()
    waiting = [engine.submit(prompt, DRAW, 8)[0] for prompt in random_prompts(count, 512, seed)]
    found: list[float] = []
    while waiting:
        engine.advance()
        still = [one for one in waiting if not one.ids]
        found += [time.perf_counter() - began] * (len(waiting) - len(still))
        waiting = still
    engine.run()
    return found


def table(decoder: Decoder, counts: Iterable[int], new: int, closing: Closing) -> None:
    """A row for each number of slots. The memory is that of slots and graphs; the peak is that of all, weights too."""
    names = ("slots", "bytes/s", "limit", "share", "ms/step", "bytes/patch", "first ms", "last ms", "GiB", "peak GiB")
    print(f"| {' | '.join(names)} |\n|{' --- |' * len(names)}")
    for count in counts:
        before = _allocated()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        slots = closing.slots(decoder, count)
        engine = Engine(decoder, slots, count)
        rate = measure(engine, slots, count, new, closing.quorum)
        for seed in (5, 6):  # the first time prompts of this size are read, graphs are captured
            first = first_bytes(engine, count, seed)
        peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
        print(
            f"| {count} | {rate.bytes_per_second:,.0f} | {rate.limit:,.0f} | {rate.bytes_per_second / rate.limit:.0%} "
            f"| {rate.per_step * 1e3:.3f} | {rate.bytes_per_patch:.2f} | {median(first) * 1e3:.1f} "
            f"| {max(first) * 1e3:.1f} | {(_allocated() - before) / 2**30:.2f} | {peak / 2**30:.2f} |",
            flush=True,
        )
        del engine, slots
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def profile(decoder: Decoder, count: int, apart: bool, closing: Closing) -> None:
    """The kernels of a step.

    Args:
        apart: kernels follow one another, so that each one's time is its own; otherwise as in use.
    """
    slots = closing.slots(decoder, count)
    slots.overlap = not apart
    if apart and isinstance(slots.step, BLTStep):
        slots.step.side = slots.step.closing_side = SideStream(torch.device("cpu"))  # none
    engine = Engine(decoder, slots, count)
    for prompt in random_prompts(count, 512):
        engine.submit(prompt, DRAW, WARM + 2 * PROFILED + 200)
    for _ in range(WARM):
        engine.advance()
    wait()
    began, first = time.perf_counter(), slots.num_steps
    for _ in range(PROFILED):
        engine.advance()
    wait()
    step = (time.perf_counter() - began) / (slots.num_steps - first)
    kernels = kernels_of(engine.advance, torch.device(DEVICE), PROFILED)
    spent, launches = sum(kernel.seconds for kernel in kernels), sum(kernel.count for kernel in kernels)
    how = "apart" if apart else "overlapping"
    print(
        f"{count} slots, launches {how}: {step * 1e3:.3f} ms per step, {launches:.0f} launches of {spent * 1e3:.3f} ms"
    )
    print("launches  us each  ms per step  share of step  kernel")
    for kernel in kernels[:30]:
        each = kernel.seconds / kernel.count * 1e6
        print(
            f"{kernel.count:8.1f} {each:8.2f} {kernel.seconds * 1e3:12.3f} {kernel.seconds / step:14.1%}  "
            f"{kernel.name[:70]}",
            flush=True,
        )
