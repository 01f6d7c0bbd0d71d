"""One plan for any number of ranks: which rank computes what, and where each weight lies. Model files know nothing of
it.

The ranks form a mesh: replicate x shard x tensor. Ranks of one tensor group read the same batch and divide the
matrices of the global transformer; all others read batches of their own. FSDP divides weights and the optimizer's state
among the shard ranks and gathers some blocks at a time as they compute; each replica holds all of them. The local
models are the same in a tensor group, so FSDP divides them among its ranks, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import bytelatent.kernels.packed_attention  # noqa: F401 it defines the operator
from bytelatent.device import free_memory, is_out_of_memory
from bytelatent.errors import UserError
from bytelatent.model import Block, BLTModel, BLTSettings, CrossAttention, ModelSettings, build, compile_regions
from bytelatent.model.block import init_weights
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.training.distributed import fsdp
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.distributed.settings import ActivationCheckpointing, ParallelSettings
from bytelatent.training.distributed.sharded_tables import shard_tables
from bytelatent.training.float8 import Float8, to_float8

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


def check_parallel(settings: ParallelSettings, model: ModelSettings, world_size: int) -> None:
    """Check, before anything is opened, that the processes can divide the work.

    Raises:
        UserError: the number of processes or a size of the model is not divisible.
    """
    tensor = settings.tensor
    if tensor > 1:
        _check_tensor_parallel(model, tensor)
    if world_size % tensor:
        raise UserError(
            f"parallel.tensor: {world_size} processes are no multiple of {tensor}; start another number of them"
        )
    data = world_size // tensor
    if world_size > 1 and settings.data == "hybrid" and data % (settings.replicas or 1):
        raise UserError(
            f"parallel.replicas: {data} processes{' beside those of parallel.tensor' if tensor > 1 else ''} are no "
            f"multiple of {settings.replicas}; start another number of them"
        )


def _check_tensor_parallel(model: ModelSettings, tensor: int) -> None:
    if not isinstance(model, BLTSettings):
        raise UserError("parallel.tensor divides the global transformer, and a byte LM has none; leave it out")
    middle = model.global_transformer
    sizes = {"num_heads": middle.num_heads, "num_kv_heads": middle.kv_heads, "feed-forward width": middle.hidden_dim}
    for name, size in sizes.items():
        if size % tensor:
            raise UserError(
                f"parallel.tensor: the global transformer's {name} {size} is no multiple of {tensor}; take a divisor"
            )


def make_plan(settings: ParallelSettings, model: ModelSettings, ranks: Ranks, device: torch.device) -> ParallelPlan:
    """Arrange the ranks in meshes.

    Raises:
        UserError: as `check_parallel`.
    """
    tensor, world_size = settings.tensor, ranks.world_size
    check_parallel(settings, model, world_size)
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
) -> nn.Module:
    """The model, spread over the ranks as the plan says, with uninitialized weights: see `initialize_weights`.

    In this order: 8-bit floats, sharded tables, tensor parallelism, activation checkpointing, compilation, FSDP.

    Raises:
        UserError: there is not enough memory.
    """
    with torch.device("meta"):
        model = build(settings)
    to_float8(model, float8)
    global_blocks: list[Any] = list(model.global_transformer.stack.blocks) if isinstance(model, BLTModel) else []
    sharded_tables: list[nn.Parameter] = []
    if plan.mesh is not None:
        if plan.settings.tables == "rows":
            for part in model.modules():
                if isinstance(part, NgramHashEmbedding):
                    sharded_tables.append(shard_tables(part, plan.mesh.device_type, plan.ranks.world_size))
        if plan.settings.tensor > 1:
            for block in global_blocks:
                fsdp.apply_tensor_parallelism(block, plan.mesh["tensor"])
    apply_activation_checkpointing(model, plan.settings.activation_checkpointing)
    if compiled:
        compile_regions(model)
    if plan.mesh is not None and plan.local_mesh is not None:
        reduce_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[plan.settings.reduce_dtype]
        for group in fsdp.fsdp_groups(model):
            mesh = plan.mesh["replicate", "shard"] if group[0] in global_blocks else plan.local_mesh
            # Under autocast, products would cast the weights anyway: they are gathered in that precision.
            fsdp.apply_fsdp(group, mesh, dtype, reduce_dtype)
        fsdp.apply_fsdp([model], plan.local_mesh, None, reduce_dtype, ignored=sharded_tables)
    return _allocate(model, device, plan)


def _allocate(model: nn.Module, device: torch.device, plan: ParallelPlan) -> nn.Module:
    """The model with memory for its weights.

    Raises:
        UserError: there is not enough.
    """
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    line = f"model: its weights alone take {needed / 1e9:,.1f} GB"
    free = free_memory() if device.type == "cpu" and plan.mesh is None else None
    if free is not None and needed > free:  # Linux overcommits, and would kill the process on the first write
        raise UserError(f"{line}, and {free / 1e9:,.1f} GB are free; take a smaller one")
    try:
        return model.to_empty(device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{line}, more than this device has left; take a smaller one, or more processes") from None


@torch.no_grad()
def initialize_weights(model: nn.Module, settings: ModelSettings) -> None:
    """Draw the initial weights one after the other, as a single process does; each rank keeps its own part of each."""
    with torch.device("meta"):
        whole = build(settings)
    targets = dict(model.named_parameters())
    for prefix, part in whole.named_modules():
        names = [name for name, _ in part.named_parameters(recurse=False)]
        if names:
            part.to_empty(device="cpu", recurse=False)
            init_weights(part)
            for name in names:
                fsdp.copy_local_part(targets[f"{prefix}.{name}"], part.get_parameter(name))
            part.to_empty(device="meta", recurse=False)


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
