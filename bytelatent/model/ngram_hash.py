"""Byte n-gram hash embeddings.

Source: Pagnoni et al. 2024, section 3.2.1; the published hash functions.
"""

import torch
from torch import Tensor, nn

from bytelatent.model.settings import NgramHashSettings

# Shapes: T ids in the stream, S tables (functions x sizes), D local width

PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)


def ngram_hashes(ids: Tensor, history: Tensor, size: int, function: int, vocab_size: int) -> Tensor:
    """The hash of the n-gram that ends at each id.

    h_i = (sum_j x_{i-size+1+j} * p^j mod 2^64, signed) mod vocab_size, with zeros before the start.

    Args:
        ids: [..., T] int64.
        history: [..., T] how many ids before each one count; what lies before them counts as zero.
        size: the n of the n-gram.
        function: which of the published primes.
        vocab_size: rows of the table.

    Returns:
        int64 [..., T] in [0, vocab_size).
    """
    total = torch.zeros_like(ids)
    for back in range(size):
        power = pow(PRIMES[function], size - 1 - back, 2**64)
        signed = power - 2**64 if power >= 2**63 else power
        earlier = torch.cat([torch.zeros_like(ids[..., :back]), ids[..., : max(ids.shape[-1] - back, 0)]], dim=-1)
        earlier = earlier[..., : ids.shape[-1]]
        total = total + torch.where(history >= back, earlier, 0) * signed  # int64 wraps: arithmetic mod 2^64
    return total.remainder(vocab_size)


class NgramHashEmbedding(nn.Module):
    """The sum of a byte's n-gram embeddings, one table a function and size, all in one tensor, function-major."""

    def __init__(self, settings: NgramHashSettings, dim: int):
        super().__init__()
        self.settings = settings
        self.tables = nn.EmbeddingBag(settings.num_tables * settings.vocab_size, dim, mode="sum")

    def rows(self, ids: Tensor, history: Tensor) -> Tensor:
        """[T, S] the row of each table that each id looks up."""
        settings = self.settings
        hashes = [
            ngram_hashes(ids, history, size, function, settings.vocab_size)
            for function in range(settings.num_functions)
            for size in settings.sizes
        ]
        offsets = torch.arange(len(hashes), device=ids.device) * settings.vocab_size
        return torch.stack(hashes, dim=-1) + offsets

    def forward(self, ids: Tensor, history: Tensor) -> Tensor:
        return self.tables(self.rows(ids, history))

    def of_last(self, tail_TN: Tensor, position: Tensor) -> Tensor:
        """The sum for the last of N ids in a row, [T, D], `position` [T] ids after its document's start."""
        return self.tables(self.rows(tail_TN, position[:, None].expand_as(tail_TN))[:, -1])
