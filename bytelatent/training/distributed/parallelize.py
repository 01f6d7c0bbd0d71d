"""One plan for any number of ranks: which rank computes what, and where each weight lies. Model files know nothing of
it.

The ranks form a mesh: replicate x shard x tensor. Ranks of one tensor group read the same batch and divide the
matrices of the global transformer; all others read batches of their own. FSDP divides weights and the optimizer's state
among the shard ranks and gathers some blocks at a time as they compute; each replica holds all of them. The local
models are the same in a tensor group, so FSDP divides them among its ranks, too.
Hash tables are row-sharded: `sharded_tables.py`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.filesize import decimal
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import bytelatent.kernels.packed_attention  # noqa: F401 it defines the operator
from bytelatent.device import free_memory, is_out_of_memory
from bytelatent.errors import UserError
from bytelatent.model import Block, BLTModel, CrossAttention, ModelSettings, build_model, compile_regions
from bytelatent.model.block import init_weights
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.training.distributed.float8 import to_float8
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.distributed.settings import ActivationCheckpointing, Float8, ParallelSettings
from bytelatent.training.distributed.sharded_tables import fill_from_first, is_row_sharded, shard_tables, table_on_first

GROUP_WEIGHTS = 2**28  # half a gigabyte in bfloat16; two groups are gathered at a time
# Results that selective checkpointing saves: of matrix products and attention. The rest is cheap to recompute.
SAVED = [
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.bytelatent.packed_attention.default,
]


@dataclass(frozen=True)
class ParallelPlan:
    """The part of this rank. The default is that of a single process."""

    settings: ParallelSettings = field(default_factory=ParallelSettings)
    ranks: Ranks = field(default_factory=Ranks)
    mesh: DeviceMesh | None = None  # replicate x shard x tensor
    local_mesh: DeviceMesh | None = None  # of the local models: replicate x shard

    @property
    def data_rank(self) -> int:
        """The number of this rank's batch among the batches of a step."""
        return self.ranks.rank // self.settings.tensor

    @property
    def data_world_size(self) -> int:
        """Batches that are read at the same time."""
        return self.ranks.world_size // self.settings.tensor

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over batches: a tensor group, whose ranks read the same batch, counts once."""
        return [value / self.settings.tensor for value in self.ranks.sum(values)]

    def set_last_backward(self, model: nn.Module, is_last: bool) -> None:
        """Call before each backward pass of a step: replicas reduce gradients only in the last one."""
        if self.local_mesh is not None and self.local_mesh.size(0) > 1:  # it visits every module
            model.set_requires_all_reduce(is_last)  # pyright: ignore[reportCallIssue]


def make_plan(settings: ParallelSettings, ranks: Ranks, device: torch.device) -> ParallelPlan:
    """Arrange the ranks in meshes; call `check_settings` before."""
    tensor, world_size = settings.tensor, ranks.world_size
    if world_size == 1:
        return ParallelPlan(settings, ranks)
    data = world_size // tensor
    replicas = {"replicate": data, "shard": 1, "hybrid": settings.replicas or 1}[settings.data]
    names = ("replicate", "shard", "tensor")
    mesh = init_device_mesh(device.type, (replicas, data // replicas, tensor), mesh_dim_names=names)
    local = (world_size, 1) if settings.data == "replicate" else (replicas, world_size // replicas)
    local_mesh = init_device_mesh(device.type, local, mesh_dim_names=names[:2]) if tensor > 1 else mesh[names[:2]]
    return ParallelPlan(settings, ranks, mesh, local_mesh)


def build_parallel_model(
    settings: ModelSettings,
    plan: ParallelPlan,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    float8: Float8 | None = None,
    is_frozen: Callable[[str], bool] = lambda name: False,
    num_patches: float | None = None,
) -> nn.Module:
    """The model, spread over the ranks as the plan says, with uninitialized weights: see `initialize_weights`.

    In this order: 8-bit floats, sharded tables, tensor parallelism, frozen weights, activation checkpointing,
    compilation, FSDP.

    Args:
        is_frozen: whether a weight, by its name, gets no gradients.
        num_patches: of a batch: by it 8-bit floats are only taken where they gain.

    Raises:
        UserError: there is not enough memory.
    """
    with torch.device("meta"):
        model = build_model(settings)
    to_float8(model, float8, num_patches, plan.settings)
    global_blocks: list[Any] = list(model.global_transformer.stack.blocks) if isinstance(model, BLTModel) else []
    sharded_tables: list[nn.Parameter] = []
    if plan.mesh is not None:
        if plan.settings.tables == "rows":
            for part in model.modules():
                if isinstance(part, NgramHashEmbedding):
                    sharded_tables.append(shard_tables(part, plan.mesh.device_type, plan.ranks.world_size))
        if plan.settings.tensor > 1:
            for block in global_blocks:
                apply_tensor_parallelism(block, plan.mesh["tensor"])
    for name, weight in model.named_parameters():
        weight.requires_grad_(not is_frozen(name))
    apply_activation_checkpointing(model, plan.settings.activation_checkpointing)
    if compiled:
        compile_regions(model)
    if plan.mesh is not None and plan.local_mesh is not None:
        reduce_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[plan.settings.reduce_dtype]
        for group in fsdp_groups(model):
            mesh = plan.mesh["replicate", "shard"] if group[0] in global_blocks else plan.local_mesh
            # Under autocast, products would cast the weights anyway: they are gathered in that precision.
            apply_fsdp(group, mesh, dtype, reduce_dtype, plan.settings.reshard_after_forward)
        apply_fsdp([model], plan.local_mesh, None, reduce_dtype, ignored=sharded_tables)
    return _allocate(model, device, is_alone=plan.mesh is None)


def _allocate(model: nn.Module, device: torch.device, is_alone: bool) -> nn.Module:
    """The model with memory for its weights; a `UserError` if there is not enough."""
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    line = f"model: its weights alone take {decimal(needed)}"
    free = free_memory() if device.type == "cpu" and is_alone else None
    if free is not None and needed > free:  # Linux overcommits, and would kill the process on the first write
        raise UserError(f"{line}, and {decimal(free)} are free; take a smaller one")
    try:
        return model.to_empty(device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{line}, more than this device has left; take a smaller one, or more processes") from None


@torch.no_grad()
def initialize_weights(model: nn.Module, settings: ModelSettings) -> None:
    """Draw the initial weights one after the other, as a single process does; each rank keeps its own part of each.

    Each rank draws all of them, but for row-sharded tables.
    """
    with torch.device("meta"):
        whole = build_model(settings)
    targets = dict(model.named_parameters())
    for prefix, part in whole.named_modules():
        own = {name: targets[f"{prefix}.{name}"] for name, _ in part.named_parameters(recurse=False)}
        tables = [target for target in own.values() if is_row_sharded(target)]
        if tables:
            _draw_table(part, *tables)
        elif own:
            part.to_empty(device="cpu", recurse=False)
            init_weights(part)
            for name, target in own.items():
                copy_local_part(target, part.get_parameter(name))
        part.to_empty(device="meta", recurse=False)


def _draw_table(part: nn.Module, table: Any) -> None:
    """Draw a row-sharded table on the first rank alone, as there may be no memory for one on each.

    What comes next is drawn as if all ranks had drawn it.
    """
    is_first = dist.get_rank() == 0
    if is_first:
        part.to_empty(device="cpu", recurse=False)
        init_weights(part)
    fill_from_first(table, part.get_parameter("weight") if is_first else None)
    state = torch.get_rng_state().to(table.device)
    dist.broadcast(state, src=0)
    torch.set_rng_state(state.cpu())


def apply_activation_checkpointing(model: nn.Module, how: ActivationCheckpointing) -> None:
    """Recompute blocks and cross-attentions in the backward pass; call it before they are compiled."""
    for part in model.modules():
        if isinstance(part, Block | CrossAttention):
            part.forward = checkpointed(part.forward, how)


def checkpointed(forward: Callable[..., Any], how: ActivationCheckpointing) -> Callable[..., Any]:
    """A forward pass that saves no activations (`full`), or only those of products and attention (`selective`)."""
    if how == "none":
        return forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # models draw no random numbers
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, SAVED)
    return partial(checkpoint, forward, **options)


def apply_tensor_parallelism(block: Block, mesh: DeviceMesh) -> None:
    """Divide the heads and the feed-forward width of a block among the ranks of a tensor group."""
    same = Replicate()
    attention_inputs = (same, None, None)
    of_heads = SequenceParallel(sequence_dim=1, use_local_output=True)  # [T, H, E]
    has_norms = block.attention.has_qk_norm
    norms = {"attention.query_norm": of_heads, "attention.key_norm": of_heads} if has_norms else {}
    parallelize_module(
        block,
        mesh,
        {
            "attention": PrepareModuleInput(input_layouts=attention_inputs, desired_input_layouts=attention_inputs),
            "attention.query": ColwiseParallel(),
            "attention.key": ColwiseParallel(),
            "attention.value": ColwiseParallel(),
            "attention.output": RowwiseParallel(),
            **norms,
            "feed_forward": PrepareModuleInput(input_layouts=(same,), desired_input_layouts=(same,)),
            "feed_forward.gate": ColwiseParallel(),
            "feed_forward.up": ColwiseParallel(),
            "feed_forward.down": RowwiseParallel(),
        },
    )


def fsdp_groups(model: nn.Module) -> list[list[Block | CrossAttention]]:
    """Blocks and cross-attentions in the order in which they compute, in groups whose weights are gathered at once.

    Each collective costs the host more time than a small layer computes. So neighbours of one stack form a group, up to
    `GROUP_WEIGHTS` weights; a larger layer is a group of its own.
    """
    parts = [
        (name.split(".")[0], int(name.rsplit(".", 1)[1]), part)
        for name, part in model.named_modules()
        if isinstance(part, Block | CrossAttention)
    ]
    groups: list[list[Block | CrossAttention]] = []
    for _, stack in groupby(parts, key=lambda part: part[0]):
        room = 0
        for _, _, part in sorted(stack, key=lambda part: part[1]):
            size = sum(weight.numel() for weight in part.parameters())
            if size > room:
                groups.append([])
                room = GROUP_WEIGHTS
            groups[-1].append(part)
            room -= size
    return groups


def apply_fsdp(
    parts: Sequence[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype | None,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool = True,
    ignored: Collection[nn.Parameter] = (),
) -> None:
    """Gather weights as their modules run, and average gradients over the mesh, replicate x shard.

    Args:
        parts: modules whose weights are gathered together.
        dtype: in which the weights are gathered; None: their own.
        reduce_dtype: in which gradients are summed.
        reshard_after_forward: whether gathered weights are freed before the backward pass.
        ignored: weights that FSDP leaves alone.
    """
    for norm in (module for part in parts for module in part.modules()):
        if isinstance(norm, nn.RMSNorm) and dtype is not None and dtype != norm.weight.dtype:
            norm.__class__ = _Float32Norm  # not another `forward`: compiled blocks would differ by it
    policy = MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)
    # Freeing weights of a single shard saves nothing.
    keeps = mesh.size(1) == 1 or not reshard_after_forward
    # A mesh of one replica must have one dimension.
    mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    fully_shard(
        list(parts),
        mesh=mesh,
        reshard_after_forward=False if keeps else None,
        mp_policy=policy,
        ignored_params=set(ignored),
    )


class _Float32Norm(nn.RMSNorm):
    """Autocast computes norms in float32, and a fused norm needs its input and weight in one precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)


def free_gathered_weights(model: nn.Module) -> None:
    """Free the weights that FSDP gathered in forward passes without a backward pass."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local_part(value: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_local_part(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be spread over ranks; nothing is sent."""
    if isinstance(target, DTensor):
        shape, begin = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        value = value[tuple(slice(first, first + size) for first, size in zip(begin, shape, strict=True))]
        target = target.to_local()
    target.copy_(value)


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a tensor that is spread over ranks, on each of them. All ranks of its mesh call it together.

    It is gathered along one dimension of the mesh after the other, FSDP's before that of tensor parallelism, which
    divided it first. DTensor's own `full_tensor` warns where both divide the same dimension of the tensor.
    """
    if not isinstance(value, DTensor):
        return value
    placements = list(value.placements)
    for dim, placement in enumerate(value.placements):
        if not placement.is_replicate():
            placements[dim] = Replicate()
            value = value.redistribute(placements=placements)
    return value.to_local()


def whole_on_first(value: Tensor, is_first: bool) -> Tensor | None:
    """The whole of a tensor on the CPU of the first rank, and None on others. All ranks call it together."""
    if is_row_sharded(value):
        return table_on_first(value)
    value = full_tensor(value)
    return value.cpu() if is_first else None
