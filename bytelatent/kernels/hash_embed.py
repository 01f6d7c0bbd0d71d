"""A new byte's embedding plus those of the n-grams that end at it, hashes and sum in one kernel.

The hash of an n-gram x_0 .. x_{n-1} is (sum_j x_j * p^j mod 2^64, as a signed number) mod V, for a prime p.

Source: Pagnoni et al. 2024, section 3.2.1; the published hash functions.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.kernels.overlap import launch_options

# Shapes: B sequences, S new ids each, L ids of a tail, T = B*S, N tables, V rows a table, W longest n-gram, D width


def ngram_powers(primes: Sequence[int], sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """What an id counts in each table's hash, by how far back it is: powers of a prime mod 2^64, signed, int64 [N, W].

    Tables are in the order of `NgramHashEmbedding`: all sizes of the first prime, then of the next.
    """
    widest = max(sizes)
    powers = [
        [_signed(pow(prime, size - 1 - back, 2**64)) if back < size else 0 for back in range(widest)]
        for prime in primes
        for size in sizes
    ]
    return torch.tensor(powers, dtype=torch.int64, device=device)


def hash_rows(tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, rows: int, new: int) -> Tensor:
    """The row of each table that each new id looks up, numbered through all tables of `rows` rows, int64 [T, N].

    The other arguments: see `hash_embed`.
    """
    num_tables, widest = powers_NW.shape
    length = tail_BL.shape[1]
    total_TN = powers_NW.new_zeros(history_T.shape[0], num_tables)
    for back in range(widest):
        earlier_T = F.pad(tail_BL, (back, 0))[:, length - new : length].flatten()
        counted_T = torch.where(history_T >= back, earlier_T, 0)
        total_TN = total_TN + counted_T[:, None] * powers_NW[:, back]  # int64 wraps: arithmetic mod 2^64
    return total_TN.remainder(rows) + torch.arange(num_tables, device=tail_BL.device) * rows


def plain_hash_embed(
    tail_BL: Tensor,
    history_T: Tensor,
    powers_NW: Tensor,
    tables_NVD: Tensor,
    embedding_D: Tensor,
    *,
    new: int = 1,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """What `hash_embed` computes, in float32."""
    rows_TN = hash_rows(tail_BL, history_T, powers_NW, tables_NVD.shape[0] // powers_NW.shape[0], new)
    newest_T = tail_BL[:, tail_BL.shape[1] - new :].flatten().long()
    x_TD = embedding_D[newest_T].float() + tables_NVD[rows_TN].float().sum(1)
    out = x_TD.new_zeros(x_TD.shape, dtype=embedding_D.dtype) if out is None else out
    if run is None or bool(run):
        out.copy_(x_TD)
    return out


def hash_embed(
    tail_BL: Tensor,
    history_T: Tensor,
    powers_NW: Tensor,
    tables_NVD: Tensor,
    embedding_D: Tensor | None,
    *,
    new: int = 1,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """The sum of each new byte's embedding and its n-grams', [T, D].

    Args:
        tail_BL: the last ids of each sequence, the newest last, int32 or int64; a whole stream is one, all new.
        history_T: how many ids before each new one count, int32 or int64; what lies before them, or before a tail's
            first, counts as zero.
        powers_NW: see `ngram_powers`.
        tables_NVD: [N*V, D] the rows of all tables, one table after the other.
        embedding_D: [ids, D] the embeddings of the ids themselves; None leaves them out.
        new: S.
        out: where the result goes, of any dtype, contiguous; a new tensor of the tables' dtype.
        rows: int64 [T, N], where the rows that are looked up go, as of `hash_rows`.
        run: one number on the device; where it is 0 nothing is written.
    """
    from bytelatent.kernels import hash_embed_triton

    kernels: Any = hash_embed_triton
    sequences, length = tail_BL.shape
    num_tables, widest = powers_NW.shape
    dim = tables_NVD.shape[1]
    if out is None:
        out = torch.empty(sequences * new, dim, dtype=tables_NVD.dtype, device=tables_NVD.device)
    assert new <= length, f"{new} new ids in tails of {length}"
    assert history_T.shape == (sequences * new,), f"history: {tuple(history_T.shape)}"
    assert tables_NVD.shape[0] % num_tables == 0, f"{tables_NVD.shape[0]} rows are no {num_tables} tables"
    assert embedding_D is None or embedding_D.shape[1] == dim, "embeddings of ids and of n-grams differ in width"
    given = {"tail": tail_BL, "history": history_T, "tables": tables_NVD, "embedding": embedding_D, "out": out}
    for name, tensor in given.items():
        assert tensor is None or tensor.is_contiguous(), f"{name}: not contiguous"
    if out.shape[0] == 0:
        return out
    block = 128
    kernels.hash_embed_kernel[(sequences * new, -(-dim // block))](
        tail_BL,
        history_T,
        powers_NW,
        tables_NVD,
        embedding_D,
        out,
        rows,
        run,
        new,
        length,
        N=num_tables,
        PADDED_N=_power_of_two(num_tables),
        W=widest,
        PADDED_W=_power_of_two(widest),
        V=tables_NVD.shape[0] // num_tables,
        D=dim,
        BLOCK=block,
        num_warps=1 if num_tables <= 8 else 4,
        **launch_options(),
    )
    return out


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _power_of_two(size: int) -> int:
    """The next one."""
    return 1 << (size - 1).bit_length()
