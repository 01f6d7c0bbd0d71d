"""The gradient of a table of which a batch looks up few rows: for each row seen the sum of its gradients.

Lookups are sorted by row, so that those of one row lie together and one program of the kernel adds them, always in the
same order: no atomics, and the same sums from the same batch. The sums go straight to where they belong, so that no
size depends on how many rows there are and the host is not asked.
"""

from typing import Any

import torch
from torch import Tensor, library

# Shapes: T states, N rows that each is the sum of, M = T*N lookups, R rows of the table, U rows seen, D width


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
    from bytelatent.kernels import row_sums_triton

    kernels: Any = row_sums_triton
    grads_TD = grads_TD.contiguous()
    dim = grads_TD.shape[1]
    sorted_M, order_M = rows_TN.flatten().sort(stable=True)
    end_M = torch.searchsorted(sorted_M, sorted_M, right=True)  # of the lookups of the same row
    sums_RD = grads_TD.new_zeros(num_rows, dim)
    block = 128
    if sorted_M.numel() > 0:
        kernels.row_sums_kernel[(sorted_M.shape[0], -(-dim // block))](
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
