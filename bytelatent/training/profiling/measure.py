"""How fast a model trains on this machine, and which kernels take the time.

It times the trainer's own parts on random text: documents of 8,192 bytes in patches of 4.5 bytes on average.
"""

import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bytelatent.data import Batch
from bytelatent.device import autocast
from bytelatent.model import (
    BLTSettings,
    ModelSettings,
    PatchedStream,
    Stream,
    add_patches,
    build_model,
    compile_regions,
    pack_rows,
)
from bytelatent.model.loss import cross_entropy
from bytelatent.training.distributed.float8 import to_float8
from bytelatent.training.distributed.parallelize import apply_activation_checkpointing
from bytelatent.training.distributed.settings import ActivationCheckpointing, Float8, ParallelSettings
from bytelatent.training.gradients import CapturedGradients, Gradients, clip
from bytelatent.training.optimizer import build_optimizer
from bytelatent.training.settings import OptimizerSettings

DOCUMENT, PATCH_BYTES = 8192, 4.5
SLOTS = 128  # the number of patch slots is a multiple of this

# The kind of a kernel, or on a CPU of an operation: the first whose pattern its name matches. Of the many operations of
# patch attention on a CPU, only those that no other part uses are recognised. A dense gradient of hash tables is filled
# with zeros first.
KINDS = {
    "patch attention": r"own_bytes|read_patch|pool_kernel|pool_backward|index_select|index_add|scatter_(reduce|add)",
    "optimizer and clipping": r"row_adamw|Adam|adamw|Optimizer|multi_tensor|_foreach|LpNorm|vector_norm"
    r"|aten::(index|_index_put_impl_)$",
    "hash tables": r"hash_embed|(row|entry|ngram)_sums|embedding_bag|EmbeddingBag|index_copy|[Ss]ort|unique|FillFunctor"
    r"|aten::fill_|aten::zero_",
    "attention": r"flash|fmha|cudnn|flex_attention|triton_tem|scaled_dot_product"
    r"|aten::(bmm|baddbmm|_softmax|_safe_softmax)",
    "products": r"gemm|nvjet|cutlass|cublas|xmma|splitK|scaled_mm|aten::(mm|addmm|linear|matmul)$|mkldnn_linear",
    "norms and pointwise": r"triton_(poi|red|per)|elementwise|[Rr]educe|[Nn]orm|[Ss]oft[Mm]ax|softmax|Memcpy|CatArray"
    r"|aten::(mul|add|sub|div|neg|exp|silu|silu_backward|sigmoid|where|copy|cat|stack|clone|sum|mean|rsqrt|pow|cos|sin"
    r"|square|maximum|masked_fill|nll_loss_forward|nll_loss_backward)_?$",
}
REST = "rest"
PROFILED_CALLS = 2  # whose mean is taken


@dataclass(frozen=True)
class TrainingSetup:
    """What is trained, and how."""

    model: ModelSettings
    device: torch.device
    dtype: torch.dtype  # of products; weights are float32
    compiled: bool = False
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    float8: Float8 | None = None
    num_patches: float | None = None  # of a batch, for `to_float8`
    checkpointing: ActivationCheckpointing = "none"
    captured: bool = False  # forward and backward pass are a CUDA graph


class SyntheticTraining:
    """A model with random weights that trains on random batches. The optimizer has its state, as after a first step."""

    def __init__(self, setup: TrainingSetup):
        self.setup = setup
        torch.manual_seed(0)
        with setup.device:
            self.model = build_model(setup.model)
        to_float8(
            self.model, setup.float8, setup.num_patches, ParallelSettings(activation_checkpointing=setup.checkpointing)
        )
        self.optimizer = build_optimizer(self.model, setup.optimizer)
        self._work = ForwardBackward(self.model, setup.device, setup.dtype)
        self.step(*random_batch(256, setup.device, isinstance(setup.model, BLTSettings)))
        apply_activation_checkpointing(self.model, setup.checkpointing)
        if setup.compiled:
            compile_regions(self.model)
        self._work = ForwardBackward(self.model, setup.device, setup.dtype, setup.captured)

    def forward_backward(self, stream: Stream, targets: Tensor) -> None:
        self._work(stream, targets)

    def forget_shapes(self) -> None:
        """Compile and capture again for the next batch, so that its size has a graph of its own."""
        self._work.forget_shapes()

    def step(self, stream: Stream, targets: Tensor) -> None:
        """A whole step of training."""
        self.forward_backward(stream, targets)
        float(
            clip(self.model.parameters(), self.setup.optimizer.clip, num_passes=1)
        )  # training checks that it is finite
        self.optimizer.step()


class ForwardBackward:
    """Computes gradients of the mean loss, with products in `dtype`; earlier gradients are dropped.

    If `captured`, it runs as a CUDA graph, which the first call with each shape captures.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, captured: bool = False):
        self._model, self._device, self._dtype, self._captured = model, device, dtype, captured
        self._gradients: Gradients | CapturedGradients | None = None

    def __call__(self, stream: Stream, targets: Tensor) -> None:
        self._model.zero_grad(set_to_none=True)
        batch = Batch(stream, targets, len(targets), len(targets), num_patches=0)
        if isinstance(self._gradients, CapturedGradients) and not self._gradients.fits(batch):
            self._gradients = None  # before the next one is made: there may be no memory for both
        if self._gradients is None:
            self._gradients = (
                CapturedGradients(self._model.parameters(), self._loss, self._device)
                if self._captured
                else Gradients(self._loss, self._device)
            )
        self._gradients(batch, len(targets))

    def forget_shapes(self) -> None:
        """As `SyntheticTraining.forget_shapes`."""
        self._model.zero_grad(set_to_none=True)
        self._gradients = None
        torch._dynamo.reset()

    def _loss(self, batch: Batch) -> Tensor:
        with autocast(self._device, self._dtype):
            return cross_entropy(self._model, batch)


def random_batch(size: int, device: torch.device, patched: bool = True, seed: int = 0) -> tuple[Stream, Tensor]:
    """A stream of `size` random ids, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 260, [size], generator=generator)
    stream = pack_rows(list(ids.split(DOCUMENT)))
    targets = torch.randint(4, 260, [size], generator=generator)
    if patched:
        starts = torch.rand(size, generator=generator) < 1 / PATCH_BYTES
        slots = -(-add_patches(stream, starts).num_patches // SLOTS) * SLOTS
        stream = add_patches(stream, starts, slots)
    return stream.to(device), targets.to(device)


def num_patches(stream: Stream) -> int | None:
    """Patches that hold bytes; None for a stream without patches."""
    return int((stream.patch_document >= 0).sum()) if isinstance(stream, PatchedStream) else None


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(
    work: Callable[[], Any], device: torch.device, times: int = 10, warm: int = 3, limit: float = 20.0
) -> float:
    """Seconds per call: the mean of `times` calls, or of at least two if they would take over `limit` seconds."""
    last = limit
    for _ in range(warm):
        began = time.perf_counter()
        work()
        wait_for(device)
        last = time.perf_counter() - began
    times = max(2, min(times, int(limit / last)))
    began = time.perf_counter()
    for _ in range(times):
        work()
    wait_for(device)
    return (time.perf_counter() - began) / times


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product: 8192 cubed, or 1024 on a CPU."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    return 2 * size**3 / seconds_of(lambda: a @ b, device, 20, limit=2.0)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy of 1 GB (on a CPU 0.25 GB) reads and writes."""
    source = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, 20, limit=2.0)


@dataclass(frozen=True)
class Kernel:
    """A kernel of a device, or on a CPU an operation without those that it calls."""

    name: str
    seconds: float  # per call of the work
    count: float

    @property
    def kind(self) -> str:
        return next((kind for kind, pattern in KINDS.items() if re.search(pattern, self.name)), REST)


def kernels_of(work: Callable[[], Any], device: torch.device, times: int = PROFILED_CALLS) -> list[Kernel]:
    """The kernels of some work, the longest first; none if torch has no profiler for the device."""
    from torch.profiler import ProfilerActivity, profile

    activities = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}
    if device.type not in activities:
        return []
    with profile(activities=[activities[device.type]]) as profiler:
        for _ in range(times):
            work()
        wait_for(device)
    spent = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = [Kernel(row.key, getattr(row, spent) / 1e6 / times, row.count / times) for row in profiler.key_averages()]
    return sorted((row for row in rows if row.seconds > 0), key=lambda row: -row.seconds)


def by_kind(kernels: list[Kernel], absent: Collection[str] = ()) -> dict[str, float]:
    """Seconds of each kind, in the order of `KINDS`, and of the rest.

    Args:
        absent: kinds of which the model has no part; kernels that match them count as the rest.
    """
    seconds = {kind: 0.0 for kind in (*KINDS, REST) if kind not in absent}
    for kernel in kernels:
        seconds[REST if kernel.kind in absent else kernel.kind] += kernel.seconds
    return seconds
