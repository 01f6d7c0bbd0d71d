"""The training loss, and bits per byte."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that does not count: padding


class _Targeted(Protocol):
    """What `bytelatent.data.Batch` has of a packed batch."""

    @property
    def stream(self) -> Any: ...

    @property
    def targets(self) -> Tensor: ...


def cross_entropy(model: Callable[[Any], Tensor], batch: _Targeted) -> Tensor:
    """The cross-entropy in nats of a batch's targets [T] under the model's logits, summed over the batch."""
    return F.cross_entropy(model(batch.stream), batch.targets, ignore_index=IGNORED, reduction="sum")


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Bits per byte of text; the cost of EOS is included."""
    return nats / math.log(2) / max(num_bytes, 1)
