"""The n-gram embeddings of a whole stream for training: `hash_embed`, with gradients.

The gradient of tables that hold billions of numbers, of which a batch looks up a few thousand rows, need not be dense:
it may be a sparse tensor of the rows looked up, as that of torch's own embeddings.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from bytelatent.kernels.hash_embed import hash_embed, hash_rows
from bytelatent.kernels.row_sums import row_sums

# Shapes: B sequences, S new ids each, L ids of a tail, T = B*S, N tables, V rows a table, W longest n-gram, D width;
# M = T*N lookups


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
