"""What a run measures of its steps: traces by torch's profiler, snapshots of the memory, and statistics of layers.

Statistics show how large weights, gradients, updates and activations are.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bytelatent.data import Batch
from bytelatent.errors import UserError, in_one_line
from bytelatent.files import whole_folder
from bytelatent.model import Block, CrossAttention, PatchedStream, Stream
from bytelatent.model.attention import DenseMask
from bytelatent.model.block import Attention, Stack
from bytelatent.training.distributed.parallelize import free_gathered_weights, full_tensor, local_part
from bytelatent.training.settings import ProfileSettings

LOGGER = logging.getLogger(__name__)

# Shapes: T positions in the stream, D width, H heads, J key/value heads, E head size

MAX_EVENTS = 200_000  # the last allocations and frees that a memory snapshot holds
TABLE_ROWS = 60
SAMPLE = 1024  # ids, at most, on which activations and attention are computed


class Profiler:
    """Traces some steps from a given one on, or those that follow when the file `RUN/profile` appears.

    A trace is a folder `RUN/profiles/step-N` that appears whole or not at all, with `trace.json.gz`, `operations.txt`,
    and with `memory` on CUDA `memory.pickle`. If tracing fails, it logs a warning and training continues.
    """

    def __init__(self, run: Path, settings: ProfileSettings, device: torch.device):
        self._request, self._folder = run / "profile", run / "profiles"
        self._settings, self._device = settings, device
        self._snapshot = settings.memory and device.type == "cuda"
        self._trace: torch.profiler.profile | None = None
        self._first = self._last = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._trace is not None:  # the run is over or failed, which a trace may explain
            self._write(self._trace)

    def before(self, step: int) -> None:
        """Call before each step, counted from 1: here traces begin and end."""
        if self._trace is not None and step > self._last:
            self._write(self._trace)
        if self._trace is None and (step == self._settings.from_step or self._request.is_file()):
            self._first, self._last = step, step + self._settings.steps - 1
            try:
                self._begin()
            except RuntimeError as error:  # another profiler runs
                self._fail(error)

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        if self._snapshot:
            torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
        trace = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=self._settings.memory)
        trace.start()
        self._trace = trace

    def _write(self, trace: torch.profiler.profile) -> None:
        self._trace = None
        folder = self._folder / f"step-{self._first:08d}"
        try:
            trace.stop()
            where = "cuda" if self._device.type == "cuda" else "cpu"
            table = trace.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=TABLE_ROWS)
            with whole_folder(folder) as aside:
                trace.export_chrome_trace(str(aside / "trace.json.gz"))
                (aside / "operations.txt").write_text(table, encoding="utf-8")
                if self._snapshot:
                    torch.cuda.memory._dump_snapshot(str(aside / "memory.pickle"))
            LOGGER.info(f"a trace from step {self._first} on is in '{folder}'")
        except (UserError, OSError, RuntimeError) as error:
            self._fail(error)
        else:
            self._end()

    def _fail(self, error: Exception) -> None:
        LOGGER.warning(f"no trace of step {self._first}: {in_one_line(error)}")
        self._end()

    def _end(self) -> None:
        if self._snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)
        with suppress(OSError):
            self._request.unlink()


@contextmanager
def layer_statistics(model: nn.Module, loss: Callable[[Batch], Tensor], batch: Batch) -> Iterator[dict[str, Any]]:
    """A context for the optimizer's step, whose results stay the same bit for bit; its row is filled when it ends.

    A layer is a block, a cross-attention, or a module with weights outside of these. Each has `weight_norms` before the
    step, `gradient_norms` after clipping, and `update_norms` of the change by the optimizer. Blocks and
    cross-attentions also have `activation_rms`, the root mean square of their outputs, and blocks
    `attention_entropies`: the entropy of attention in nats, averaged over heads and positions. These two come from an
    additional forward pass on the first ids of `batch`, one of the step's.
    """
    layers = weights_by_layer(model)

    def norms(of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, float]:
        return {name: _norm([of(parameter) for parameter in own]) for name, own in layers.items()}

    row: dict[str, Any] = {
        "weight_norms": norms(lambda parameter: parameter.detach()),
        "gradient_norms": norms(_gradient),
        **_activations(model, loss, batch),
    }
    # On the CPU: the device may have no memory for a second model.
    before = {p: local_part(p.detach()).to("cpu", copy=True) for p in model.parameters()}
    yield row
    row["update_norms"] = norms(lambda parameter: _change(parameter, before[parameter]))


@torch.no_grad()
def _activations(model: nn.Module, loss: Callable[[Batch], Tensor], batch: Batch) -> dict[str, dict[str, float]]:
    """Statistics of activations and attention on the first ids of a batch."""
    activations: dict[str, float] = {}
    entropies: dict[str, float] = {}
    hooks = []
    for name, part in model.named_modules():
        if isinstance(part, Block | CrossAttention):
            hooks.append(part.register_forward_hook(_record_rms(_short(name), activations)))
        elif isinstance(part, Attention):
            hooks.append(part.register_forward_hook(_record_entropy(_short(name.rpartition(".")[0]), entropies)))
    # At most two windows, so that each mask is one matrix.
    windows = [part.settings.window for part in model.modules() if isinstance(part, Stack)]
    size = min(SAMPLE, batch.num_ids, *(2 * window for window in windows if window is not None))
    sample = replace(batch, stream=first_ids(batch.stream, size), targets=batch.targets[:size])
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not call these hooks
            loss(sample.to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
        free_gathered_weights(model)
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
        q_THE, k_TJE = part.queries_keys(x_TD, rotary_TE2)
        found[name] = float(attention_entropy(q_THE, k_TJE, mask.allowed_TT).mean())

    return record


def _norm(tensors: list[Tensor | None]) -> float:
    """The norm of some tensors, as of one vector."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors if tensor is not None]
    return sum(float(full_tensor(norm)) ** 2 for norm in norms) ** 0.5


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient of a weight; of a sparse one the entries."""
    grad: Any = parameter.grad
    if grad is None or not grad.is_sparse:
        return grad
    return _spread_like(parameter.detach(), grad.coalesce().values())


def _change(parameter: nn.Parameter, before: Tensor) -> Tensor:
    """The difference of a weight to the part of it that this rank held before."""
    weight = parameter.detach()
    own = local_part(weight)
    return _spread_like(weight, own - before.to(own.device))


def _spread_like(weight: Tensor, part: Tensor) -> Tensor:
    """What this rank has of something that is spread over ranks as a weight is; for its norm."""
    if not isinstance(weight, DTensor):
        return part
    return DTensor.from_local(part, weight.device_mesh, weight.placements, run_check=False)


def _short(name: str) -> str:
    """`encoder.stack.blocks.0` is `encoder.blocks.0`."""
    return name.replace("stack.", "")
