# pyright: reportInvalidTypeForm=false
"""Tables of n-gram embeddings in training: sums of rows with gradients, sums of gradients, and AdamW on some rows.

The gradient of tables that hold billions of numbers, of which a batch looks up a few thousand rows, need not be dense:
it may be a sparse tensor of the rows looked up, as that of torch's own embeddings.

For gradients, lookups are sorted by row, so that those of one row lie together and one program of the kernel adds them,
always in the same order: no atomics, and the same sums from the same batch. The sums go straight to where they belong,
so that no size depends on how many rows there are and the host is not asked.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from bytelatent.kernels.hash_embed import hash_embed, hash_rows
from bytelatent.kernels.launch import check_contiguous, power_of_two, tl, triton

# Shapes: B sequences, S new ids each, L ids of a tail, T = B*S states, N tables or rows that each state is the sum of,
# V rows a table, R rows of all tables, U rows that are changed, W longest n-gram, D width; M = T*N lookups

FEW: tl.constexpr = tl.constexpr(4)  # lookups of a row that are added at once: most rows have no more,
MANY: tl.constexpr = tl.constexpr(16)  # and what is over of those that have


def plain_row_sums(rows_TN: Tensor, grads_TD: Tensor, num_rows: int) -> Tensor:
    """What `row_sums` computes."""
    sums_RD = grads_TD.new_zeros(num_rows, grads_TD.shape[1])
    for rows_T in rows_TN.unbind(1):
        sums_RD.index_add_(0, rows_T, grads_TD)
    return sums_RD


@library.custom_op("bytelatent::row_sums", mutates_args=())
def row_sums(rows_TN: Tensor, grads_TD: Tensor, num_rows: int) -> Tensor:
    """For each row the sum of the gradients of the states that it is part of; zero for a row that is part of none.

    Args:
        rows_TN: int64, the rows that each state is the sum of; one may come several times.
        grads_TD: the states' gradients.
        num_rows: R.

    Returns:
        [R, D] of the gradients' dtype, summed in float32 on CUDA.
    """
    if not rows_TN.is_cuda:
        return plain_row_sums(rows_TN, grads_TD, num_rows)
    return fast_row_sums(rows_TN, grads_TD, num_rows)


@row_sums.register_fake
def _(rows_TN: Tensor, grads_TD: Tensor, num_rows: int) -> Tensor:
    return grads_TD.new_empty(num_rows, grads_TD.shape[1])


def fast_row_sums(rows_TN: Tensor, grads_TD: Tensor, num_rows: int) -> Tensor:
    """The same by a kernel."""
    grads_TD = grads_TD.contiguous()
    dim = grads_TD.shape[1]
    sorted_M, order_M = rows_TN.flatten().sort(stable=True)
    end_M = torch.searchsorted(sorted_M, sorted_M, right=True)  # of the lookups of the same row
    sums_RD = grads_TD.new_zeros(num_rows, dim)
    block = 128
    if sorted_M.numel() > 0:
        row_sums_kernel[(sorted_M.shape[0], -(-dim // block))](
            sorted_M, order_M, end_M, grads_TD, sums_RD, rows_TN.shape[1], D=dim, BLOCK=block, num_warps=1
        )
    return sums_RD


def coalesced(gradient_RD: Tensor) -> Tensor:
    """A sparse gradient of rows with each row once, sorted: torch's `coalesce`, summed by `row_sums`.

    The host waits to learn how many rows there are.
    """
    if gradient_RD.is_coalesced():
        return gradient_RD
    rows_U, place_M = gradient_RD._indices()[0].unique(return_inverse=True)
    sums_UD = row_sums(place_M[:, None], gradient_RD._values(), rows_U.shape[0])
    return torch.sparse_coo_tensor(rows_U[None], sums_UD, gradient_RD.shape, check_invariants=False, is_coalesced=True)


def ngram_sums(
    tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, tables_NVD: Tensor, *, new: int = 1, sparse: bool = False
) -> Tensor:
    """The sum of the embeddings of the n-grams that end at each new id, [T, D], of the tables' dtype.

    Args:
        sparse: the gradient of the tables is a sparse tensor with an entry for each lookup, not coalesced: how many
            rows there are would have to be asked of the device.

    The other arguments: see `hash_embed`.
    """
    if not tail_BL.is_cuda and not torch.is_grad_enabled():  # an operator's first call imports for seconds
        return _plain_sums(tail_BL, history_T, powers_NW, tables_NVD, new)[0]
    return _ngram_sums(tail_BL, history_T, powers_NW, tables_NVD, new, sparse)[0]


def _plain_sums(
    tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, tables_NVD: Tensor, new: int
) -> tuple[Tensor, Tensor]:
    rows_TN = hash_rows(tail_BL, history_T, powers_NW, tables_NVD.shape[0] // powers_NW.shape[0], new)
    return F.embedding_bag(rows_TN, tables_NVD, mode="sum"), rows_TN


@library.custom_op("bytelatent::ngram_sums", mutates_args=())
def _ngram_sums(
    tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, tables_NVD: Tensor, new: int, sparse: bool
) -> tuple[Tensor, Tensor]:
    """The sums, and the rows that were looked up, [T, N]."""
    if not tail_BL.is_cuda:
        return _plain_sums(tail_BL, history_T, powers_NW, tables_NVD, new)
    rows_TN = torch.empty(history_T.shape[0], powers_NW.shape[0], dtype=torch.int64, device=tail_BL.device)
    tail_BL, history_T = tail_BL.contiguous(), history_T.contiguous()
    return hash_embed(tail_BL, history_T, powers_NW, tables_NVD, None, new=new, rows=rows_TN), rows_TN


@_ngram_sums.register_fake
def _(
    tail_BL: Tensor, history_T: Tensor, powers_NW: Tensor, tables_NVD: Tensor, new: int, sparse: bool
) -> tuple[Tensor, Tensor]:
    size = history_T.shape[0]
    return tables_NVD.new_empty(size, tables_NVD.shape[1]), powers_NW.new_empty(size, powers_NW.shape[0])


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *_, tables_NVD, _new, sparse = inputs
    ctx.save_for_backward(output[1])
    ctx.shape, ctx.sparse = tables_NVD.shape, sparse


def _gradient(ctx: Any, grads_TD: Tensor, _: None) -> tuple[None, None, None, Tensor, None, None]:
    (rows_TN,) = ctx.saved_tensors
    if ctx.sparse:
        entries_MD = grads_TD.repeat_interleave(rows_TN.shape[1], dim=0)
        gradient = torch.sparse_coo_tensor(rows_TN.flatten()[None], entries_MD, ctx.shape, check_invariants=False)
    else:
        gradient = row_sums(rows_TN, grads_TD, ctx.shape[0])
    return None, None, None, gradient, None, None


_ngram_sums.register_autograd(_gradient, setup_context=_keep)


def row_adamw(
    weight_RD: Tensor,
    mean_RD: Tensor,
    square_RD: Tensor,
    rows_U: Tensor,
    grads_UD: Tensor,
    count_U: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Change rows of the weights and of both moments in place.

    Args:
        weight_RD, mean_RD, square_RD: the table and the moments of its gradient, float32, contiguous.
        rows_U: int64, which rows; none twice.
        grads_UD: their gradients, of the table's dtype.
        count_U: which change of its row this is, 1 for the first one: the moments are corrected for their start at 0.
    """
    # In float64, as 1 - beta^1 would lose digits; what the kernel is left with are two numbers a row.
    count_U = count_U.double()
    step_U = (lr / (1 - betas[0] ** count_U)).to(weight_RD.dtype)
    root_U = (1 - betas[1] ** count_U).sqrt().to(weight_RD.dtype)
    update = fast_row_update if weight_RD.is_cuda else plain_row_update
    update(weight_RD, mean_RD, square_RD, rows_U, grads_UD, step_U, root_U, betas, eps, 1 - lr * weight_decay)


def plain_row_update(
    weight_RD: Tensor,
    mean_RD: Tensor,
    square_RD: Tensor,
    rows_U: Tensor,
    grads_UD: Tensor,
    step_U: Tensor,
    root_U: Tensor,
    betas: tuple[float, float],
    eps: float,
    keep: float,
) -> None:
    """What the kernel computes.

    Args:
        step_U: the learning rate over the correction of the mean.
        root_U: the root of the correction of the square.
        keep: what weights are multiplied with before.
    """
    mean_UD = torch.lerp(mean_RD[rows_U], grads_UD, 1 - betas[0])
    square_UD = square_RD[rows_U] * betas[1] + grads_UD.square() * (1 - betas[1])
    step_UD = step_U[:, None] * mean_UD / (square_UD.sqrt() / root_U[:, None] + eps)
    weight_RD[rows_U] = weight_RD[rows_U] * keep - step_UD
    mean_RD[rows_U] = mean_UD
    square_RD[rows_U] = square_UD


def fast_row_update(
    weight_RD: Tensor,
    mean_RD: Tensor,
    square_RD: Tensor,
    rows_U: Tensor,
    grads_UD: Tensor,
    step_U: Tensor,
    root_U: Tensor,
    betas: tuple[float, float],
    eps: float,
    keep: float,
) -> None:
    """The kernel."""
    dim = weight_RD.shape[1]
    given = {"weight": weight_RD, "mean": mean_RD, "square": square_RD, "rows": rows_U, "gradients": grads_UD}
    check_contiguous(**given)
    for name, tensor in given.items():
        assert tensor.dtype in (torch.float32, torch.int64), f"{name}: {tensor.dtype}; the kernel computes in float32"
    assert grads_UD.shape == (rows_U.shape[0], dim), f"gradients: {tuple(grads_UD.shape)}"
    if grads_UD.numel() == 0:
        return
    block = min(power_of_two(dim), 1024)
    row_adamw_kernel[(rows_U.shape[0], -(-dim // block))](
        weight_RD,
        mean_RD,
        square_RD,
        rows_U,
        grads_UD,
        step_U,
        root_U,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        eps,
        keep,
        D=dim,
        BLOCK=block,
        num_warps=4 if block > 256 else 1,
    )


# Kernels


@triton.jit
def row_sums_kernel(rows_ptr, order_ptr, end_ptr, grads_ptr, out_ptr, N, D: tl.constexpr, BLOCK: tl.constexpr):
    """The program of a row's first lookup adds the gradients of all; each lookup's number is state * N + table."""
    begin = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + begin)
    if tl.load(rows_ptr + begin - 1, mask=begin > 0, other=-1) == row:
        return
    end = tl.load(end_ptr + begin)
    x = add_lookups(begin, end, order_ptr, grads_ptr, d, N, D, FEW)
    for first in range(begin + FEW, end, MANY):
        x += add_lookups(first, end, order_ptr, grads_ptr, d, N, D, MANY)
    tl.store(out_ptr + row * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def add_lookups(first, end, order_ptr, grads_ptr, d, N, D: tl.constexpr, COUNT: tl.constexpr):
    """The sum of `COUNT` lookups from `first` on, or of those there are before `end`, float32."""
    place = first + tl.arange(0, COUNT)
    state = tl.load(order_ptr + place, mask=place < end, other=0) // N
    inside = (place < end)[:, None] & (d < D)[None, :]
    grads = tl.load(grads_ptr + state[:, None] * D + d[None, :], mask=inside, other=0.0)
    return tl.sum(grads.to(tl.float32), 0)


@triton.jit
def row_adamw_kernel(
    weight_ptr, mean_ptr, square_ptr, rows_ptr, grads_ptr, step_ptr, root_ptr,
    rest1, beta2, rest2, eps, keep, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < D
    place = tl.load(rows_ptr + u) * D + d
    grad = tl.load(grads_ptr + u.to(tl.int64) * D + d, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + place, mask=inside, other=0.0)
    square = tl.load(square_ptr + place, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + place, mask=inside, other=0.0)
    mean += (grad - mean) * rest1
    square = square * beta2 + grad * grad * rest2
    # Rounded as plain PyTorch rounds: the quick root and quotient of a GPU differ in the last digits.
    spread = tl.div_rn(tl.sqrt_rn(square), tl.load(root_ptr + u)) + eps
    weight = weight * keep - tl.div_rn(tl.load(step_ptr + u) * mean, spread)
    tl.store(mean_ptr + place, mean, mask=inside)
    tl.store(square_ptr + place, square, mask=inside)
    tl.store(weight_ptr + place, weight, mask=inside)
