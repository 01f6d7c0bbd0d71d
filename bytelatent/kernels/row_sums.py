"""The gradient of a table of which a batch looks up few rows: the rows seen, each with the sum of its gradients.

Lookups are sorted by row, so that those of one row lie together and one program of the kernel adds them, always in the
same order: no atomics, and the same sums from the same batch.
"""

from typing import Any

from torch import Tensor
from torch.library import custom_op, get_ctx

# Shapes: T states, N rows that each is the sum of, M = T*N lookups, U rows seen, D width


def plain_row_sums(rows_TN: Tensor, grads_TD: Tensor) -> tuple[Tensor, Tensor]:
    """What `row_sums` computes."""
    rows_U, place_TN = rows_TN.unique(return_inverse=True)
    sums_UD = grads_TD.new_zeros(rows_U.shape[0], grads_TD.shape[1])
    for place_T in place_TN.unbind(1):
        sums_UD.index_add_(0, place_T, grads_TD)
    return rows_U, sums_UD


@custom_op("bytelatent::row_sums", mutates_args=())
def row_sums(rows_TN: Tensor, grads_TD: Tensor) -> tuple[Tensor, Tensor]:
    """For each row seen the sum of the gradients of the states that it is part of.

    Args:
        rows_TN: int64, the rows that each state is the sum of; one may come several times.
        grads_TD: the states' gradients.

    Returns:
        The rows seen, sorted, int64 [U], and their sums, [U, D], of the gradients' dtype.
    """
    if not rows_TN.is_cuda:
        return plain_row_sums(rows_TN, grads_TD)
    return fast_row_sums(rows_TN, grads_TD)


@row_sums.register_fake
def _(rows_TN: Tensor, grads_TD: Tensor) -> tuple[Tensor, Tensor]:
    seen = get_ctx().new_dynamic_size()
    return rows_TN.new_empty(seen), grads_TD.new_empty(seen, grads_TD.shape[1])


def fast_row_sums(rows_TN: Tensor, grads_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The same by a kernel."""
    from bytelatent.kernels import row_sums_triton

    kernels: Any = row_sums_triton
    grads_TD = grads_TD.contiguous()
    dim = grads_TD.shape[1]
    sorted_M, order_M = rows_TN.flatten().sort(stable=True)
    rows_U, counts_U = sorted_M.unique_consecutive(return_counts=True)
    sums_UD = grads_TD.new_empty(rows_U.shape[0], dim)
    block = 128
    if sums_UD.numel() > 0:
        kernels.row_sums_kernel[(rows_U.shape[0], -(-dim // block))](
            order_M, counts_U.cumsum(0), grads_TD, sums_UD, rows_TN.shape[1], D=dim, BLOCK=block, num_warps=1
        )
    return rows_U, sums_UD
