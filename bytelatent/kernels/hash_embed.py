# pyright: reportInvalidTypeForm=false
"""A new byte's embedding plus those of the n-grams that end at it, hashes and sum in one kernel.

The hash of an n-gram x_0 .. x_{n-1} is (sum_j x_j * p^j mod 2^64, as a signed number) mod V, for a prime p.

Source: Pagnoni et al. 2024, section 3.2.1; the published hash functions.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.kernels.launch import (
    check_contiguous,
    launch_options,
    power_of_two,
    tl,
    triton,
    uses_kernels,
    wait_for_earlier,
)

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
    if new == 1 and not tail_BL.is_cuda:  # NumPy takes a third of the time for a few sequences
        newest_BW = tail_BL.numpy()[:, ::-1][:, :widest]
        back_W = np.arange(newest_BW.shape[1])
        counted_BW = np.where(back_W <= history_T.numpy()[:, None], newest_BW, 0).astype(np.int64, copy=False)
        total_BN = counted_BW @ powers_NW.numpy().T[: len(back_W)]  # int64 wraps: arithmetic mod 2^64
        return torch.from_numpy(total_BN % rows + np.arange(num_tables) * rows)
    total_TN = powers_NW.new_zeros(history_T.shape[0], num_tables)
    for back in range(widest):
        earlier_T = F.pad(tail_BL, (back, 0))[:, length - new : length].flatten()
        counted_T = torch.where(history_T >= back, earlier_T, 0)
        total_TN = total_TN + counted_T[:, None] * powers_NW[:, back]  # int64 wraps, too
    return total_TN.remainder(rows) + torch.arange(num_tables, device=tail_BL.device) * rows


def plain_hash_embed(
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
    """The plain form, in float32."""
    if out is not None and run is not None and not bool(run):
        return out
    rows_TN = hash_rows(tail_BL, history_T, powers_NW, tables_NVD.shape[0] // powers_NW.shape[0], new)
    if rows is not None:
        rows.copy_(rows_TN)
    x_TD = F.embedding(rows_TN, tables_NVD).float().sum(1)
    if embedding_D is not None:
        x_TD = x_TD.add_(F.embedding(tail_BL[:, tail_BL.shape[1] - new :].flatten(), embedding_D))
    return x_TD.to(tables_NVD.dtype) if out is None else out.copy_(x_TD)


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
    if not uses_kernels(tables_NVD):
        return plain_hash_embed(
            tail_BL, history_T, powers_NW, tables_NVD, embedding_D, new=new, out=out, rows=rows, run=run
        )
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
    check_contiguous(**given)
    if out.shape[0] == 0:
        return out
    block = 128
    hash_embed_kernel[(sequences * new, -(-dim // block))](
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
        PADDED_N=power_of_two(num_tables),
        W=widest,
        PADDED_W=power_of_two(widest),
        V=tables_NVD.shape[0] // num_tables,
        D=dim,
        BLOCK=block,
        num_warps=1 if num_tables <= 8 else 4,
        **launch_options(),
    )
    return out


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


# Kernels


@triton.jit
def hash_embed_kernel(
    tail_ptr, history_ptr, powers_ptr, tables_ptr, embedding_ptr, out_ptr, rows_ptr, run_ptr, S, L,
    N: tl.constexpr, PADDED_N: tl.constexpr, W: tl.constexpr, PADDED_W: tl.constexpr, V: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    table, back = tl.arange(0, PADDED_N), tl.arange(0, PADDED_W)
    inside = (table < N)[:, None] & (back < W)[None, :]
    powers = tl.load(powers_ptr + table[:, None] * W + back[None, :], mask=inside, other=0)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    place = L - S + t % S
    newest = tail_ptr + (t // S).to(tl.int64) * L + place
    history = tl.load(history_ptr + t)
    ids = tl.load(newest - back, mask=(back < W) & (back <= history) & (back <= place), other=0).to(tl.int64)
    hashes = tl.sum(ids[None, :] * powers, 1) % V
    # The remainder has the sign of what is divided, on the device.
    rows = table * V + tl.where(hashes < 0, hashes + V, hashes)
    if rows_ptr is not None and tl.program_id(1) == 0:
        tl.store(rows_ptr + t.to(tl.int64) * N + table, rows, mask=table < N)
    found = tl.load(
        tables_ptr + rows[:, None] * D + d[None, :], mask=(table < N)[:, None] & (d < D)[None, :], other=0.0
    )
    x = tl.sum(found.to(tl.float32), 0)
    if embedding_ptr is not None:
        own = embedding_ptr + tl.load(newest).to(tl.int64) * D + d
        x += tl.load(own, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t.to(tl.int64) * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)
