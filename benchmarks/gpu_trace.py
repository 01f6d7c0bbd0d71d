"""Kernels and communication of some work on a GPU, from torch's profiler."""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bytelatent.training.profiling.measure import PROFILED_CALLS, by_kind, kernels_of, wait_for


def print_kernels(work: Callable[[], Any], device: torch.device, longest: int = 24) -> None:
    """The time of each kind, then the longest kernels."""
    kernels = kernels_of(work, device)
    total = sum(kernel.seconds for kernel in kernels)
    kinds = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in by_kind(kernels).items() if seconds > 0)
    print(f"kernels: {total * 1e3:.1f} ms: {kinds}")
    for kernel in kernels[:longest]:
        took = f"{kernel.seconds / total:6.1%} {kernel.seconds * 1e3:8.2f} ms {kernel.count:5.0f} x"
        print(f"{took}  {kernel.name[:100]}  ({kernel.kind})", flush=True)


@dataclass(frozen=True)
class Communication:
    """Seconds of a GPU between the start of its first kernel and the end of its last one.

    Attributes:
        total: in which a collective of NCCL ran, also one that waited for other ranks.
        exposed: those of them in which nothing else ran.
        idle: in which nothing ran at all.
    """

    span: float
    total: float
    exposed: float
    idle: float


def communication(events: Iterable[dict[str, Any]]) -> Communication:
    """What the events of a trace in Chrome's format say of its GPU; their times are in microseconds."""
    collectives: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            of = collectives if event["name"].startswith("nccl") else others
            of.append((float(event["ts"]), float(event["ts"]) + float(event["dur"])))
    if not collectives and not others:
        return Communication(0.0, 0.0, 0.0, 0.0)
    begin, end = min(first for first, _ in collectives + others), max(last for _, last in collectives + others)
    total, busy = covered(collectives), covered(collectives + others)
    span, exposed = end - begin, busy - covered(others)
    return Communication(span / 1e6, total / 1e6, exposed / 1e6, (span - busy) / 1e6)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the intervals lasts."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def communication_of(work: Callable[[], Any], device: torch.device) -> Communication | None:
    """The same of some work, done `PROFILED_CALLS` times; None but on CUDA."""
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED_CALLS):
            work()
        wait_for(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        return communication(json.loads(trace.read_text())["traceEvents"])
