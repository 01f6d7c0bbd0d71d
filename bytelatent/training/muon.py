# pyright: reportPrivateImportUsage=false
"""Muon, for all matrices of one shape at once."""

import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

# Shapes: N matrices of A rows and B columns


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with the same state, in a few kernels for each shape instead of some thirty for each matrix.

    Wide matrices are orthogonalized together with tall ones of the transposed shape. Updates are scaled to the size of
    AdamW's, so that both share a learning rate.
    """

    def __init__(self, params: ParamsT):
        super().__init__(params, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the gradients are there already"
        directions: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            averages: list[Tensor] = []
            self._init_group(group, parameters, gradients, averages)
            if parameters:
                torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
                found = torch._foreach_lerp(gradients, averages, group["momentum"]) if group["nesterov"] else averages
                directions |= zip(parameters, found, strict=True)
        updates = self._updates(directions)
        for group in self.param_groups:
            of_size = _by_size([parameter for parameter in group["params"] if parameter in updates])
            for size, parameters in of_size.items():
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * 0.2 * math.sqrt(max(size))
                torch._foreach_add_(parameters, [updates[parameter] for parameter in parameters], alpha=-rate)

    def _updates(self, directions: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The orthogonalized directions, by their parameters."""
        how = {name: self.defaults[name] for name in ("ns_coefficients", "ns_steps", "eps")}
        updates: dict[Tensor, Tensor] = {}
        for parameters in _by_size(directions).values():
            wide = [parameter for parameter in parameters if parameter.shape[0] <= parameter.shape[1]]
            tall = [parameter for parameter in parameters if parameter.shape[0] > parameter.shape[1]]
            # Stacked as they lie in memory, which is one kernel, and then transposed.
            stacks = [torch.stack([directions[parameter] for parameter in those]) for those in (wide, tall) if those]
            given = [stack if stack.shape[1] <= stack.shape[2] else stack.mT for stack in stacks]
            found_NAB = orthogonalized(torch.cat([stack.bfloat16() for stack in given]), **how)
            for stack, part in zip(stacks, found_NAB.split([len(stack) for stack in stacks]), strict=True):
                stack.copy_(part if part.shape == stack.shape else part.mT)  # laid out as the parameters
            updates |= zip([*wide, *tall], [update for stack in stacks for update in stack], strict=True)
        return updates


def orthogonalized(x_NAB: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """Each matrix, A <= B, with its singular values near to one, by Newton-Schulz iterations."""
    a, b, c = ns_coefficients
    x_NAB = x_NAB / torch.linalg.vector_norm(x_NAB, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(ns_steps):
        gram_NAA = x_NAB @ x_NAB.mT
        change_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, change_NAA, x_NAB, beta=a)
    return x_NAB


def _by_size(parameters: "list[Tensor] | dict[Tensor, Tensor]") -> dict[tuple[int, ...], list[Tensor]]:
    """Matrices by their shape, transposed or not."""
    found: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        found[tuple(sorted(parameter.shape))].append(parameter)
    return found
