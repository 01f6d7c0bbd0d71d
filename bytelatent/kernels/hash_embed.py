"""A new byte's embedding plus those of the n-grams that end at it, hashes and sum in one kernel.

The hashes are those of `bytelatent.model.ngram_hash`.

Source: Pagnoni et al. 2024, section 3.2.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
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
    num_tables, widest = powers_NW.shape
    newest = torch.arange(tail_BL.shape[1] - new, tail_BL.shape[1], device=tail_BL.device)
    back = torch.arange(widest, device=tail_BL.device)
    ids_TW = tail_BL[:, newest[:, None] - back].flatten(0, 1)
    counted_TW = torch.where(back <= history_T[:, None], ids_TW.long(), 0)
    rows = tables_NVD.shape[0] // num_tables
    hashes_TN = (counted_TW[:, None] * powers_NW).sum(-1).remainder(rows)
    hashes_TN = hashes_TN + torch.arange(num_tables, device=tail_BL.device) * rows
    x_TD = embedding_D[ids_TW[:, 0].long()].float() + tables_NVD[hashes_TN].float().sum(1)
    out = x_TD.new_zeros(x_TD.shape, dtype=embedding_D.dtype) if out is None else out
    if run is None or bool(run):
        out.copy_(x_TD)
    return out


def hash_embed(
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
    """The sum of each new byte's embedding and its n-grams', [T, D].

    Args:
        tail_BL: the last ids of each sequence, the newest last, int32 or int64; L is at least S + W - 1.
        history_T: how many ids before each new one count, int32 or int64; what lies before them counts as zero.
        powers_NW: see `ngram_powers`.
        tables_NVD: [N*V, D] the rows of all tables, one table after the other.
        embedding_D: [ids, D] the embeddings of the ids themselves.
        new: S.
        out: where the result goes, of any dtype, contiguous; a new tensor of the embedding's dtype.
        run: one number on the device; where it is 0 nothing is written.
    """
    from bytelatent.kernels import hash_embed_triton

    kernels: Any = hash_embed_triton
    sequences, length = tail_BL.shape
    num_tables, widest = powers_NW.shape
    dim = embedding_D.shape[1]
    if out is None:
        out = torch.empty(sequences * new, dim, dtype=embedding_D.dtype, device=embedding_D.device)
    assert length >= new + widest - 1, f"{new} new ids and n-grams of {widest} need longer tails than {length}"
    assert history_T.shape == (sequences * new,), f"history: {tuple(history_T.shape)}"
    assert tables_NVD.shape[0] % num_tables == 0, f"{tables_NVD.shape[0]} rows are no {num_tables} tables"
    assert tables_NVD.shape[1] == dim, "embeddings of ids and of n-grams differ in width"
    for name, tensor in {"tail": tail_BL, "tables": tables_NVD, "embedding": embedding_D, "out": out}.items():
        assert tensor.is_contiguous(), f"{name}: not contiguous"
    block = 128
    kernels.hash_embed_kernel[(sequences * new, -(-dim // block))](
        tail_BL,
        history_T,
        powers_NW,
        tables_NVD,
        embedding_D,
        out,
        run,
        S=new,
        L=length,
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
