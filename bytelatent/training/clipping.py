"""The norm of all gradients, wherever they lie, and clipping by it. Some may be sparse."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bytelatent.kernels.hash_tables import coalesced


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients alike so that their norm, as of one vector, is at most `max_norm`.

    A sparse gradient's norm is that of the dense one it stands for: entries that share a place are added first.
    Gradients in parts count once each, whatever ranks the parts are on and however often each is repeated.

    Returns:
        The norm before, the same on all ranks.
    """
    alike: dict[Any, list[Tensor]] = {}  # what is here of gradients that are spread in the same way
    for parameter in parameters:
        grad: Any = parameter.grad
        if grad is None:
            continue
        if hasattr(grad, "placements"):  # a DTensor; their module takes seconds to import
            alike.setdefault((grad.device_mesh, grad.placements), []).append(grad.to_local())
        elif grad.is_sparse:
            parameter.grad = grad = coalesced(grad)
            alike.setdefault(None, []).append(grad.values())
        else:
            alike.setdefault(None, []).append(grad)
    norms = [_norm(parts, spread) for spread, parts in alike.items()]
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for parts in alike.values():
        torch._foreach_mul_(parts, factor)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def _norm(parts: list[Tensor], spread: Any) -> Tensor:
    norm = nn.utils.get_total_norm(parts)
    if spread is None:
        return norm
    mesh, placements = spread
    square = norm.square()
    for dim, placement in enumerate(placements):
        assert not placement.is_partial()
        if not placement.is_replicate() and mesh.size(dim) > 1:
            dist.all_reduce(square, group=mesh.get_group(dim))
    return square.sqrt()
