"""Byte n-gram hash embeddings.

Source: Pagnoni et al. 2024, section 3.2.1; the published hash functions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bytelatent.kernels.hash_embed import ngram_powers, ngram_rows, ngram_sums
from bytelatent.model.settings import NgramHashSettings

# Shapes: T ids in the stream, S tables (functions x sizes), W longest n-gram, D local width

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


class NgramHashEmbedding(nn.Module):
    """The sum of a byte's n-gram embeddings, one table a function and size, all in one tensor, function-major.

    The tables are without values until `init_weights` draws them.

    Attributes:
        before_lookup: is called with the rows that a stream looks up, sorted, before they are read; of a row-sharded
            table with those that this rank looks up for all ranks.

    `tables.sparse`: whether the tables' gradient is a sparse tensor of the rows looked up.
    """

    def __init__(self, settings: NgramHashSettings, dim: int):
        super().__init__()
        self.settings = settings
        weight = torch.empty(settings.num_tables * settings.vocab_size, dim)
        self.tables = nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="sum")
        self.before_lookup: Callable[[Tensor], None] | None = None
        self._powers: Tensor | None = None

    def powers(self, device: torch.device) -> Tensor:
        """[S, W] see `ngram_powers`. No buffer: those of a model that is made on no device are never filled."""
        if self._powers is None or self._powers.device != device:
            self._powers = ngram_powers(PRIMES[: self.settings.num_functions], self.settings.sizes, device)
        return self._powers

    def forward(self, ids: Tensor, history: Tensor) -> Tensor:
        """[T, D] for the ids of a stream.

        Args:
            ids: [T] int64.
            history: [T] how many ids before each one count; ids before them count as zero.
        """
        if self.before_lookup is not None:
            self.before_lookup(self.rows(ids, history).flatten().sort().values)
        return self.sums(ids[None], history, new=ids.shape[0])

    def rows(self, ids: Tensor, history: Tensor) -> Tensor:
        """[T, S] the rows that `forward` looks up, numbered through all tables."""
        weight = self.tables.weight
        return ngram_rows(ids[None], history, self.powers(weight.device), weight.shape[0], new=ids.shape[0])

    def of_last(self, tail_TN: Tensor, position: Tensor) -> Tensor:
        """The sum for the last of N ids in a row, [T, D], `position` [T] ids after its document's start."""
        return self.sums(tail_TN, position, new=1)

    def sums(self, tail_BL: Tensor, history: Tensor, new: int) -> Tensor:
        """[T, D] for the last `new` ids of each row of ids, T in all; `history` [T] as above."""
        weight = self.tables.weight
        return ngram_sums(tail_BL, history, self.powers(weight.device), weight, new=new, sparse=self.tables.sparse)
