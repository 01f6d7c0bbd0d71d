"""Activation checkpointing: inner results are computed again in the backward pass instead of being kept."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import bytelatent.kernels.packed_attention  # noqa: F401 it makes the operator
from bytelatent.model import Block, CrossAttention

Checkpointing = Literal["none", "selective", "full"]

# What selective checkpointing keeps: results of matrix products and of attention. The rest is cheap to compute again.
KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.bytelatent.packed_attention.default,
]


def recompute_regions(model: nn.Module, how: Checkpointing) -> None:
    """Let blocks and cross-attentions keep less; to be called before they are compiled."""
    for part in model.modules():
        if isinstance(part, Block | CrossAttention):
            part.forward = recomputed(part.forward, how)


def recomputed(forward: Callable[..., Any], how: Checkpointing) -> Callable[..., Any]:
    """A forward pass of which nothing inside is kept (`full`), or only matrix products and attention (`selective`)."""
    if how == "none":
        return forward
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in the models is drawn
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    return partial(checkpoint, forward, **options)
