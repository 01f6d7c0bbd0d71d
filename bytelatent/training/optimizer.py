"""The optimizer and its learning rate.

AdamW trains all weights; or Muon the matrices of the blocks and AdamW the rest. Hash tables whose gradients are rows
have an optimizer of their own, `SparseRowsAdamW`.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from bytelatent.errors import UserError
from bytelatent.model import CrossAttention
from bytelatent.model.block import Block
from bytelatent.training.distributed.fsdp import local_part
from bytelatent.training.row_adamw import SparseRowsAdamW
from bytelatent.training.settings import LearningRateScale, OptimizerSettings


class AdamW(torch.optim.AdamW):
    """torch's, on what this rank holds of each weight: by way of DTensor the host takes longer than the GPU."""

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


def each(optimizer: torch.optim.Optimizer | Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers that it is made of."""
    return list(optimizer.optimizers.values()) if isinstance(optimizer, Optimizers) else [optimizer]


def check_optimizer(settings: OptimizerSettings, world: int) -> None:
    """Complain early about what is for one process.

    Raises:
        UserError: several processes, `world`, cannot train so.
    """
    if world > 1 and settings.hash_gradients == "rows":
        raise UserError(f"optimizer.hash_gradients: rows is for one process, not for {world}; take dense")
    if world > 1 and settings.name == "muon":
        raise UserError(f"optimizer.name: muon is for one process, not for {world}; take adamw")


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer | Optimizers:
    """The optimizer of all weights; only matrices decay, norms and embeddings do not.

    With `hash_gradients: rows` the model's hash tables are told to give such gradients.

    Each group of weights has its `lr_scale`, which the schedule multiplies its rate with. Several processes have to
    be ones that `check_optimizer` lets pass.
    """
    tables = {part.weight: part for part in model.modules() if isinstance(part, nn.EmbeddingBag)}
    for part in tables.values():
        part.sparse = settings.hash_gradients == "rows"
    embeddings = {part.weight for part in model.modules() if isinstance(part, nn.Embedding)} | tables.keys()
    blocks = [part for part in model.modules() if isinstance(part, Block | CrossAttention)]
    of_blocks = {parameter for block in blocks for parameter in block.parameters()}

    groups: dict[str, dict[tuple[float, float], list[nn.Parameter]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and parameter not in embeddings
        if parameter in tables and settings.hash_gradients == "rows":
            kind = "rows"
        elif settings.name == "muon" and is_matrix and parameter in of_blocks:
            kind = "muon"
        else:
            kind = "adamw"
        decay = settings.weight_decay if is_matrix else 0.0
        groups[kind][decay, _scale(name, settings.lr_scale)].append(parameter)

    optimizers = {kind: _optimizer(kind, groups[kind], settings) for kind in sorted(groups)}
    return Optimizers(optimizers) if len(optimizers) > 1 else optimizers["adamw"]


def _optimizer(
    kind: str, groups: dict[tuple[float, float], list[nn.Parameter]], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    given = [
        {"params": parameters, "weight_decay": decay, "lr": settings.lr * scale, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]
    if kind == "muon":  # its steps are scaled to the size of AdamW's, so that both share a learning rate
        return torch.optim.Muon(given, adjust_lr_fn="match_rms_adamw")
    betas = (settings.beta1, settings.beta2)
    return SparseRowsAdamW(given, betas=betas) if kind == "rows" else AdamW(given, betas=betas, fused=True)


def _scale(name: str, scales: LearningRateScale) -> float:
    """What the learning rate of a weight is multiplied with, by the part of the model that its name begins with."""
    of_parts = {
        "embedding.": scales.byte_embedding,
        "encoder.embedding.": scales.byte_embedding,
        "encoder.ngram_hash.": scales.hash_tables,
        "encoder.": scales.encoder,
        "global_transformer.": scales.global_transformer,
        "decoder.": scales.decoder,
    }
    return next((scale for part, scale in of_parts.items() if name.startswith(part)), 1.0)


def learning_rate(step: int, decayed: float, settings: OptimizerSettings) -> float:
    """Linear warm-up, then from the peak down to `final_lr_ratio` of it.

    Args:
        step: 0, 1, ...
        decayed: how much of the decay is over, 0 to 1.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    above_minimum = (1 - settings.final_lr_ratio) * height(min(max(decayed, 0.0), 1.0), settings.schedule)
    return settings.lr * (settings.final_lr_ratio + above_minimum)


def height(decayed: float, kind: str) -> float:
    """Where the rate is between the minimum, 0, and the peak, 1, of a schedule `kind`."""
    return 1 - decayed if kind == "wsd" else (1 + math.cos(math.pi * decayed)) / 2


def decayed_at(height: float, kind: str) -> float:
    """The share of a decay that is over where `height` has come so far down."""
    return 1 - height if kind == "wsd" else math.acos(min(max(2 * height - 1, -1.0), 1.0)) / math.pi
