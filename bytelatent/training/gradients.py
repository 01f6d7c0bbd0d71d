"""The gradients of a batch, and clipping by their norm.

The host launches each kernel, or replays all of them as one CUDA graph. A forward and a backward pass of the 1B model
are some thousand kernels; with a small batch the device ends one before the host has launched the next.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bytelatent.data import Batch
from bytelatent.errors import UserError
from bytelatent.kernels.packed_attention import entries_for
from bytelatent.kernels.row_adamw import as_summed, sum_entries

WARM_UPS = 2  # passes before capture: the first compiles, the second adds to gradients where that is wanted


@dataclass(frozen=True)
class Gradients:
    """Computes a batch's gradients and, as `backward` does, adds them to those that are there."""

    loss: Callable[[Batch], Tensor]  # summed nats
    device: torch.device

    def __call__(self, batch: Batch, divisor: float) -> Tensor:
        """The gradients are those of the loss over `divisor`. Returns the loss itself, without a graph."""
        nats = self.loss(batch.to(self.device))
        (nats / divisor).backward()
        return nats.detach()


class CapturedGradients:
    """The same, captured once on CUDA and replayed, for batches of one shape: the first one's.

    What a graph reads and writes lies where it lay as it was captured. So batches are copied to one place, weights must
    be changed in place, and the gradients have one place, too, which they keep from step to step: a replay overwrites
    it, or with `adds` adds to it, by whether the weights' `grad` are None. So clear them by `zero_grad`, to None. A
    batch of more documents than attention was captured for is captured again: for as many as the next power of two.

    Args:
        parameters: all that get gradients.
        loss: runs without asking the device for anything; no gradient of it may be sparse where one is added to.
        adds: batches come several a step, so that another graph is captured, too, that adds to gradients.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        loss: Callable[[Batch], Tensor],
        device: torch.device,
        adds: bool = False,
    ):
        self._parameters, self._loss, self._device, self._adds = list(parameters), loss, device, adds
        self._batch: Batch | None = None
        self._share = torch.zeros((), device=device)  # one over the divisor
        self._graphs: dict[bool, tuple[Any, Tensor]] = {}  # by whether it adds: the graph, and where it puts the loss
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []

    def __call__(self, batch: Batch, divisor: float) -> Tensor:
        """As `Gradients`.

        Raises:
            UserError: the batch has another shape than the first one.
        """
        if self._batch is None:
            self._capture(batch)
        else:
            self._put(batch)
            if not _holds(self._batch.stream.num_documents, batch.stream.num_documents):
                self._capture_again(batch)
        adds = any(parameter.grad is not None for parameter in self._parameters)
        assert adds in self._graphs, "there are gradients already, and no graph was captured that adds to them"
        if adds:
            assert all(parameter.grad is gradient for parameter, gradient in self._gradients), "gradients were replaced"
        self._share.fill_(1 / divisor)
        graph, nats = self._graphs[adds]
        graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return nats.clone()

    def fits(self, batch: Batch) -> bool:
        """Whether it can be replayed for the batch."""
        return self._batch is None or _misfit(self._batch, batch) is None

    def _put(self, batch: Batch) -> None:
        assert self._batch is not None
        if (misfit := _misfit(self._batch, batch)) is not None:
            raise UserError(
                f"cuda_graph: {misfit}; shapes must not change: set data.batch_patches, or cuda_graph=false"
            )
        given = _tensors(batch)
        for name, place in _tensors(self._batch).items():
            place.copy_(given[name], non_blocking=True)

    def _run(self) -> Tensor:
        assert self._batch is not None
        nats = self._loss(self._batch)
        nats.backward(self._share.to(nats.dtype))
        return nats.detach()

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _capture_again(self, batch: Batch) -> None:
        """Gradients that are there move to where they are then."""
        if self._device.type == "cuda":
            # A replay, or an optimizer that reads gradients, may still be running. What it uses is freed below, and
            # the other streams that then get the memory do not wait for it.
            torch.cuda.synchronize(self._device)
        earlier = {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}
        self._clear()
        self._graphs, self._gradients = {}, []  # before there are others: there may be no room for both
        self._capture(batch)
        for parameter, gradient in self._gradients:
            if parameter in earlier:
                parameter.grad = gradient.copy_(earlier[parameter])

    def _capture(self, batch: Batch) -> None:
        """Make the graphs; no gradients are left."""
        assert all(parameter.grad is None for parameter in self._parameters), "there are gradients already"
        self._batch = _copied(batch, self._device)
        gc.collect()  # what autograd still holds of an earlier pass would add gradients on that pass's stream
        with capturing(self._device) as captured:
            for _ in range(WARM_UPS):
                if not self._adds:
                    self._clear()
                self._run()
            self._clear()
            self._graphs[False] = captured(self._run)
            self._gradients = [(p, p.grad) for p in self._parameters if p.grad is not None]
            if self._adds:
                self._graphs[True] = captured(self._run)
                assert all(p.grad is gradient for p, gradient in self._gradients), "a gradient is not added to in place"
        self._clear()


@contextmanager
def capturing(device: torch.device) -> Iterator[Callable[[Callable[[], Tensor]], tuple[Any, Tensor]]]:
    """Work on a stream of its own, on which the function that is given captures a piece of work as a graph.

    It returns the graph and where that puts the work's result. All graphs share their memory.
    """
    pool = None

    def captured(work: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        nonlocal pool
        graph = torch.cuda.CUDAGraph()
        # Other threads may continue with work of their own. This also gives free memory back: graphs have their own.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = work()
        pool = graph.pool()
        return graph, result

    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield captured
        torch.cuda.current_stream().wait_stream(stream)


def _copied(batch: Batch, device: torch.device) -> Batch:
    """A copy that counts as many documents as attention has entries for then."""
    number = batch.stream.num_documents
    bound = None if number is None else entries_for(number) - 1
    copies = {name: value.to(device, copy=True) for name, value in _tensors(batch).items()}
    targets = copies.pop("targets")
    return replace(batch, stream=replace(batch.stream, **copies, num_documents=bound), targets=targets)


def _holds(bound: int | None, number: int | None) -> bool:
    """Whether what was captured for at most `bound` documents is right for these; None: for any, or not known."""
    return bound is None or (number is not None and number <= bound)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {**batch.stream.tensors, "targets": batch.targets}


def _misfit(one: Batch, other: Batch) -> str | None:
    """In what the shapes of two batches differ."""
    given = _tensors(other)
    for name, place in _tensors(one).items():
        if place.shape != given[name].shape:
            return f"'{name}' of a batch has shape {list(given[name].shape)}, and of the first {list(place.shape)}"
    return None


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], max_norm: float, num_passes: int | None = None) -> Tensor:
    """Scale all gradients alike so that their norm, as of one vector, is at most `max_norm`.

    A sparse gradient's norm is that of the dense one it stands for: entries that share a place are added first. Of a
    weight in parts it has the entries of the part that is here.
    Gradients in parts count once each, whatever ranks the parts are on and however often each is repeated.

    Args:
        num_passes: backward passes that the gradients are of; None: not known. One alone has added entries already.

    Returns:
        The norm before, the same on all ranks.
    """
    alike: dict[Any, list[Tensor]] = {}  # what is here of gradients that are spread in the same way
    for parameter in parameters:
        grad: Any = parameter.grad
        if grad is None:
            continue
        if hasattr(grad, "placements"):  # a DTensor; their module takes seconds to import
            alike.setdefault((grad.device_mesh, grad.placements), []).append(grad.to_local())
        elif grad.is_sparse:
            parameter.grad = grad = as_summed(grad) if num_passes == 1 else sum_entries(grad)
            weight: Any = parameter
            spread = (weight.device_mesh, weight.placements) if hasattr(weight, "placements") else None
            alike.setdefault(spread, []).append(grad._values())
        else:
            alike.setdefault(None, []).append(grad)
    norms = [_norm_of(parts, spread) for spread, parts in alike.items()]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parts in alike.values():
        torch._foreach_mul_(parts, factor)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def _norm_of(parts: list[Tensor], spread: Any) -> Tensor:
    norm = nn.utils.get_total_norm(parts)
    if spread is None:
        return norm
    mesh, placements = spread
    square = norm.square()
    for dim, placement in enumerate(placements):
        assert not placement.is_partial()
        if not placement.is_replicate() and mesh.size(dim) > 1:
            dist.all_reduce(square, group=mesh.get_group(dim))
    return square.sqrt()
