"""Losses, and bits per byte."""

import math

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that does not count: padding


def sum_of_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed surprise in nats of `targets` [T] under `logits` [T, V]."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits a byte of text costs; the end of each document is paid for by its bytes."""
    return nats / math.log(2) / max(num_bytes, 1)
