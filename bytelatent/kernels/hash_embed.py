# pyright: reportInvalidTypeForm=false
"""Embeddings of byte n-grams: their hashes and the sum of their rows in one kernel; gradients.

The hash of an n-gram x_0 .. x_{n-1} is (sum_j x_j * p^j mod 2^64, as a signed number) mod V, for a prime p.

A batch looks up a few thousand of a table's millions of rows. So the gradient may be a sparse tensor of these, as that
of torch's own embeddings, and the optimizer changes these only: see `row_adamw`. For gradients, lookups are sorted by
row, so that those of one row are adjacent and one program of the kernel adds them, always in the same order: no
atomics, and the same sums from the same batch. No size depends on how many rows there are, so the host need not wait
for the device.

Source: Pagnoni et al. 2024, section 3.2.1; the published hash functions.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, library

from bytelatent.kernels.launch import (
    check_contiguous,
    launch_options,
    power_of_two,
    tl,
    triton,
    uses_kernels,
    wait_for_earlier,
)

# Shapes: B sequences, S new ids each, L ids of a tail, T = B*S states, N tables or rows that each state is the sum of,
# V rows per table, R rows of all tables, U rows that are changed, W longest n-gram, D width; M = T*N lookups

FEW: tl.constexpr = tl.constexpr(4)  # lookups of a row that are added at once: most rows have no more,
MANY: tl.constexpr = tl.constexpr(16)  # and what is over of those that have


def ngram_powers(primes: Sequence[int], sizes: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """The factor of an id in each table's hash, by how far back it is: powers of a prime mod 2^64, int64 [N, W].

    Tables are in the order of `NgramHashEmbedding`: all sizes of the first prime, then of the next.
    """

    def factor(prime: int, exponent: int) -> int:
        value = pow(prime, exponent, 2**64) if exponent >= 0 else 0
        return value - 2**64 if value >= 2**63 else value

    powers = [[factor(prime, size - 1 - back) for back in range(max(sizes))] for prime in primes for size in sizes]
    return torch.tensor(powers, dtype=torch.int64, device=device)


def hash_rows(tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, rows: int, new: int) -> Tensor:
    """The row of each table that each new id looks up, numbered through all tables of `rows` rows, int64 [T, N].

    The other arguments: see `hash_embed`.
    """
    num_tables, widest = powers_NW.shape
    needed = widest + max(new, 1) - 1
    if tail_BL.shape[1] < needed:
        tail_BL = F.pad(tail_BL, (needed - tail_BL.shape[1], 0))
    newest: Any = tail_BL[:, tail_BL.shape[1] - needed :].unfold(1, widest, 1).flatten(0, 1).flip(1)  # [T, W]
    history, powers, count = history_T, powers_NW, partial(torch.arange, device=tail_BL.device)
    if not tail_BL.is_cuda:  # NumPy takes a third of the time for a few sequences
        newest, history, powers, count = newest.numpy(), history.numpy(), powers.numpy(), np.arange
    counted = newest * (count(widest) <= history[:, None])
    found = (counted[:, None] * powers).sum(-1) % rows  # int64 wraps: arithmetic mod 2^64
    return torch.as_tensor(found + count(num_tables) * rows)


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
    if out is not None and run is not None and not bool(run):
        return out
    rows_TN = hash_rows(tail_BL, history_T, powers_NW, tables_NVD.shape[0] // powers_NW.shape[0], new)
    if rows is not None:
        rows.copy_(rows_TN)
    # For a few ids the one is faster, for a stream the other.
    x_TD = F.embedding(rows_TN, tables_NVD).sum(1) if new == 1 else F.embedding_bag(rows_TN, tables_NVD, mode="sum")
    if embedding_D is not None:
        x_TD += F.embedding(tail_BL[:, tail_BL.shape[1] - new :], embedding_D).view_as(x_TD)
    return x_TD if out is None else out.copy_(x_TD)


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
        history_T: how many ids before each new one count, int32 or int64; ids before them, or before a tail's first,
            count as zero.
        powers_NW: see `ngram_powers`.
        tables_NVD: [N*V, D] the rows of all tables, one table after the other.
        embedding_D: [ids, D] the embeddings of the ids themselves; None leaves them out.
        new: S.
        out: where the result goes, of any dtype, contiguous; a new tensor of the tables' dtype.
        rows: int64 [T, N], where the rows that are looked up go, as of `hash_rows`.
        run: one number on the device; where it is 0 nothing is written.
    """
    if not uses_kernels(tables_NVD):
        given: dict[str, Any] = {"new": new, "out": out, "rows": rows, "run": run}
        return plain_hash_embed(tail_BL, history_T, powers_NW, tables_NVD, embedding_D, **given)
    num_rows, dim = tables_NVD.shape
    out = tables_NVD.new_empty(len(history_T), dim) if out is None else out
    check_contiguous(tail=tail_BL, history=history_T, tables=tables_NVD, embedding=embedding_D, out=out)
    _launch_hashes(tail_BL, history_T, powers_NW, tables_NVD, embedding_D, out, rows, run, new, num_rows, dim)
    return out


def _launch_hashes(
    tail_BL: Tensor,
    history_T: Tensor,
    powers_NW: Tensor,
    tables_NVD: Tensor | None,
    embedding_D: Tensor | None,
    out: Tensor | None,
    rows: Tensor | None,
    run: Tensor | None,
    new: int,
    num_rows: int,
    dim: int,
) -> None:
    (num_tables, widest), size, block = powers_NW.shape, len(history_T), 128
    if size > 0:
        hash_embed_kernel[(size, -(-dim // block))](
            *(tail_BL, history_T, powers_NW, tables_NVD, embedding_D, out, rows, run, new, tail_BL.shape[1]),
            N=num_tables,
            PADDED_N=power_of_two(num_tables),
            W=widest,
            PADDED_W=power_of_two(widest),
            V=num_rows // num_tables,
            D=dim,
            BLOCK=block,
            num_warps=1 if num_tables <= 8 else 4,
            **launch_options(),
        )


def ngram_rows(tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, num_rows: int, *, new: int = 1) -> Tensor:
    """As `hash_rows`, for `num_rows` rows of all tables; on CUDA by the kernel of `hash_embed`."""
    num_tables = powers_NW.shape[0]
    if not uses_kernels(tail_BL):
        return hash_rows(tail_BL, history_T, powers_NW, num_rows // num_tables, new)
    rows_TN = powers_NW.new_empty(history_T.shape[0], num_tables)
    _launch_hashes(
        tail_BL.contiguous(), history_T.contiguous(), powers_NW, None, None, None, rows_TN, None, new, num_rows, 1
    )
    return rows_TN


def ngram_sums(
    tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, tables_NVD: Tensor, *, new: int = 1, sparse: bool = False
) -> Tensor:
    """The sum of the embeddings of the n-grams that end at each new id, [T, D], with gradients.

    Args:
        sparse: the gradient of the tables is a sparse tensor with an entry for each lookup, of `entry_sums`: that of
            the rows alone would have the host wait for their number.

    The other arguments: see `hash_embed`.
    """
    if not tail_BL.is_cuda and not torch.is_grad_enabled():  # an operator's first call imports for seconds
        return hash_embed(tail_BL, history_T, powers_NW, tables_NVD, None, new=new)
    return _ngram_sums(tail_BL, history_T, powers_NW, tables_NVD, new, sparse)[0]


@library.custom_op("bytelatent::ngram_sums", mutates_args=())
def _ngram_sums(
    tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, tables_NVD: Tensor, new: int, sparse: bool
) -> tuple[Tensor, Tensor]:
    """The sums, and the rows that were looked up, [T, N]."""
    rows_TN = powers_NW.new_empty(history_T.shape[0], powers_NW.shape[0])
    tail_BL, history_T = tail_BL.contiguous(), history_T.contiguous()
    return hash_embed(tail_BL, history_T, powers_NW, tables_NVD, None, new=new, rows=rows_TN), rows_TN


@_ngram_sums.register_fake
def _(
    tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, tables_NVD: Tensor, new: int, sparse: bool
) -> tuple[Tensor, Tensor]:
    size = history_T.shape[0]
    return tables_NVD.new_empty(size, tables_NVD.shape[1]), powers_NW.new_empty(size, powers_NW.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *_, tables_NVD, _new, sparse = inputs
    ctx.save_for_backward(output[1])
    ctx.shape, ctx.sparse = tables_NVD.shape, sparse


def _gradient(ctx: Any, grads_TD: Tensor, _: None) -> tuple[None, None, None, Tensor, None, None]:
    (rows_TN,) = ctx.saved_tensors
    if ctx.sparse:
        rows_M, sums_MD = entry_sums(rows_TN, grads_TD)
        gradient = torch.sparse_coo_tensor(rows_M[None], sums_MD, ctx.shape, check_invariants=False)
    else:
        gradient = row_sums(rows_TN, grads_TD, ctx.shape[0])
    return None, None, None, gradient, None, None


_ngram_sums.register_autograd(_gradient, setup_context=_save_for_backward)


def plain_row_sums(rows_TN: Tensor, grads_TD: Tensor, num_rows: int) -> Tensor:
    sums_RD = grads_TD.new_zeros(num_rows, grads_TD.shape[1])
    for rows_T in rows_TN.unbind(1):
        sums_RD.index_add_(0, rows_T, grads_TD)
    return sums_RD


@library.custom_op("bytelatent::row_sums", mutates_args=())
def row_sums(rows_TN: Tensor, grads_TD: Tensor, num_rows: int) -> Tensor:
    """For each row the sum of the gradients of the states that it is part of; zero for a row of no state.

    Args:
        rows_TN: int64, the rows that each state is the sum of; one may come several times.
        grads_TD: the states' gradients.
        num_rows: R.

    Returns:
        [R, D] of the gradients' dtype, summed in float32 on CUDA.
    """
    if not uses_kernels(rows_TN):
        return plain_row_sums(rows_TN, grads_TD, num_rows)
    sums_RD = grads_TD.new_zeros(num_rows, grads_TD.shape[1])
    _launch_row_sums(*rows_TN.flatten().sort(stable=True), grads_TD, sums_RD, rows_TN.shape[1], at_rows=True)
    return sums_RD


@library.custom_op("bytelatent::entry_sums", mutates_args=())
def entry_sums(rows_TN: Tensor, grads_TD: Tensor) -> tuple[Tensor, Tensor]:
    """As `row_sums`, but of the rows that are looked up: the lookups' rows, sorted, [M], and [M, D] the sums.

    The sum of a row that comes several times is where it comes first, and the others of it are zero.
    """
    rows_M, order_M = rows_TN.flatten().sort(stable=True)
    return rows_M, sums_of_sorted(rows_M, order_M, grads_TD, rows_TN.shape[1])


def sums_of_sorted(
    rows_M: Tensor, order_M: Tensor, grads_TD: Tensor, num_tables: int, num_rows: int | None = None
) -> Tensor:
    """The sums of `entry_sums`, or where `num_rows` is given those of `row_sums`, of lookups that are sorted already.

    Args:
        rows_M, order_M: the lookups' rows, and their places before they were sorted, which was stable.
        num_rows: R, each of which is looked up.
    """
    sums = grads_TD.new_empty(len(rows_M) if num_rows is None else num_rows, grads_TD.shape[1])
    if uses_kernels(rows_M):
        _launch_row_sums(rows_M, order_M, grads_TD, sums, num_tables, at_rows=num_rows is not None)
        return sums
    first_M = torch.searchsorted(rows_M, rows_M) if num_rows is None else rows_M
    return sums.zero_().index_add_(0, first_M, grads_TD[order_M // num_tables])


@entry_sums.register_fake
def _(rows_TN: Tensor, grads_TD: Tensor) -> tuple[Tensor, Tensor]:
    return rows_TN.new_empty(rows_TN.numel()), grads_TD.new_empty(rows_TN.numel(), grads_TD.shape[1])


def _launch_row_sums(
    rows_M: Tensor, order_M: Tensor, grads_TD: Tensor, out: Tensor, num_tables: int, at_rows: bool
) -> None:
    """Write each row's sum to `out`: at the row; or at its first lookup, and zero at the others.

    `order_M`: state * N + table, by row.
    """
    end_M = torch.searchsorted(rows_M, rows_M, right=True)  # of the lookups of the same row
    dim, block = grads_TD.shape[1], 128
    if rows_M.numel() > 0:
        row_sums_kernel[(rows_M.shape[0], -(-dim // block))](
            *(rows_M, order_M, end_M, grads_TD.contiguous(), out, num_tables),
            AT_ROWS=at_rows,
            D=dim,
            BLOCK=block,
            num_warps=1,
        )


@row_sums.register_fake
def _(rows_TN: Tensor, grads_TD: Tensor, num_rows: int) -> Tensor:
    return grads_TD.new_empty(num_rows, grads_TD.shape[1])


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
    if out_ptr is not None:
        inside = (table < N)[:, None] & (d < D)[None, :]
        found = tl.load(tables_ptr + rows[:, None] * D + d[None, :], mask=inside, other=0.0)
        x = tl.sum(found.to(tl.float32), 0)
        if embedding_ptr is not None:
            own = embedding_ptr + tl.load(newest).to(tl.int64) * D + d
            x += tl.load(own, mask=d < D, other=0.0).to(tl.float32)
        tl.store(out_ptr + t.to(tl.int64) * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def row_sums_kernel(
    rows_ptr, order_ptr, end_ptr, grads_ptr, out_ptr, N, AT_ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """The program of a row's first lookup adds the gradients of all; each lookup's number is state * N + table."""
    begin = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + begin)
    if tl.load(rows_ptr + begin - 1, mask=begin > 0, other=-1) == row:
        if not AT_ROWS:
            zero = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
            tl.store(out_ptr + begin.to(tl.int64) * D + d, zero, mask=d < D)
        return
    end = tl.load(end_ptr + begin)
    x = add_lookups(begin, end, order_ptr, grads_ptr, d, N, D, FEW)
    for first in range(begin + FEW, end, MANY):
        x += add_lookups(first, end, order_ptr, grads_ptr, d, N, D, MANY)
    place = row if AT_ROWS else begin.to(tl.int64)
    tl.store(out_ptr + place * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def add_lookups(first, end, order_ptr, grads_ptr, d, N, D: tl.constexpr, COUNT: tl.constexpr):
    """The sum of `COUNT` lookups from `first` on, or of those there are before `end`, float32."""
    place = first + tl.arange(0, COUNT)
    state = tl.load(order_ptr + place, mask=place < end, other=0) // N
    inside = (place < end)[:, None] & (d < D)[None, :]
    grads = tl.load(grads_ptr + state[:, None] * D + d[None, :], mask=inside, other=0.0)
    return tl.sum(grads.to(tl.float32), 0)
