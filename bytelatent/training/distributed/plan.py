"""One plan for any number of ranks: who computes what, and where each weight lies. The model files know nothing of it.

Ranks form a block of replicas x shards x tensor. Those of one tensor group read the same batch and divide the matrices
of the global transformer; all others read batches of their own. Weights and the optimizer's state are divided among
`shards` ranks (and the local models', which are the same in a tensor group, among its ranks, too) and gathered some
blocks at a time as they are needed; replicas each hold all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bytelatent.device import free_memory, is_out_of_memory
from bytelatent.errors import UserError
from bytelatent.model import BLTModel, BLTSettings, ModelSettings, build, compile_regions
from bytelatent.model.block import init_weights
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.training.distributed.activation_checkpointing import recompute_regions
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.distributed.settings import ParallelSettings
from bytelatent.training.float8 import Float8, to_float8

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class ParallelPlan:
    """Where this rank stands. The default one is that of a single process."""

    settings: ParallelSettings = field(default_factory=ParallelSettings)
    ranks: Ranks = field(default_factory=Ranks)
    mesh: "DeviceMesh | None" = None  # replicate x shard x tensor
    local_mesh: "DeviceMesh | None" = None  # of the local models: replicate x shard

    @property
    def data_rank(self) -> int:
        """Which of the batches of a step this rank reads."""
        return self.ranks.rank // self.settings.tensor

    @property
    def data_world_size(self) -> int:
        return self.ranks.world_size // self.settings.tensor

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over batches: those of one tensor group, who read the same one, count once."""
        return [value / self.settings.tensor for value in self.ranks.sum(values)]

    def copy_local_part(self, target: Tensor, value: Tensor) -> None:
        """Copy a whole tensor into one of which this rank holds a part."""
        if self.mesh is None:
            target.copy_(value)
        else:
            from bytelatent.training.distributed.fsdp import copy_local_part

            copy_local_part(target, value)

    def whole(self, value: Tensor) -> Tensor | None:
        """All of a tensor of which each rank holds a part, on the first rank's CPU; all of them ask together."""
        full: Any = value.detach()
        if self.mesh is not None:
            from bytelatent.training.distributed import fsdp as sharding

            full = sharding.whole(full)
        return full.cpu() if self.ranks.is_first else None

    def more_to_come(self, model: nn.Module, more: bool) -> None:
        """Say before a backward pass whether another of the same step follows: replicas then need not speak yet."""
        if self.local_mesh is not None and self.local_mesh.size(0) > 1:  # it looks at every module
            model.set_requires_all_reduce(not more)  # pyright: ignore[reportCallIssue]


def local_part(value: Any) -> Tensor:
    """What this rank holds of a tensor."""
    return value.to_local() if hasattr(value, "to_local") else value


def free_gathered_weights(model: nn.Module) -> None:
    """After forward passes without a backward one: weights that FSDP gathered for them are dropped."""
    for part in model.modules():
        if hasattr(part, "reshard"):
            part.reshard()  # pyright: ignore[reportCallIssue]


def check_parallel(settings: ParallelSettings, model: ModelSettings, world: int) -> None:
    """Complain early about what so many processes cannot divide among them.

    Raises:
        UserError: they or the model cannot be divided so.
    """
    tensor = settings.tensor
    if tensor > 1:
        _must_divide(model, tensor)
    if world % tensor:
        raise UserError(f"parallel.tensor: {world} processes are no multiple of {tensor}; start another number of them")
    data = world // tensor
    if world > 1 and settings.data == "hybrid" and data % (settings.replicas or 1):
        raise UserError(
            f"parallel.replicas: {data} processes{' beside those of parallel.tensor' if tensor > 1 else ''} are no "
            f"multiple of {settings.replicas}; start another number of them"
        )


def make_plan(settings: ParallelSettings, model: ModelSettings, ranks: Ranks, device: torch.device) -> ParallelPlan:
    """Divide the ranks.

    Raises:
        UserError: they or the model cannot be divided so.
    """
    tensor, world = settings.tensor, ranks.world_size
    check_parallel(settings, model, world)
    if world == 1:
        return ParallelPlan(settings, ranks)
    data = world // tensor
    replicas = {"replicate": data, "shard": 1, "hybrid": settings.replicas or 1}[settings.data]
    from torch.distributed.device_mesh import init_device_mesh

    names = ("replicate", "shard", "tensor")
    mesh = init_device_mesh(device.type, (replicas, data // replicas, tensor), mesh_dim_names=names)
    local = (world, 1) if settings.data == "replicate" else (replicas, world // replicas)
    local_mesh = init_device_mesh(device.type, local, mesh_dim_names=names[:2]) if tensor > 1 else mesh[names[:2]]
    return ParallelPlan(settings, ranks, mesh, local_mesh)


def build_parallel_model(
    model: ModelSettings,
    plan: ParallelPlan,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    float8: Float8 | None = None,
) -> nn.Module:
    """The model as the plan spreads it, without values in its weights: see `initialize_weights`."""
    with torch.device("meta"):
        spread = build(model)
    to_float8(spread, float8)
    middle: list[Any] = list(spread.global_transformer.stack.blocks) if isinstance(spread, BLTModel) else []
    divided: list[Any] = []
    if plan.mesh is not None:
        from bytelatent.training.distributed import fsdp as sharding
        from bytelatent.training.distributed.sharded_tables import divide_rows

        embeddings = [part for part in spread.modules() if isinstance(part, NgramHashEmbedding)]
        if plan.settings.tables == "rows":
            for part in embeddings:
                divide_rows(part, plan.mesh.device_type, plan.ranks.world_size)
            divided = [part.tables.weight for part in embeddings]
        for block in middle if plan.settings.tensor > 1 else ():
            sharding.divide(block, plan.mesh["tensor"])
    recompute_regions(spread, plan.settings.activation_checkpointing)
    if compiled:
        compile_regions(spread)
    if plan.mesh is not None and plan.local_mesh is not None:
        reduce_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[plan.settings.reduce_dtype]
        for parts in sharding.gathered_together(spread):
            mesh = plan.mesh["replicate", "shard"] if parts[0] in middle else plan.local_mesh
            # Under autocast, products would cast the weights anyway: they are sent in that precision.
            sharding.shard(parts, mesh, dtype, reduce_dtype)
        sharding.shard([spread], plan.local_mesh, None, reduce_dtype, apart=divided)
    return _with_memory(spread, device, plan)


def _with_memory(spread: nn.Module, device: torch.device, plan: ParallelPlan) -> nn.Module:
    """The module with memory for its weights.

    Raises:
        UserError: there is not enough.
    """
    need = sum(weight.numel() * weight.element_size() for weight in spread.parameters())
    told = f"model: its weights alone take {need / 1e9:,.1f} GB"
    free = free_memory() if device.type == "cpu" and plan.mesh is None else None
    if free is not None and need > free:  # the system would hand it out, and end the process once it is written to
        raise UserError(f"{told}, and {free / 1e9:,.1f} GB are free; take a smaller one")
    try:
        return spread.to_empty(device=device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{told}, more than this device has left; take a smaller one, or more processes") from None


@torch.no_grad()
def initialize_weights(spread: nn.Module, model: ModelSettings, plan: ParallelPlan) -> None:
    """Draw the initial weights one after the other, as a single process does; each rank keeps its own part of each."""
    with torch.device("meta"):
        pattern = build(model)
    targets = dict(spread.named_parameters())
    for prefix, part in pattern.named_modules():
        own = [name for name, _ in part.named_parameters(recurse=False)]
        if own:
            part.to_empty(device="cpu", recurse=False)
            init_weights(part)
            for name in own:
                plan.copy_local_part(targets[f"{prefix}.{name}"], part.get_parameter(name))
            part.to_empty(device="meta", recurse=False)


def _must_divide(model: ModelSettings, tensor: int) -> None:
    if not isinstance(model, BLTSettings):
        raise UserError("parallel.tensor divides the global transformer, and a byte LM has none; leave it out")
    middle = model.global_transformer
    sizes = {"num_heads": middle.num_heads, "num_kv_heads": middle.kv_heads, "feed-forward width": middle.hidden_dim}
    for name, size in sizes.items():
        if size % tensor:
            raise UserError(
                f"parallel.tensor: the global transformer's {name} {size} is no multiple of {tensor}; take a divisor"
            )
