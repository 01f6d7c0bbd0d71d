"""The optimizers.

AdamW trains all weights; or Muon the matrices of the blocks and AdamW the rest. Hash tables whose gradients are sparse
have an AdamW of their own, `SparseRowsAdamW`.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from bytelatent.model import Block, CrossAttention
from bytelatent.model.ngram_hash import NgramHashEmbedding
from bytelatent.training.distributed.parallelize import local_part
from bytelatent.training.muon import Muon
from bytelatent.training.settings import OptimizerSettings
from bytelatent.training.sparse_rows import SparseRowsAdamW


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` on local shards: through DTensor the host takes longer than the GPU."""

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        is_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local_part, tensors)
        return is_complex


class Optimizers:
    """Several optimizers, each of its own weights, used as one."""

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def single_optimizers(optimizer: torch.optim.Optimizer | Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers that `Optimizers` holds, or the optimizer itself."""
    return list(optimizer.optimizers.values()) if isinstance(optimizer, Optimizers) else [optimizer]


def catch_up(optimizer: torch.optim.Optimizer | Optimizers) -> None:
    """Bring all weights up to date, as before they are saved: see `SparseRowsAdamW`."""
    for one in single_optimizers(optimizer):
        if isinstance(one, SparseRowsAdamW):
            one.catch_up()


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer | Optimizers:
    """The optimizer of all weights that are not frozen; only matrices and hash tables decay, each by a setting.

    With `hash_gradients: rows` it makes the gradients of the model's hash tables sparse, and the model brings the rows
    of these up to date before it reads them.

    Each parameter group has its `lr_scale`, the factor of its learning rate.
    """
    tables = {part.tables.weight: part for part in model.modules() if isinstance(part, NgramHashEmbedding)}
    for table, part in tables.items():
        part.tables.sparse = settings.hash_gradients == "rows" and table.requires_grad
        part.before_lookup = None
    embeddings = {part.weight for part in model.modules() if isinstance(part, nn.Embedding)} | tables.keys()
    blocks = [part for part in model.modules() if isinstance(part, Block | CrossAttention)]
    of_blocks = {parameter for block in blocks for parameter in block.parameters()}

    groups: dict[str, dict[tuple[float, float], list[nn.Parameter]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.dim() >= 2 and parameter not in embeddings
        if parameter in tables and settings.hash_gradients == "rows":
            kind = "rows"
        elif settings.name == "muon" and is_matrix and parameter in of_blocks:
            kind = "muon"
        else:
            kind = "adamw"
        decay = settings.weight_decay if is_matrix else settings.hash_weight_decay if parameter in tables else 0.0
        groups[kind][decay, settings.lr_scale.of(name)].append(parameter)

    # Rows first, AdamW last: the device computes while the host prepares what takes it longer.
    optimizers = {kind: _optimizer(kind, groups[kind], settings) for kind in sorted(groups, reverse=True)}
    if isinstance(rows := optimizers.get("rows"), SparseRowsAdamW):
        for part in tables.values():
            rows.before_lookups(part)
    return Optimizers(optimizers) if len(optimizers) > 1 else next(iter(optimizers.values()))


def _optimizer(
    kind: str, groups: dict[tuple[float, float], list[nn.Parameter]], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    given = [
        {"params": parameters, "weight_decay": decay, "lr": settings.lr * scale, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]
    if kind == "muon":  # its steps are scaled to the size of AdamW's, so that both share a learning rate
        return Muon(given)
    betas = (settings.beta1, settings.beta2)
    return SparseRowsAdamW(given, betas=betas) if kind == "rows" else AdamW(given, betas=betas, fused=True)
