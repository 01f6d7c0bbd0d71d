"""AdamW and its schedule."""

import math

import torch
from torch import nn

from bytelatent.training.settings import OptimizerSettings


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over all weights; only matrices decay, norms and embeddings do not."""
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters()
    }
    matrices = [p for p in model.parameters() if p.dim() >= 2 and p not in embeddings]
    others = [p for p in model.parameters() if p.dim() < 2 or p in embeddings]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), fused=True)


def learning_rate(step: int, progress: float, settings: OptimizerSettings) -> float:
    """Linear warm-up, then a cosine from the peak down to `final_lr_ratio` of it.

    Args:
        step: 0, 1, ...
        progress: how much of the time after warm-up is over, 0 to 1.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    cosine = (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
    return settings.lr * (settings.final_lr_ratio + (1 - settings.final_lr_ratio) * cosine)
