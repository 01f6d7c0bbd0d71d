"""Weights spread over ranks: tensor parallelism for the global transformer, FSDP for all.

Only jobs of several processes import this file: what it imports takes seconds.
"""

from collections.abc import Collection, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module

from bytelatent.model import Block, CrossAttention

AT_ONCE = 2**28  # weights: half a gigabyte in bfloat16, of which two are gathered at a time


def divide(block: Block, mesh: DeviceMesh) -> None:
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


def gathered_together(model: nn.Module) -> list[list[Block | CrossAttention]]:
    """Blocks and cross-attentions in the order in which they compute, in groups whose weights are gathered at once.

    Each gathering and reducing takes the host time that small layers do not give it, so a group has as many neighbours
    of one stack as have `AT_ONCE` weights, or one.
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
                room = AT_ONCE
            groups[-1].append(part)
            room -= size
    return groups


def shard(
    parts: Sequence[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype | None,
    reduce_dtype: torch.dtype,
    apart: Collection[nn.Parameter] = (),
) -> None:
    """Gather weights as their parts run and average gradients over the mesh, replicate x shard.

    Args:
        parts: whose weights are gathered together.
        dtype: in which the weights are sent; None: as they are.
        apart: weights that are left as they are.
    """
    for norm in (module for part in parts for module in part.modules()):
        if isinstance(norm, nn.RMSNorm) and dtype is not None and dtype != norm.weight.dtype:
            norm.__class__ = _NormInFloat32  # not another `forward`: compiled blocks would differ by it
    policy = MixedPrecisionPolicy(dtype, reduce_dtype, cast_forward_inputs=False)
    # One replica is no replication: such a mesh has one dimension.
    is_whole = mesh.size(1) == 1  # then nothing is gained by letting go of the weights between forward and backward
    mesh = mesh if mesh.size(0) > 1 else mesh["shard"]
    fully_shard(
        list(parts),
        mesh=mesh,
        reshard_after_forward=False if is_whole else None,
        mp_policy=policy,
        ignored_params=set(apart),
    )


@torch.no_grad()
def copy_local_part(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be spread over ranks, without a message."""
    if isinstance(target, DTensor):
        shape, begin = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        value = value[tuple(slice(first, first + size) for first, size in zip(begin, shape, strict=True))]
        target = target.to_local()
    target.copy_(value)


def whole(value: DTensor) -> Tensor:
    """All of a tensor that is spread over ranks, on each of them; all of its mesh ask together.

    It is put together along one dimension of the mesh after the other, FSDP's before those of tensor parallelism, which
    divided it first. `full_tensor` does the same with a warning where two of them divide one dimension of the tensor.
    """
    placements = list(value.placements)
    for dim, placement in enumerate(value.placements):
        if not placement.is_replicate():
            placements[dim] = Replicate()
            value = value.redistribute(placements=placements)
    return value.to_local()


class _NormInFloat32(nn.RMSNorm):
    """Autocast leaves norms in float32, and a fused one takes states and weight of one precision."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.float(), self.eps)
