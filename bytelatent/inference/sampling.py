"""From logits to an id."""

import torch
from pydantic import Field
from torch import Tensor

from bytelatent.config import Settings
from bytelatent.vocab import EOS, OFFSET


class Sampling(Settings):
    """How the next id is drawn.

    Attributes:
        temperature: 0 takes the likeliest id.
        top_k: only the k likeliest.
        top_p: only the likeliest that together hold this share of the probability.
        seed: each row draws from a generator of its own with this seed, so its bytes do not depend on its neighbours.
    """

    temperature: float = Field(default=0.8, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int = 0


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a byte or EOS from the logits [V] of one row; the other special ids are never drawn."""
    logits = logits.float().cpu().clone()
    logits[:OFFSET] = torch.where(torch.arange(OFFSET) == EOS, logits[:OFFSET], -torch.inf)
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    ordered, ids = probabilities.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[sampling.top_k :] = 0
    if sampling.top_p is not None:
        before = ordered.cumsum(0) - ordered
        ordered[before >= sampling.top_p] = 0
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])
