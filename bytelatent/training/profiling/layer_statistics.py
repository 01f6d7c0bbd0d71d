"""Statistics of a model's layers as it trains: how large weights, gradients, updates and activations are."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bytelatent.data import Batch
from bytelatent.kernels.rotary import rotate
from bytelatent.model import Block, CrossAttention, PatchedStream, Stream
from bytelatent.model.attention import DenseMask, head_dim_of
from bytelatent.model.block import Attention, Stack
from bytelatent.training.distributed.fsdp import free_gathered_weights, full_tensor, local_part

# Shapes: T positions in the stream, D width, H heads, J key/value heads, E head size

SAMPLE = 1024  # ids, at most, on which activations and attention are computed


class LayerStatistics:
    """Computes statistics at some steps; the results of training stay the same bit for bit.

    A layer is a block, a cross-attention, or a module with weights outside of these. Each has `weight_norms` before the
    step, `gradient_norms` after clipping, and `update_norms` of the change by the optimizer. Blocks and
    cross-attentions also have `activation_rms`, the root mean square of their outputs, and blocks
    `attention_entropies`: the entropy of attention in nats, averaged over heads and positions. These two come from an
    additional forward pass on the first ids of one batch.

    Args:
        model: the model in training.
        every: steps between statistics; None: never.
        loss: the loss of a batch, as training computes it.
    """

    def __init__(self, model: nn.Module, every: int | None, loss: Callable[[Batch], Tensor]):
        self._model, self._every, self._loss = model, every, loss
        self._row: dict[str, Any] | None = None
        self._layers = weights_by_layer(model)

    def take(self, step: int, bytes_seen: int) -> dict[str, Any] | None:
        """The row of the last step, the first time it is asked for; None if it has no statistics."""
        row, self._row = self._row, None
        return row and {"step": step, "bytes_seen": bytes_seen, "kind": "statistics", **row}

    @contextmanager
    def around_update(self, step: int, batch: Batch) -> Iterator[None]:
        """A context for the optimizer's step.

        Args:
            step: its number, from 1.
            batch: one of the step's batches.
        """
        if self._every is None or step % self._every:
            yield
            return
        row: dict[str, Any] = {
            "weight_norms": self._norms(lambda parameter: parameter.detach()),
            "gradient_norms": self._norms(lambda parameter: parameter.grad),
            **self._activations(batch),
        }
        # On the CPU: the device may have no memory for a second model.
        before = {p: local_part(p.detach()).to("cpu", copy=True) for p in self._model.parameters()}
        yield
        row["update_norms"] = self._norms(lambda parameter: _change(parameter, before[parameter]))
        self._row = row

    def _norms(self, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, float]:
        return {name: _norm([of(parameter) for parameter in own]) for name, own in self._layers.items()}

    @torch.no_grad()
    def _activations(self, batch: Batch) -> dict[str, dict[str, float]]:
        """Statistics of activations and attention on the first ids of a batch."""
        activations: dict[str, float] = {}
        entropies: dict[str, float] = {}
        hooks = []
        for name, part in self._model.named_modules():
            if isinstance(part, Block | CrossAttention):
                hooks.append(part.register_forward_hook(_record_rms(_short(name), activations)))
            elif isinstance(part, Attention):
                hooks.append(part.register_forward_hook(_record_entropy(_short(name.rpartition(".")[0]), entropies)))
        # At most two windows, so that each mask is one matrix.
        windows = [part.settings.window for part in self._model.modules() if isinstance(part, Stack)]
        size = min(SAMPLE, batch.num_targets, *(2 * window for window in windows if window is not None))
        sample = replace(batch, stream=first_ids(batch.stream, size), targets=batch.targets[:size])
        try:
            with torch.compiler.set_stance("force_eager"):  # compiled code does not call these hooks
                self._loss(sample.to(next(self._model.parameters()).device))
        finally:
            for hook in hooks:
                hook.remove()
            free_gathered_weights(self._model)
        return {"activation_rms": activations, "attention_entropies": entropies}


def weights_by_layer(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The weights of each layer, by the layer's name, in the model's order."""
    layers = {name for name, part in model.named_modules() if isinstance(part, Block | CrossAttention)}
    found: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        layer = next((layer for layer in layers if owner.startswith(layer + ".")), owner)
        found[_short(layer)].append(parameter)
    return dict(found)


def first_ids(stream: Stream, size: int) -> Stream:
    """The first `size` ids of a stream, and their patches."""
    ends = {"patch_document": 0, "patch_position": 0}
    if isinstance(stream, PatchedStream):
        ends = dict.fromkeys(ends, int(stream.patch[size - 1]) + 1)
    return replace(stream, **{name: tensor[: ends.get(name, size)] for name, tensor in stream.tensors.items()})


def attention_entropy(q_THE: Tensor, k_TJE: Tensor, allowed_TT: Tensor) -> Tensor:
    """The entropy in nats of each position's attention, per head: [H, T]. Queries and keys are rotated already."""
    k_THE = k_TJE.float().repeat_interleave(q_THE.shape[1] // k_TJE.shape[1], dim=1)
    scores_HTT = torch.einsum("qhe,khe->hqk", q_THE.float(), k_THE) * q_THE.shape[-1] ** -0.5
    log_HTT = scores_HTT.masked_fill(~allowed_TT, -torch.inf).log_softmax(-1)
    return torch.special.entr(log_HTT.exp()).sum(-1)


def _record_rms(name: str, found: dict[str, float]) -> Callable[..., None]:
    def record(_part: nn.Module, _inputs: Any, out: Tensor) -> None:
        found[name] = float(out.float().square().mean().sqrt())

    return record


def _record_entropy(name: str, found: dict[str, float]) -> Callable[..., None]:
    def record(part: nn.Module, inputs: tuple[Tensor, Tensor, Any], _out: Tensor) -> None:
        assert isinstance(part, Attention)
        x_TD, rotary_TE2, mask = inputs
        assert isinstance(mask, DenseMask)
        heads = (-1, head_dim_of(rotary_TE2))
        q_THE, k_TJE = (rotate(matrix(x_TD).unflatten(-1, heads), rotary_TE2) for matrix in (part.query, part.key))
        found[name] = float(attention_entropy(q_THE, k_TJE, mask.allowed_TT).mean())

    return record


def _norm(tensors: list[Tensor | None]) -> float:
    """The norm of some tensors, as of one vector."""
    total = 0.0
    for tensor in tensors:
        if tensor is not None:
            values: Any = tensor.coalesce().values() if tensor.is_sparse else tensor
            total += float(full_tensor(torch.linalg.vector_norm(values, dtype=torch.float32))) ** 2
    return total**0.5


def _change(parameter: nn.Parameter, before: Tensor) -> Tensor:
    """The difference of a weight to the part of it that this rank held before."""
    weight = parameter.detach()
    own = local_part(weight)
    change = own - before.to(own.device)
    if not isinstance(weight, DTensor):
        return change
    return DTensor.from_local(change, weight.device_mesh, weight.placements, run_check=False)


def _short(name: str) -> str:
    """`encoder.stack.blocks.0` is `encoder.blocks.0`."""
    return name.replace("stack.", "")
