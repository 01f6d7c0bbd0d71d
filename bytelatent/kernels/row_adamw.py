"""AdamW on some rows of a table, in one kernel: a row's weights and moments are read, changed and written once."""

from typing import Any

import torch
from torch import Tensor

# Shapes: R rows of the table, U rows that are changed, D width


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
    from bytelatent.kernels import row_adamw_triton

    kernels: Any = row_adamw_triton
    dim = weight_RD.shape[1]
    given = {"weight": weight_RD, "mean": mean_RD, "square": square_RD, "rows": rows_U, "gradients": grads_UD}
    for name, tensor in given.items():
        assert tensor.is_contiguous(), f"{name}: not contiguous"
        assert tensor.dtype in (torch.float32, torch.int64), f"{name}: {tensor.dtype}; the kernel computes in float32"
    assert grads_UD.shape == (rows_U.shape[0], dim), f"gradients: {tuple(grads_UD.shape)}"
    if grads_UD.numel() == 0:
        return
    block = min(1 << (dim - 1).bit_length(), 1024)
    kernels.row_adamw_kernel[(rows_U.shape[0], -(-dim // block))](
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
