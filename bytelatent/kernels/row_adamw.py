# pyright: reportInvalidTypeForm=false
"""AdamW on the rows of a table that a batch looks up, with the results of AdamW on the whole table.

AdamW changes every row in every step: one without a gradient is still moved by its momentum, which fades. Here a row
misses the steps that do not look it up, and catches up before it is next read: step by step, at the rates of those
steps. However these are divided among calls, each is computed alike, so the bits are the same.

Momentum fades until it moves nothing; see `lasting_steps`. Steps after that are left out, so that a row that is never
looked up again soon costs nothing. With weight decay it costs one product a step and weight: for the same bits these
are not joined.

No size depends on how many rows there are, so the host need not wait for the device. Lookups are sorted by row; the
first of each run of equal rows acts.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bytelatent.kernels.hash_embed import entry_sums
from bytelatent.kernels.launch import check_contiguous, tl, triton, uses_kernels

# Shapes: R rows of a table, M lookups, U rows that are changed, D width, H steps of which the rates are held, K rates
# of a step: 2, or 3 with weight decay

HISTORY = 256  # H: all rows catch up at least as often
CACHED = 2**17  # weights that a CPU's cache holds
FOREVER = 2**23  # steps: a step's number is counted exactly in float32 up to twice as many
_SUMMED = "_num_entries_summed"  # an attribute of a gradient: another pass would add entries


@dataclass(frozen=True)
class TableState:
    """A table and its state: all that the next step depends on but the gradient. Of one dtype, contiguous.

    Attributes:
        weight_RD: the table.
        mean_RD, square_RD: the moments of each row's gradient, as of its last change.
        last_R: the last step that changed a row, or its weights; 0 for none.
        until_R: the last step in which a row's momentum moves it.
        step: the number of steps done.
        rates_HK: for step j at j % H: the learning rate over the correction of the mean, and one over the root of that
            of the square; with weight decay also the factor that all weights are multiplied by first.
        betas, eps: of AdamW.
    """

    weight_RD: Tensor
    mean_RD: Tensor
    square_RD: Tensor
    last_R: Tensor
    until_R: Tensor
    step: Tensor
    rates_HK: Tensor
    betas: tuple[float, float]
    eps: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        moments = self.weight_RD, self.mean_RD, self.square_RD
        return *moments, self.last_R, self.until_R, self.step, self.rates_HK

    @property
    def decays(self) -> bool:
        return self.rates_HK.shape[1] == 3


def lasting_steps(betas: tuple[float, float], dtype: torch.dtype) -> int:
    """The steps after its last gradient in which a row is moved; what is left out moves it by less than rounding does.

    k steps after the gradient the mean is b1^k m and the root of the square b2^(k/2) s. As m and s^2 are sums over past
    gradients g_i of (1 - b1) b1^i g_i and (1 - b2) b2^i g_i^2, |m| <= c s with
    c = (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), by Cauchy and Schwarz. So with r = b1 / sqrt(b2) step k moves a
    weight by at most c r^k times the learning rate (by less with `eps`; after n steps the corrections for the start are
    one, but for rounding), and all steps after the n-th by c r^(n+1) / (1 - r) times the largest rate. Here that is at
    most half the dtype's `eps` times it. For betas of 0.9 and 0.95 these are 242 steps in float32.

    Where r is not below one momentum never fades in this sense, and no step is left out.
    """
    beta1, beta2 = betas
    if beta1 == 0:
        return 0
    if beta1**2 >= beta2:
        return FOREVER
    ratio = beta1 / math.sqrt(beta2)
    bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - ratio**2)) / (1 - ratio)
    return min(FOREVER, max(0, math.ceil(math.log(torch.finfo(dtype).eps / 2 / bound) / math.log(ratio)) - 1))


def rates_of(step: int, lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> tuple[float, ...]:
    """A row of `rates_HK`."""
    rates = lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
    return (*rates, 1 - lr * weight_decay) if weight_decay else rates


def sum_entries(gradient_RD: Tensor) -> Tensor:
    """A sparse gradient of rows with the entries of each row added up by `entry_sums`.

    Unlike torch's `coalesce` it has as many entries as before, so that the host need not wait for the number of rows.
    """
    if gradient_RD.is_coalesced() or getattr(gradient_RD, _SUMMED, None) == gradient_RD._nnz():
        return gradient_RD
    rows_M, sums_MD = entry_sums(gradient_RD._indices()[0][:, None], gradient_RD._values())
    return as_summed(torch.sparse_coo_tensor(rows_M[None], sums_MD, gradient_RD.shape, check_invariants=False))


def as_summed(gradient_RD: Tensor) -> Tensor:
    """The gradient, which is as `sum_entries` makes it: that of a single backward pass is."""
    setattr(gradient_RD, _SUMMED, gradient_RD._nnz())
    return gradient_RD


def plain_catch_up_rows(table: TableState, rows_M: Tensor | None) -> None:
    if rows_M is None:
        rows_R = torch.arange(len(table.last_R), device=table.last_R.device)
        # With weight decay all rows of the table change, in every step: in parts that stay in a CPU's cache.
        parts = rows_R.split(max(1, CACHED // table.weight_RD.shape[1])) if table.decays else [rows_R]
    else:
        parts = [rows_M[_first(rows_M)]]
    for rows_U in parts:
        _catch_up(table, rows_U)


def _catch_up(table: TableState, rows_U: Tensor) -> None:
    stop_U = table.until_R[rows_U].clamp(max=table.step)
    end_U = table.step.expand_as(stop_U) if table.decays else stop_U
    late_U = table.last_R[rows_U] < end_U
    rows_U, stop_U, end_U = rows_U[late_U], stop_U[late_U], end_U[late_U]
    if rows_U.numel() == 0:
        return
    last_U, last_stop = table.last_R[rows_U], int(stop_U.max())
    weight_UD, mean_UD, square_UD = table.weight_RD[rows_U], table.mean_RD[rows_U], table.square_RD[rows_U]
    for step in range(int(last_U.min()) + 1, int(end_U.max()) + 1):
        rates_K, is_late_U = table.rates_HK[step % HISTORY], last_U < step
        if table.decays:
            weight_UD *= torch.where(is_late_U, rates_K[2], 1.0)[:, None]
        if step <= last_stop:
            now = (is_late_U & (stop_U >= step)).nonzero()[:, 0]
            weight_UD[now], mean_UD[now], square_UD[now] = _adamw(
                weight_UD[now], mean_UD[now], square_UD[now], 0.0, rates_K, table
            )
    table.weight_RD[rows_U], table.mean_RD[rows_U], table.square_RD[rows_U] = weight_UD, mean_UD, square_UD
    table.last_R[rows_U] = end_U


def catch_up_rows(table: TableState, rows_M: Tensor | None = None) -> None:
    """Make up, in place, for the steps done that rows missed.

    Args:
        rows_M: int64, which rows, sorted; None for all.
    """
    if not uses_kernels(table.weight_RD):
        plain_catch_up_rows(table, rows_M)
        return
    size = table.weight_RD.shape[0] if rows_M is None else rows_M.shape[0]
    if size > 0:
        beta1, beta2 = table.betas
        row_adamw_catch_up_kernel[(size,)](
            *(*_checked(table), rows_M, 1 - beta1, beta2, 1 - beta2, table.eps), **_sizes(table)
        )


def plain_row_adamw(table: TableState, rows_M: Tensor, grads_MD: Tensor) -> None:
    plain_catch_up_rows(replace(table, step=table.step - 1), rows_M)
    first_M = _first(rows_M)
    rows_U, grads_UD = rows_M[first_M], grads_MD[first_M]
    left_out_U = (table.step - 1 - table.until_R[rows_U]).clamp(min=0)[:, None]
    mean_UD = table.mean_RD[rows_U] * table.betas[0] ** left_out_U
    square_UD = table.square_RD[rows_U] * table.betas[1] ** left_out_U
    rates_K, weight_UD = table.rates_HK[table.step.long() % HISTORY], table.weight_RD[rows_U]
    if table.decays:
        weight_UD *= rates_K[2]
    table.weight_RD[rows_U], table.mean_RD[rows_U], table.square_RD[rows_U] = _adamw(
        weight_UD, mean_UD, square_UD, grads_UD, rates_K, table
    )
    table.last_R[rows_U] = table.step
    table.until_R[rows_U] = table.step + lasting_steps(table.betas, table.weight_RD.dtype)


def row_adamw(table: TableState, rows_M: Tensor, grads_MD: Tensor) -> None:
    """Change rows of the table and of its state in place, by the step `table.step`, once they have caught up to it.

    Args:
        rows_M: int64, which rows, sorted.
        grads_MD: their gradients, of the table's dtype; of a row that comes several times the first counts.
    """
    if not uses_kernels(table.weight_RD):
        plain_row_adamw(table, rows_M, grads_MD)
        return
    check_contiguous(rows=rows_M, gradients=grads_MD)
    assert grads_MD.dtype == torch.float32, "the kernel computes in float32"
    if rows_M.numel() > 0:
        (beta1, beta2), lasting = table.betas, lasting_steps(table.betas, torch.float32)
        logarithms = (math.log2(max(beta, 1e-38)) for beta in table.betas)
        row_adamw_kernel[(rows_M.shape[0],)](
            *(*_checked(table), rows_M, grads_MD, 1 - beta1, beta2, 1 - beta2, table.eps, *logarithms, lasting),
            **_sizes(table),
        )


def _first(rows_M: Tensor) -> Tensor:
    """Which of sorted rows are the first of equal ones."""
    first_M = torch.ones_like(rows_M, dtype=torch.bool)
    first_M[1:] = rows_M[1:] != rows_M[:-1]
    return first_M


def _adamw(
    weight: Tensor, mean: Tensor, square: Tensor, grad: Tensor | float, rates_K: Tensor, table: TableState
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight, which has decayed, and both moments after a step.

    No `lerp`, which rounds by where in a tensor a number is.
    """
    mean = mean + (grad - mean) * (1 - table.betas[0])
    square = square * table.betas[1] + grad * grad * (1 - table.betas[1])
    return weight - rates_K[0] * mean / (square.sqrt() * rates_K[1] + table.eps), mean, square


def _checked(table: TableState) -> tuple[Tensor, ...]:
    assert all(tensor.dtype == torch.float32 for tensor in table.tensors), "the kernel computes in float32"
    assert all(tensor.is_contiguous() for tensor in table.tensors), "not contiguous"
    return table.tensors


def _sizes(table: TableState) -> dict[str, Any]:
    """Of the kernels. A row in blocks that divide it, where they can, so that no thread computes what is not there."""
    dim = table.weight_RD.shape[1]
    block = max(128, min(dim & -dim, 1024))
    return {"HISTORY": HISTORY, "K": table.rates_HK.shape[1], "D": dim, "BLOCK": block, "num_warps": block // 128}


# Kernels. One program has a whole row: all of it sees the same `last`, which it changes once all have read it.


@triton.jit
def row_adamw_catch_up_kernel(
    weight_ptr, mean_ptr, square_ptr, last_ptr, until_ptr, step_ptr, rates_ptr, rows_ptr,
    rest1, beta2, rest2, eps, HISTORY: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    row = place.to(tl.int64)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + place)
        if tl.load(rows_ptr + place - 1, mask=place > 0, other=-1) == row:
            return
    last = tl.load(last_ptr + row).to(tl.int32)
    step = tl.load(step_ptr)
    stop = tl.minimum(tl.load(until_ptr + row), step).to(tl.int32)
    end = stop
    if K == 3:
        end = step.to(tl.int32)
    if last >= end:
        return
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        inside, at = d < D, row * D + d
        moves = inside
        if K == 3:
            moves = inside & (last < stop)
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + at, mask=moves, other=0.0)
        square = tl.load(square_ptr + at, mask=moves, other=0.0)
        weight, mean, square = made_up(
            weight, mean, square, last, stop, end, rates_ptr, rest1, beta2, rest2, eps, HISTORY, K
        )
        tl.store(weight_ptr + at, weight, mask=inside)
        tl.store(mean_ptr + at, mean, mask=moves)
        tl.store(square_ptr + at, square, mask=moves)
    tl.debug_barrier()
    tl.store(last_ptr + row, end.to(tl.float32))


@triton.jit
def row_adamw_kernel(
    weight_ptr, mean_ptr, square_ptr, last_ptr, until_ptr, step_ptr, rates_ptr, rows_ptr, grads_ptr,
    rest1, beta2, rest2, eps, log_beta1, log_beta2, lasting, HISTORY: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    row = tl.load(rows_ptr + place)
    if tl.load(rows_ptr + place - 1, mask=place > 0, other=-1) == row:
        return
    step = tl.load(step_ptr).to(tl.int32)
    last = tl.load(last_ptr + row).to(tl.int32)
    stop = tl.minimum(tl.load(until_ptr + row).to(tl.int32), step - 1)
    left_out = (step - 1 - stop).to(tl.float32)
    rates = rates_ptr + step % HISTORY * K
    for begin in range(0, D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        inside, at = d < D, row * D + d
        grad = tl.load(grads_ptr + place.to(tl.int64) * D + d, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
        mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
        square = tl.load(square_ptr + at, mask=inside, other=0.0)
        weight, mean, square = made_up(
            weight, mean, square, last, stop, step - 1, rates_ptr, rest1, beta2, rest2, eps, HISTORY, K
        )
        mean *= tl.exp2(left_out * log_beta1)
        square *= tl.exp2(left_out * log_beta2)
        weight, mean, square = adamw(weight, mean, square, grad, rates, rest1, beta2, rest2, eps, K)
        tl.store(weight_ptr + at, weight, mask=inside)
        tl.store(mean_ptr + at, mean, mask=inside)
        tl.store(square_ptr + at, square, mask=inside)
    tl.debug_barrier()
    tl.store(last_ptr + row, step.to(tl.float32))
    tl.store(until_ptr + row, (step + lasting).to(tl.float32))


@triton.jit
def made_up(
    weight, mean, square, last, stop, end, rates_ptr, rest1, beta2, rest2, eps, HISTORY: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """The weights and both moments after the steps from `last` to `stop`, and those to `end` that only decay."""
    for step in range(last + 1, stop + 1):
        rates = rates_ptr + step % HISTORY * K
        weight, mean, square = adamw(weight, mean, square, 0.0, rates, rest1, beta2, rest2, eps, K)
    if K == 3:
        for step in range(tl.maximum(last, stop) + 1, end + 1):
            weight *= tl.load(rates_ptr + step % HISTORY * K + 2)
    return weight, mean, square


@triton.jit
def adamw(weight, mean, square, grad, rates, rest1, beta2, rest2, eps, K: tl.constexpr):
    """The weights and both moments after a step."""
    if K == 3:
        weight *= tl.load(rates + 2)
    mean += (grad - mean) * rest1
    square = square * beta2 + grad * grad * rest2
    weight -= tl.load(rates) * mean / (tl.sqrt(square) * tl.load(rates + 1) + eps)
    return weight, mean, square
