"""How fast a model trains on this machine: random text, the trainer's own parts, and clocks.

Documents of 8,192 random bytes in random patches of 4.5 bytes on average.
"""

import time
from collections.abc import Callable
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
    build,
    compile_regions,
    pack_rows,
)
from bytelatent.model.loss import cross_entropy
from bytelatent.training.clipping import clip
from bytelatent.training.distributed.plan import apply_activation_checkpointing
from bytelatent.training.distributed.settings import ActivationCheckpointing
from bytelatent.training.float8 import Float8, to_float8
from bytelatent.training.gradients import CapturedGradients, Gradients
from bytelatent.training.optimizer import build_optimizer
from bytelatent.training.settings import OptimizerSettings

DOCUMENT, PATCH_BYTES = 8192, 4.5
SLOTS = 128  # patch slots come in multiples of so many


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained."""

    model: ModelSettings
    device: torch.device
    dtype: torch.dtype  # of products; weights are float32
    compiled: bool = False
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    float8: Float8 | None = None
    checkpointing: ActivationCheckpointing = "none"
    captured: bool = False  # forward and backward pass are a CUDA graph


class SyntheticTraining:
    """A model in training, with random weights; the optimizer's state is in memory, as after a first step."""

    def __init__(self, plan: TrainingSetup):
        self.plan = plan
        torch.manual_seed(0)
        with plan.device:
            self.model = build(plan.model)
        to_float8(self.model, plan.float8)
        self.optimizer = build_optimizer(self.model, plan.optimizer)
        self._work = ForwardBackward(self.model, plan.device, plan.dtype)
        self.step(*random_batch(256, plan.device, isinstance(plan.model, BLTSettings)))
        apply_activation_checkpointing(self.model, plan.checkpointing)
        if plan.compiled:
            compile_regions(self.model)
        self._work = ForwardBackward(self.model, plan.device, plan.dtype, plan.captured)

    def forward_backward(self, stream: Stream, targets: Tensor) -> None:
        self._work(stream, targets)

    def forget_shapes(self) -> None:
        """Compile, and capture, anew: each size for itself."""
        self._work.forget_shapes()

    def step(self, stream: Stream, targets: Tensor) -> None:
        """A whole step, as the training loop takes it."""
        self.forward_backward(stream, targets)
        float(clip(self.model.parameters(), self.plan.optimizer.clip))  # the loop looks whether it is finite
        self.optimizer.step()


class ForwardBackward:
    """Computes gradients of the mean loss, in place of earlier ones.

    Args:
        dtype: of products; float32 for the weights' own.
        captured: as a CUDA graph, captured by the first call of each shape.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, captured: bool = False):
        self._model, self._device, self._dtype, self._captured = model, device, dtype, captured
        self._gradients: Gradients | CapturedGradients | None = None

    def __call__(self, stream: Stream, targets: Tensor) -> None:
        self._model.zero_grad(set_to_none=True)
        batch = Batch(stream, targets, len(targets), len(targets), num_patches=0)
        if isinstance(self._gradients, CapturedGradients) and not self._gradients.fits(batch):
            self._gradients = None  # before the next one is made: there may be no room for both
        if self._gradients is None:
            self._gradients = (
                CapturedGradients(self._model.parameters(), self._loss, self._device)
                if self._captured
                else Gradients(self._loss, self._device)
            )
        self._gradients(batch, len(targets))

    def forget_shapes(self) -> None:
        """Compile, and capture, anew: each size for itself."""
        self._model.zero_grad(set_to_none=True)
        self._gradients = None
        torch._dynamo.reset()

    def _loss(self, batch: Batch) -> Tensor:
        with autocast(self._device, self._dtype):
            return cross_entropy(self._model, batch)


def random_batch(size: int, device: torch.device, patched: bool = True, seed: int = 0) -> tuple[Stream, Tensor]:
    """A stream of `size` ids, and their targets."""
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
    """Patches that hold bytes; None in a stream that is not cut into any."""
    return int((stream.patch_document >= 0).sum()) if isinstance(stream, PatchedStream) else None


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(
    work: Callable[[], Any], device: torch.device, times: int = 10, warm: int = 3, limit: float = 20.0
) -> float:
    """Seconds of one call, the mean of `times`; of fewer, two at least, where they would take longer than `limit`."""
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
    """Bytes a second that a copy reads and writes, of a gigabyte, or a quarter of one on a CPU."""
    source = torch.ones(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, 20, limit=2.0)
