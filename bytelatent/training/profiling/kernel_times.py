"""Where the time of a computation goes: its kernels, what kind each is of, and what ranks say to one another."""

import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bytelatent.training.profiling.measure import wait_for

# A kind by what the name of a kernel (on a CPU: of an operation) holds; the first that fits. Plain patch attention on a
# CPU is made of many operations, of which only those that no other part uses are told apart. A dense gradient of hash
# tables is filled with zeros first.
KINDS = {
    "patch attention": r"own_bytes|read_patch|pool_kernel|pool_backward|index_select|index_add|scatter_(reduce|add)",
    "optimizer and clipping": r"row_adamw|Adam|adamw|Optimizer|multi_tensor|_foreach|LpNorm|vector_norm"
    r"|aten::(index|_index_put_impl_)$",
    "hash tables": r"hash_embed|row_sums|ngram_sums|embedding_bag|EmbeddingBag|index_copy|[Ss]ort|unique|FillFunctor"
    r"|aten::fill_|aten::zero_",
    "attention": r"flash|fmha|cudnn|flex_attention|triton_tem|scaled_dot_product"
    r"|aten::(bmm|baddbmm|_softmax|_safe_softmax)",
    "products": r"gemm|nvjet|cutlass|cublas|xmma|splitK|scaled_mm|aten::(mm|addmm|linear|matmul)$|mkldnn_linear",
    "norms and pointwise": r"triton_(poi|red|per)|elementwise|[Rr]educe|[Nn]orm|[Ss]oft[Mm]ax|softmax|Memcpy|CatArray"
    r"|aten::(mul|add|sub|div|neg|exp|silu|silu_backward|sigmoid|where|copy|cat|stack|clone|sum|mean|rsqrt|pow|cos|sin"
    r"|square|maximum|masked_fill|nll_loss_forward|nll_loss_backward)_?$",
}
REST = "rest"
PROFILED = 2  # calls of the work, for its mean


@dataclass(frozen=True)
class Kernel:
    """One kernel of a device, or on a CPU one operation without those inside it."""

    name: str
    seconds: float  # a call of the work
    count: float

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, self.name)), REST)


def kernels_of(work: Callable[[], Any], device: torch.device, times: int = PROFILED) -> list[Kernel]:
    """The kernels of some work, the longest first; none where torch has no profiler for the device."""
    from torch.profiler import ProfilerActivity, profile

    activities = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}
    if device.type not in activities:
        return []
    with profile(activities=[activities[device.type]]) as seen:
        for _ in range(times):
            work()
        wait_for(device)
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [Kernel(row.key, getattr(row, spent) / 1e6 / times, row.count / times) for row in seen.key_averages()]
    return sorted((row for row in rows if row.seconds > 0), key=lambda row: -row.seconds)


def by_kind(kernels: list[Kernel], absent: Collection[str] = ()) -> dict[str, float]:
    """Seconds of each kind, in the order of `KINDS`, and of the rest.

    Args:
        absent: kinds that the model has no part for; what looks like them is of the rest.
    """
    seconds = {kind: 0.0 for kind in (*KINDS, REST) if kind not in absent}
    for kernel in kernels:
        seconds[REST if kernel.kind in absent else kernel.kind] += kernel.seconds
    return seconds


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


Interval = tuple[float, float]


def communication(events: Iterable[dict[str, Any]]) -> Communication:
    """What the events of a trace in Chrome's format say of its GPU; their times are in microseconds."""
    collectives: list[Interval] = []
    others: list[Interval] = []
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


def covered(intervals: Iterable[Interval]) -> float:
    """How long at least one of the intervals lasts."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def communication_of(work: Callable[[], Any], device: torch.device) -> Communication | None:
    """The same of some work, done `PROFILED` times; None but on CUDA."""
    from torch.profiler import ProfilerActivity, profile

    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILED):
            work()
        wait_for(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(trace))
        return communication(json.loads(trace.read_text())["traceEvents"])
