"""Bits per byte of held-out text."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from bytelatent.data import Batch
from bytelatent.errors import UserError
from bytelatent.model import BLTModel, LanguageModel
from bytelatent.model.loss import bits_per_byte, cross_entropy


@dataclass(frozen=True)
class Evaluation:
    bits_per_byte: float
    num_bytes: int
    mean_patch_bytes: float | None  # None for a byte LM
    seconds: float


@torch.no_grad()
def evaluate(
    model: BLTModel | LanguageModel,
    batches: Iterable[Batch],
    on_batch: Callable[[int], None] = lambda num_bytes: None,
) -> Evaluation:
    """Bits per byte of the batches' text; the end of each document is paid for by its bytes.

    Args:
        on_batch: called with the number of bytes of each finished batch.
    """
    device = next(model.parameters()).device
    nats, num_bytes, num_patches, began = 0.0, 0, 0, time.perf_counter()
    for batch in batches:
        nats += float(cross_entropy(model, batch.to(device)))
        num_bytes, num_patches = num_bytes + batch.num_bytes, num_patches + batch.num_patches
        on_batch(batch.num_bytes)
    if num_bytes == 0:
        raise UserError("eval: the text holds no bytes")
    return Evaluation(
        bits_per_byte=bits_per_byte(nats, num_bytes),
        num_bytes=num_bytes,
        mean_patch_bytes=num_bytes / num_patches if num_patches else None,
        seconds=time.perf_counter() - began,
    )
