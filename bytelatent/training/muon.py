# pyright: reportPrivateImportUsage=false
"""Muon, for all matrices of one shape at once."""

import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from bytelatent.training.distributed.parallelize import local_part
from bytelatent.training.distributed.whole_matrices import WholeMatrices

PRECISION = torch.bfloat16  # of the products, as in torch's class

# Shapes: N matrices of A rows and B columns


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the same state, in a few kernels for each shape instead of some thirty for each matrix.

    Wide matrices are orthogonalized together with tall ones of the transposed shape. Updates are scaled to the size of
    AdamW's, so that both share a learning rate.

    Matrices may be spread over ranks in any way: each is orthogonalized whole on one rank, see `WholeMatrices`. torch's
    own class takes them, too, but gathers each matrix on every rank, for each of its products.
    """

    def __init__(self, params: ParamsT):
        super().__init__(params, adjust_lr_fn="match_rms_adamw")
        self._whole: WholeMatrices | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the gradients are there already"
        directions: dict[Tensor, Tensor] = {}  # of the parts that this rank holds
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            averages: list[Tensor] = []
            self._init_group(group, parameters, gradients, averages)
            if parameters:
                own, averages = [local_part(value) for value in gradients], [local_part(value) for value in averages]
                torch._foreach_lerp_(averages, own, 1 - group["momentum"])
                found = torch._foreach_lerp(own, averages, group["momentum"]) if group["nesterov"] else averages
                directions |= zip(parameters, found, strict=True)
        updates = dict(zip(directions, self._updates(directions), strict=True))
        for group in self.param_groups:
            of_size = _by_size([parameter for parameter in group["params"] if parameter in updates])
            for size, parameters in of_size.items():
                own = [local_part(parameter) for parameter in parameters]
                torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * 0.2 * math.sqrt(max(size))
                torch._foreach_add_(own, [updates[parameter] for parameter in parameters], alpha=-rate)

    def _updates(self, directions: dict[Tensor, Tensor]) -> list[Tensor]:
        """The orthogonalized directions; of matrices that are spread over ranks this rank's parts."""
        parts = list(directions.values())
        if not any(isinstance(matrix, DTensor) for matrix in directions) or dist.get_world_size() == 1:
            return self._orthogonalized(parts)
        matrices = list(directions)
        if self._whole is None or list(map(id, self._whole.matrices)) != list(map(id, matrices)):
            self._whole = WholeMatrices(matrices, newton_schulz_cost, PRECISION)
        whole = self._whole.gather(parts)
        return self._whole.spread(dict(zip(whole, self._orthogonalized(list(whole.values())), strict=True)))

    def _orthogonalized(self, matrices: list[Tensor]) -> list[Tensor]:
        how = {name: self.defaults[name] for name in ("ns_coefficients", "ns_steps", "eps")}
        found: dict[Tensor, Tensor] = {}
        for of_size in _by_size(matrices).values():
            wide = [matrix for matrix in of_size if matrix.shape[0] <= matrix.shape[1]]
            tall = [matrix for matrix in of_size if matrix.shape[0] > matrix.shape[1]]
            groups = [those for those in (wide, tall) if those]
            # Stacked as they lie in memory, which is one kernel, and then transposed.
            stacks = [_stacked(those) for those in groups]
            given = [stack if stack.shape[1] <= stack.shape[2] else stack.mT for stack in stacks]
            found_NAB = orthogonalized(torch.cat(given) if len(given) > 1 else given[0], **how)
            for those, part in zip(groups, found_NAB.split([len(those) for those in groups]), strict=True):
                updates = torch.empty(len(those), *those[0].shape, dtype=those[0].dtype, device=part.device)
                # Laid out as the parameters.
                found |= zip(those, updates.copy_(part if part.shape == updates.shape else part.mT), strict=True)
        return [found[matrix] for matrix in matrices]


def orthogonalized(x_NAB: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """Each matrix, A <= B, with its singular values near to one, by Newton-Schulz iterations."""
    a, b, c = ns_coefficients
    x_NAB = x_NAB / torch.linalg.vector_norm(x_NAB, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(ns_steps):
        gram_NAA = x_NAB @ x_NAB.mT
        change_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, change_NAA, x_NAB, beta=a)
    return x_NAB


def _stacked(matrices: list[Tensor]) -> Tensor:
    stack = torch.empty(len(matrices), *matrices[0].shape, dtype=PRECISION, device=matrices[0].device)
    torch._foreach_copy_(list(stack), matrices)
    return stack


def newton_schulz_cost(rows: int, columns: int) -> float:
    """FLOPs of `orthogonalized` for a matrix, in its five iterations."""
    a, b = min(rows, columns), max(rows, columns)
    return 5 * (4 * a * a * b + 2 * a * a * a)


def _by_size(matrices: list[Tensor]) -> dict[tuple[int, ...], list[Tensor]]:
    """Matrices by their shape, transposed or not."""
    found: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        found[tuple(sorted(matrix.shape))].append(matrix)
    return found
