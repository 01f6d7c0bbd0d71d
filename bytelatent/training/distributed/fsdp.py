"""Weights spread over ranks: tensor parallelism of the global transformer, FSDP of the whole model."""

from collections.abc import Collection, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from bytelatent.model import Block, CrossAttention

GROUP_WEIGHTS = 2**28  # half a gigabyte in bfloat16; two groups are gathered at a time


def apply_tensor_parallelism(block: Block, mesh: DeviceMesh) -> None:
    """Divide the heads and the feed-forward width of a block among the ranks of a tensor group."""
    same = Replicate()
    parallelize_module(
        block,
        mesh,
        {
            "attention": PrepareModuleInput(input_layouts=(same, None, None), desired_input_layouts=(same, None, None)),
            "attention.query": ColwiseParallel(),
            "attention.key": ColwiseParallel(),
            "attention.value": ColwiseParallel(),
            "attention.output": RowwiseParallel(),
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
    ignored: Collection[nn.Parameter] = (),
) -> None:
    """Gather weights as their modules run, and average gradients over the mesh, replicate x shard.

    Args:
        parts: modules whose weights are gathered together.
        dtype: in which the weights are gathered; None: their own.
        reduce_dtype: in which gradients are summed.
        ignored: weights that FSDP leaves alone.
    """
    for norm in (module for part in parts for module in part.modules()):
        if isinstance(norm, nn.RMSNorm) and dtype is not None and dtype != norm.weight.dtype:
            norm.__class__ = _Float32Norm  # not another `forward`: compiled blocks would differ by it
    policy = MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)
    is_unsharded = mesh.size(1) == 1  # then freeing the weights between forward and backward pass saves nothing
    # A mesh of one replica must have one dimension.
    mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    fully_shard(
        list(parts),
        mesh=mesh,
        reshard_after_forward=False if is_unsharded else None,
        mp_policy=policy,
        ignored_params=set(ignored),
    )


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


class _Float32Norm(nn.RMSNorm):
    """Autocast computes norms in float32, and a fused norm needs its input and weight in one precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.float(), self.eps)
