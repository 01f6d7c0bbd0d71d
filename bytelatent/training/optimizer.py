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


def learning_rate(step: int, num_steps: int, settings: OptimizerSettings) -> float:
    """The rate at step 0, 1, ...: linear warm-up, then a cosine to `final_lr_ratio` of the peak at the last step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(num_steps - 1 - settings.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return settings.lr * (settings.final_lr_ratio + (1 - settings.final_lr_ratio) * cosine)
