# pyright: reportInvalidTypeForm=false
"""Pooling of bytes into patches: the elementwise maximum, on CUDA by kernels as in `patch_attention`.

Source: Pagnoni et al. 2024, section 3.2.2.
"""

from typing import Any

import torch
from torch import Tensor, library

from bytelatent.kernels.launch import power_of_two, tl, triton
from bytelatent.kernels.patch_attention import STAGES, WIDTH, ByteRanges, patch_of_program, takes_kernels

# Shapes: T bytes in the batch, P patches, D local width

BLOCK = 8  # rows that a program loads at once


def pool_patches(h_TD: Tensor, ranges: ByteRanges) -> Tensor:
    """Elementwise maximum of each patch's bytes, [P, D]; zero for a patch without bytes.

    Bytes that are equally high share the gradient.
    """
    return pool_operator(h_TD, ranges.begin) if takes_kernels(h_TD) else plain_pool_patches(h_TD, ranges)


def plain_pool_patches(h_TD: Tensor, ranges: ByteRanges) -> Tensor:
    index_TD = ranges.patch_T.unsqueeze(1).expand_as(h_TD)
    # A zero would share in the gradients of zeros.
    lowest_PD = h_TD.new_full([ranges.num_patches, h_TD.shape[1]], -torch.inf)
    highest_PD = lowest_PD.scatter_reduce(0, index_TD, h_TD, "amax")
    return torch.where((ranges.begin.diff() > 0)[:, None], highest_PD, 0.0)


# Operators


@library.custom_op("bytelatent::pool", mutates_args=())
def pool_operator(h_TD: Tensor, begin: Tensor) -> Tensor:
    out_PD = h_TD.new_empty(begin.shape[0] - 1, h_TD.shape[1])
    _launch_pool(pool_kernel, h_TD.contiguous(), begin, out_PD)
    return out_PD


@library.custom_op("bytelatent::pool_backward", mutates_args=())
def pool_backward_operator(d_out_PD: Tensor, h_TD: Tensor, begin: Tensor, out_PD: Tensor) -> Tensor:
    d_h_TD = h_TD.new_empty(h_TD.shape)
    _launch_pool(pool_backward_kernel, h_TD.contiguous(), begin, out_PD, d_out_PD.contiguous(), d_h_TD)
    return d_h_TD


def _save_for_pool(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _pool_gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return pool_backward_operator(d_out, *ctx.saved_tensors), None


pool_operator.register_fake(lambda h_TD, begin: h_TD.new_empty(begin.shape[0] - 1, h_TD.shape[1]))
pool_operator.register_autograd(_pool_gradients, setup_context=_save_for_pool)
pool_backward_operator.register_fake(lambda d_out_PD, h_TD, *_: h_TD.new_empty(h_TD.shape))


def _launch_pool(kernel: Any, h_TD: Tensor, begin: Tensor, *rest: Tensor) -> None:
    num_patches, dim = begin.shape[0] - 1, h_TD.shape[1]
    columns = min(WIDTH, power_of_two(dim))
    if num_patches > 0:
        with torch.cuda.device_of(h_TD):
            kernel[(num_patches * -(-dim // columns),)](
                h_TD, begin, *rest, D=dim, COLUMNS=columns, BLOCK=BLOCK, STAGES=STAGES, num_warps=1
            )


# Kernels


@triton.jit
def higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pool_kernel(
    h_ptr, begin_ptr, out_ptr, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    patch, begin, end, part = patch_of_program(begin_ptr, tl.cdiv(D, COLUMNS))
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    highest = tl.full([COLUMNS], -float("inf"), tl.float32)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        byte = first + tl.arange(0, BLOCK)
        within = (byte < end)[:, None] & (column < D)[None, :]
        place = byte[:, None] * D + column[None, :]
        h = tl.load(h_ptr + place, mask=within, other=-float("inf")).to(tl.float32)
        highest = higher(highest, tl.reduce(h, 0, higher))
    out = tl.where(begin < end, highest, 0.0)
    tl.store(out_ptr + patch * D + column, out.to(out_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def pool_backward_kernel(
    h_ptr, begin_ptr, out_ptr, d_out_ptr, d_h_ptr, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    patch, begin, end, part = patch_of_program(begin_ptr, tl.cdiv(D, COLUMNS))
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    highest = tl.load(out_ptr + patch * D + column, mask=column < D, other=0.0)[None, :]
    d_out = tl.load(d_out_ptr + patch * D + column, mask=column < D, other=0.0).to(tl.float32)
    equal = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        byte = first + tl.arange(0, BLOCK)
        within = (byte < end)[:, None] & (column < D)[None, :]
        place = byte[:, None] * D + column[None, :]
        h = tl.load(h_ptr + place, mask=within, other=0.0)
        equal += tl.sum((within & (h == highest)).to(tl.float32), 0)
    share = (d_out / tl.maximum(equal, 1.0))[None, :]
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        byte = first + tl.arange(0, BLOCK)
        within = (byte < end)[:, None] & (column < D)[None, :]
        place = byte[:, None] * D + column[None, :]
        h = tl.load(h_ptr + place, mask=within, other=0.0)
        d_h = tl.where(h == highest, share, 0.0)
        tl.store(d_h_ptr + place, d_h.to(d_h_ptr.dtype.element_ty), mask=within)
