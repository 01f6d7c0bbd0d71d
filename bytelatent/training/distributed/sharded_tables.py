"""Row-sharded hash tables: each rank holds some rows, and looks them up for all.

Gathered like the other weights, those of the 1B model would send 12 GB to each rank and a gradient of 12 GB back in
every step, though a batch uses only a few rows. So one of these is sent, in the forward pass and for the gradients:

- **Sums** (`_Sums`): a rank sums the rows that it holds for the ids of all ranks, and a reduce-scatter adds them up on
  the ranks of the ids; all ranks get the gradients of all sums. Each rank sends `4 T D (W - 1)` bytes a pass and
  computes on `W T S` look-ups. No size depends on the rows.
- **Rows** (`_Rows`): a rank asks the owners for the distinct rows of its ids and adds them up itself. It sends each
  row's gradient, summed over its ids, to the owner, who alone updates the row. Each rank sends about
  `4 U D (W - 1) / W` bytes a pass, and 8 for each row's number, and computes on about U rows, however many ranks there
  are. The host waits once, for how many rows go where.

For the 1B shape (S = 6, D = 1024) with T = 65,536 bytes per rank, U is at most 393,216, and of this project's docs 0.42
of that. Gigabytes that a rank sends in a step, in both passes (`python benchmarks/scale.py tables`):

| ranks | gathered | sums | rows, all distinct | rows, 0.42 distinct |
| ----- | -------- | ---- | ------------------ | ------------------- |
| 2     | 12.3     | 0.54 | 1.61               | 0.68                |
| 8     | 21.5     | 3.76 | 2.82               | 1.19                |
| 64    | 24.2     | 33.8 | 3.17               | 1.34                |

So sums are for a dense gradient and at most S ranks; rows for more, and for gradients by rows, which then hold V rows.
Tables that every rank holds whole would send half of what sums do, but take W times the memory and the optimizer's
work.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bytelatent.kernels.hash_embed import sums_of_sorted
from bytelatent.model.ngram_hash import NgramHashEmbedding

# Shapes: W ranks, T ids per rank, S rows per id, M = T*S look-ups, U distinct rows of these, V rows that all ranks ask
# of this one, R rows held here, D width

ROWS = "rows"  # the dimension of the mesh
PIECE = 2**16  # rows, at most, that are sent at once where a whole table is
# The names of these collectives from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard_tables(embedding: NgramHashEmbedding, device: str, world_size: int) -> nn.Parameter:
    """Divide the rows of an embedding's tables among all ranks; return the weight, of which this rank holds a part."""
    mesh = init_device_mesh(device, (world_size,), mesh_dim_names=(ROWS,))
    weight = distribute_tensor(embedding.tables.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
    embedding.tables.weight = parameter = nn.Parameter(weight)
    embedding.forward = _Lookup(embedding, weight)
    return parameter


def is_row_sharded(weight: Tensor) -> TypeGuard[DTensor]:
    """Whether it is a table of `shard_tables`."""
    return isinstance(weight, DTensor) and weight.device_mesh.mesh_dim_names == (ROWS,)


def first_row(table_RD: Tensor) -> int:
    """The number, in the whole table, of the first row that this rank holds."""
    if not isinstance(table_RD, DTensor):
        return 0
    return _bounds(table_RD)[table_RD.device_mesh.get_local_rank()]


def zero_per_row(table_RD: Tensor) -> Tensor:
    """One zero for each row of a table, spread over ranks as its rows are."""
    if not isinstance(table_RD, DTensor):
        return table_RD.new_zeros(table_RD.shape[0])
    part = table_RD.to_local()
    how: dict[str, Any] = {"run_check": False, "shape": table_RD.shape[:1], "stride": (1,)}
    return DTensor.from_local(part.new_zeros(part.shape[0]), table_RD.device_mesh, table_RD.placements, **how)


@torch.no_grad()
def table_on_first(table_RD: DTensor) -> Tensor | None:
    """The whole table in the memory of the first rank's CPU, and None on others. No GPU has room for it."""
    own_RD, rank, whole = table_RD.to_local(), table_RD.device_mesh.get_local_rank(), None
    if rank == 0:
        whole = torch.empty(table_RD.shape, dtype=own_RD.dtype)
    for owner, rows, held in _pieces(table_RD):
        piece = own_RD[held] if rank == owner else own_RD.new_empty(rows.stop - rows.start, own_RD.shape[1])
        dist.broadcast(piece, group=table_RD.device_mesh.get_group(), group_src=owner)
        if whole is not None:
            whole[rows] = piece
    return whole


@torch.no_grad()
def fill_from_first(table_RD: DTensor, whole: Tensor | None) -> None:
    """Fill the parts of a table with the whole one that the first rank has; on others it is None."""
    own_RD, rank = table_RD.to_local(), table_RD.device_mesh.get_local_rank()
    for owner, rows, held in _pieces(table_RD):
        piece = own_RD.new_empty(rows.stop - rows.start, own_RD.shape[1])
        if whole is not None:
            piece.copy_(whole[rows])
        dist.broadcast(piece, group=table_RD.device_mesh.get_group(), group_src=0)
        if rank == owner:
            own_RD[held] = piece


def _pieces(table_RD: DTensor) -> Iterator[tuple[int, slice, slice]]:
    """A rank that holds rows, their numbers in the whole table, and among those of the rank."""
    for owner, (begin, end) in enumerate(pairwise(_bounds(table_RD))):
        for first in range(begin, end, PIECE):
            last = min(first + PIECE, end)
            yield owner, slice(first, last), slice(first - begin, last - begin)


def _bounds(table_RD: DTensor) -> list[int]:
    """The first row of each rank, and the number of all rows."""
    num_rows, world = table_RD.shape[0], table_RD.device_mesh.size()
    return [min(rank * -(-num_rows // world), num_rows) for rank in range(world + 1)]


class _Lookup:
    """In place of the embedding's `forward`. All ranks call it."""

    def __init__(self, embedding: NgramHashEmbedding, weight: DTensor):
        self.embedding, self.group = embedding, weight.device_mesh.get_group()
        self.bounds, self.begin = _bounds(weight), first_row(weight)
        self.world, self.num_tables = weight.device_mesh.size(), embedding.settings.num_tables
        self._bounds_on_device: Tensor | None = None

    def __call__(self, ids: Tensor, history: Tensor) -> Tensor:
        rows_TS = self.embedding.rows(ids, history)
        weight: Any = self.embedding.tables.weight
        if self.embedding.tables.sparse or self.world > self.num_tables:
            return _Rows.apply(weight, rows_TS, self)
        num_ids = rows_TS.shape[0]
        if not torch.is_grad_enabled():  # sizes of validation batches differ
            largest = torch.tensor(num_ids, device=rows_TS.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
            rows_TS = F.pad(rows_TS, (0, 0, 0, int(largest) - num_ids), value=-1)
        return _Sums.apply(weight.to_local(), rows_TS, self.begin, self.group)[:num_ids]

    def bounds_on(self, device: torch.device) -> Tensor:
        if self._bounds_on_device is None or self._bounds_on_device.device != device:
            self._bounds_on_device = torch.tensor(self.bounds, device=device)
        return self._bounds_on_device

    def exchange(self, part: Tensor, to_each: list[int], from_each: list[int]) -> Tensor:
        """Send consecutive rows of `part` to the ranks, and return what these send, in the order of ranks."""
        out = part.new_empty(sum(from_each), *part.shape[1:])
        dist.all_to_all_single(out, part.contiguous(), from_each, to_each, group=self.group)
        return out


class _Rows(torch.autograd.Function):
    """The sums of rows that each id looks up, [T, D], whatever T is on other ranks, also 0.

    The gradient of the weight is sparse or dense as the embedding says. A sparse one is as of `ngram_sums`: a plain
    tensor, of the whole table's size, of the entries for rows that this rank holds.
    """

    @staticmethod
    def forward(ctx: Any, weight: DTensor, rows_TS: Tensor, lookup: _Lookup) -> Tensor:
        rows_M, order_M = rows_TS.flatten().sort(stable=True)
        is_first_M = torch.ones_like(rows_M, dtype=torch.bool)
        is_first_M[1:] = rows_M[1:] != rows_M[:-1]
        number_M = is_first_M.cumsum(0)  # of the distinct rows, from 1
        ends_W = F.pad(number_M, (1, 0))[torch.searchsorted(rows_M, lookup.bounds_on(rows_M.device))]
        asked_W = ends_W.diff()
        given_W = lookup.exchange(asked_W, [1] * lookup.world, [1] * lookup.world)
        asked, given = torch.stack((asked_W, given_W)).tolist()  # the host waits
        number_M -= 1
        rows_U = rows_M.new_empty(sum(asked)).scatter_(0, number_M, rows_M)
        index_TS = torch.empty_like(order_M).scatter_(0, order_M, number_M).view_as(rows_TS)

        rows_V = lookup.exchange(rows_U, asked, given)
        sorted_V = rows_V.sort(stable=True) if lookup.embedding.tables.sparse else (rows_V,)
        if lookup.embedding.before_lookup is not None:
            lookup.embedding.before_lookup(sorted_V[0])
        found_UD = lookup.exchange(weight.to_local()[rows_V - lookup.begin], given, asked)
        ctx.save_for_backward(number_M, order_M, *sorted_V)
        ctx.asked, ctx.given, ctx.lookup, ctx.weight = asked, given, lookup, weight.detach()
        return F.embedding_bag(index_TS, found_UD, mode="sum") if len(index_TS) else found_UD[:0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        number_M, order_M, rows_V, *order_V = ctx.saved_tensors
        weight, lookup = ctx.weight, ctx.lookup
        grads_TD = gradients[0] / lookup.world  # the mean over ranks, as for other weights
        grads_UD = sums_of_sorted(number_M, order_M, grads_TD, lookup.num_tables, sum(ctx.asked))
        grads_VD = lookup.exchange(grads_UD, ctx.asked, ctx.given)
        del grads_UD
        if order_V:
            grads_VD = sums_of_sorted(rows_V, order_V[0], grads_VD, 1)
            grad = torch.sparse_coo_tensor(rows_V[None], grads_VD, weight.shape, check_invariants=False)
        else:
            grad_RD = torch.zeros_like(weight.to_local()).index_add_(0, rows_V - lookup.begin, grads_VD)
            how: dict[str, Any] = {"run_check": False, "shape": weight.shape, "stride": weight.stride()}
            grad = DTensor.from_local(grad_RD, weight.device_mesh, weight.placements, **how)
        return grad, None, None


class _Sums(torch.autograd.Function):
    """The sums of rows that each id looks up, [T, D]; all ranks have as many ids."""

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
