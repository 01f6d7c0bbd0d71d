"""Row-sharded hash tables.

Gathered like the other weights, those of the 1B model would send 12 GB to each rank and a gradient of 12 GB back in
every step, though a batch uses only a few rows. So row numbers and sums are sent instead: a rank sums the rows that it
holds for the ids of all ranks, and a reduce-scatter adds them up on the ranks of the ids.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bytelatent.kernels.hash_embed import hash_rows
from bytelatent.model.ngram_hash import NgramHashEmbedding

# Shapes: W ranks, T ids per rank, S rows per id, R rows held here, D width

# The names of these collectives from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard_tables(embedding: NgramHashEmbedding, device: str, world_size: int) -> nn.Parameter:
    """Divide the rows of an embedding's tables among all ranks; return the weight, of which this rank holds a part."""
    mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("rows",))
    weight = distribute_tensor(embedding.tables.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
    embedding.tables.weight = parameter = nn.Parameter(weight)
    _, (begin, _) = compute_local_shape_and_global_offset(weight.shape, mesh, [Shard(0)])
    embedding.sums = partial(_sums, embedding, mesh.get_group(), begin)  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def _sums(embedding: NgramHashEmbedding, group: Any, begin: int, tail_BL: Tensor, history: Tensor, new: int) -> Tensor:
    """The sums of rows that the embedding adds, [T, D]. All ranks call it, in training with the same number of ids."""
    weight: Any = embedding.tables.weight
    rows_TS = hash_rows(tail_BL, history, embedding.powers(tail_BL.device), embedding.settings.vocab_size, new)
    num_ids = rows_TS.shape[0]
    if not torch.is_grad_enabled():  # sizes of validation batches differ
        largest = torch.tensor(num_ids, device=rows_TS.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        rows_TS = F.pad(rows_TS, (0, 0, 0, int(largest) - num_ids), value=-1)
    return _RowSums.apply(weight.to_local(), rows_TS, begin, group)[:num_ids]


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_RD: Tensor, rows_TS: Tensor, begin: int, group: Any) -> Tensor:
        rows_WTS = _gather(rows_TS, group) - begin
        is_own = (rows_WTS >= 0) & (rows_WTS < weight_RD.shape[0])
        ctx.save_for_backward(rows_WTS, is_own)
        ctx.shape, ctx.group = weight_RD.shape, group
        out_TD = weight_RD.new_empty(len(rows_TS), weight_RD.shape[1])
        if len(weight_RD):
            rows_WTS = torch.where(is_own, rows_WTS, 0)
            sums_WTD = F.embedding_bag(rows_WTS, weight_RD, mode="sum", per_sample_weights=is_own.to(weight_RD.dtype))
        else:
            sums_WTD = weight_RD.new_zeros(len(rows_WTS), weight_RD.shape[1])
        reduce_scatter(out_TD, sums_WTD, group=group)
        return out_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        rows_WTS, is_own = ctx.saved_tensors
        grad_WTD = _gather(gradients[0].contiguous(), ctx.group)
        grad_WTD /= dist.get_world_size(ctx.group)  # the mean over ranks, as for other weights
        id_of, column = is_own.nonzero(as_tuple=True)
        # Added in place: the gradient is as large as the rows held here, and there is no memory for a second one.
        grad_RD = grad_WTD.new_zeros(ctx.shape).index_add_(0, rows_WTS[id_of, column], grad_WTD[id_of])
        return grad_RD, None, None, None


def _gather(part: Tensor, group: Any) -> Tensor:
    """The parts of all ranks, concatenated along the first dimension."""
    out = part.new_empty(dist.get_world_size(group) * len(part), *part.shape[1:])
    all_gather(out, part.contiguous(), group=group)
    return out
