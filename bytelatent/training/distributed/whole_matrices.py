"""Matrices whose parts lie on several ranks, each whole on one rank for a computation that needs all of it.

The computations are divided among all ranks by their cost, replicas included. Within a replica one all-to-all brings
the parts to the ranks that compute, and another brings the parts of the results back. Then replicas exchange what they
computed by an all-gather, one for each mesh of matrices.

Muon of the 1B shape: 285 matrices, 1.45 billion weights (2.9 GB in bfloat16), 72.3 TFLOP, 92 ms at the 785 TFLOP/s of
an H200. Of `n` ranks each computes `1/n`. With FSDP a rank receives 2 x 2.9 GB x (n-1)/n^2; a replica receives
2.9 GB x (n-1)/n. At the 360 GB/s of links in a host:

| ranks | all on each rank | divided | parts of FSDP | replicas |
| --- | --- | --- | --- | --- |
| 2 | 92 ms | 46 ms | + 4 ms | + 4 ms |
| 8 | 92 ms | 12 ms | + 2 ms | + 7 ms |

So replicas divide the work, too. They gain until links are slower than about 30 GB/s for each rank.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from bytelatent.training.distributed.parallelize import local_part
from bytelatent.training.distributed.sharded_tables import all_gather


@dataclass(frozen=True)
class Place:
    """Where a rank's part of a matrix lies in it."""

    rows: slice
    columns: slice
    replica: int  # the number of this rank's copy of the matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


class WholeMatrices:
    """Which rank computes with which matrix, and the way of their parts there and back.

    All ranks make it, and call its methods, at the same time.

    Args:
        matrices: spread over meshes of all ranks.
        cost: of the computation with a matrix of such a shape.
        dtype: in which parts are sent.
    """

    def __init__(self, matrices: Sequence[Tensor], cost: Callable[[int, int], float], dtype: torch.dtype):
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.matrices, numbers = list(matrices), range(len(matrices))
        self._device, self._dtype = local_part(matrices[0]).device, dtype
        owners = shared_out([cost(*matrix.shape) for matrix in matrices], world_size)
        groups = [_replicas_of(matrix) for matrix in matrices]
        self._places = [_place(matrix, group) for matrix, group in zip(matrices, groups, strict=True)]
        of_rank: list[Any] = [None] * world_size
        dist.all_gather_object(of_rank, self._places)
        # Of each matrix: the ranks whose parts the owner gets, which are those of its own replica.
        sources = [
            [source for source in range(world_size) if of_rank[source][n].replica == of_rank[owners[n]][n].replica]
            for n in numbers
        ]
        for n, ranks in enumerate(sources):
            assert sum(of_rank[source][n].size for source in ranks) == matrices[n].numel(), "parts are missing"
        self._is_sharded = any(len(ranks) > 1 for ranks in sources)
        # What this rank sends to owners, in the order of these; what it gets as an owner, in the order of senders.
        self._sent = sorted((n for n in numbers if rank in sources[n]), key=owners.__getitem__)
        got = sorted((source, n) for n in numbers if owners[n] == rank for source in sources[n])
        self._got = [(n, of_rank[source][n]) for source, n in got]
        self._sent_sizes = _sums(((owners[n], self._places[n].size) for n in self._sent), world_size)
        self._got_sizes = _sums(((source, of_rank[source][n].size) for source, n in got), world_size)
        # Of each group of replicas: the matrices that each of them computes.
        self._computed: dict[Any, list[list[int]]] = {}
        for n, group in enumerate(groups):
            if group is not None:
                computed = self._computed.setdefault(group, [[] for _ in range(dist.get_world_size(group))])
                computed[of_rank[owners[n]][n].replica].append(n)

    def gather(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """From this rank's part of each matrix: the matrices that it computes with, whole, by their numbers."""
        sent = self._packed([parts[n] for n in self._sent], sum(self._sent_sizes))
        received = self._exchanged(sent, self._sent_sizes, self._got_sizes)
        whole = {n: self._empty(*self.matrices[n].shape) for n in sorted({n for n, _ in self._got})}
        _copy(
            [whole[n][place.rows, place.columns] for n, place in self._got],
            _cut(received, [place.shape for _, place in self._got]),
        )
        return whole

    def spread(self, results: dict[int, Tensor]) -> list[Tensor]:
        """From whole results, by their numbers: this rank's part of the result of each matrix, in float32."""
        sent = self._packed([results[n][place.rows, place.columns] for n, place in self._got], sum(self._got_sizes))
        received = self._exchanged(sent, self._got_sizes, self._sent_sizes)
        parts = dict(zip(self._sent, _cut(received, self._shapes(self._sent)), strict=True))
        for group, computed in self._computed.items():
            length = max(sum(self._places[n].size for n in numbers) for numbers in computed)
            own = self._packed([parts[n] for n in computed[dist.get_rank(group)]], length)
            gathered = self._empty(len(computed), length)
            all_gather(gathered.flatten(), own, group=group)
            for numbers, flat in zip(computed, gathered, strict=True):
                parts |= zip(numbers, _cut(flat, self._shapes(numbers)), strict=True)
        numbers = range(len(self.matrices))
        flat = self._empty(sum(place.size for place in self._places), dtype=torch.float32)
        found = _cut(flat, self._shapes(numbers))
        _copy(found, [parts[n] for n in numbers])
        return found

    def _exchanged(self, sent: Tensor, sent_sizes: list[int], received_sizes: list[int]) -> Tensor:
        if not self._is_sharded:  # a rank has the whole of what it computes with
            return sent
        received = self._empty(sum(received_sizes))
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes)
        return received

    def _packed(self, parts: list[Tensor], length: int) -> Tensor:
        """The parts, one after the other."""
        flat = self._empty(length)
        _copy(_cut(flat, [part.shape for part in parts]), parts)
        return flat

    def _shapes(self, numbers: Iterable[int]) -> list[tuple[int, int]]:
        return [self._places[n].shape for n in numbers]

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self._dtype, device=self._device)


def shared_out(costs: Sequence[float], world_size: int) -> list[int]:
    """A rank for each piece of work: the dearest first, each to the rank that has the least to do so far."""
    loads, ranks = [0.0] * world_size, [0] * len(costs)
    for n in sorted(range(len(costs)), key=lambda n: -costs[n]):
        ranks[n] = min(range(world_size), key=loads.__getitem__)
        loads[ranks[n]] += costs[n]
    return ranks


def _replicas_of(matrix: Tensor) -> Any:
    """The group of the ranks that hold the same part of a matrix; None: no other rank does."""
    assert isinstance(matrix, DTensor), "a matrix is not spread over the ranks"
    mesh = matrix.device_mesh
    alike = [dim for dim, placement in enumerate(matrix.placements) if placement.is_replicate() and mesh.size(dim) > 1]
    assert len(alike) <= 1, "a matrix is replicated along several dimensions of a mesh"
    return mesh.get_group(alike[0]) if alike else None


def _place(matrix: Any, replicas: Any) -> Place:
    shape, begin = compute_local_shape_and_global_offset(matrix.shape, matrix.device_mesh, matrix.placements)
    rows, columns = (slice(first, first + size) for first, size in zip(begin, shape, strict=True))
    return Place(rows, columns, 0 if replicas is None else dist.get_rank(replicas))


def _sums(pairs: Iterable[tuple[int, int]], world_size: int) -> list[int]:
    """Of numbers that each belong to a rank: the sum of each rank's."""
    sums = [0] * world_size
    for rank, number in pairs:
        sums[rank] += number
    return sums


def _cut(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Views of what lies one after the other from the beginning."""
    sizes = [rows * columns for rows, columns in shapes]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
