"""The kernels of `patch_attention` as operators: with gradients, and whole in a compiled graph.

They take tensors of any strides and give contiguous ones, of the inputs' dtypes.
"""

from typing import Any

import torch
from torch import Tensor, library

# Shapes: T bytes in the batch, P patches, K queries or keys a patch, D local width, H heads, E head size

WIDTH = 256  # elements of a row that a program, which is one warp, works on; fewer where K is above 4
BLOCK = 4  # rows that it loads at once
POOL_BLOCK = 8
STAGES = 1  # blocks on their way while one is worked on; 1: none


@library.custom_op("bytelatent::pool", mutates_args=())
def pool(h_TD: Tensor, begin: Tensor) -> Tensor:
    out_PD = h_TD.new_empty(begin.shape[0] - 1, h_TD.shape[1])
    _launch_pool("pool_kernel", h_TD.contiguous(), begin, out_PD)
    return out_PD


@library.custom_op("bytelatent::pool_backward", mutates_args=())
def pool_backward(d_out_PD: Tensor, h_TD: Tensor, begin: Tensor, out_PD: Tensor) -> Tensor:
    d_h_TD = h_TD.new_empty(h_TD.shape)
    _launch_pool("pool_backward_kernel", h_TD.contiguous(), begin, out_PD, d_out_PD.contiguous(), d_h_TD)
    return d_h_TD


@library.custom_op("bytelatent::own_bytes", mutates_args=())
def own_bytes(q_PKHE: Tensor, k_THE: Tensor, v_THE: Tensor, begin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Also gives, for the gradients, the result in float32, as a rounded one would give even a patch of one byte some,
    and the logarithms, to base 2, of the sums of the weights, [P, K, H]."""
    found = _empty_own_bytes(q_PKHE)
    q, k, v = (x.contiguous() for x in (q_PKHE, k_THE, v_THE))
    _launch_attention("own_bytes_kernel", begin.shape[0] - 1, q.shape[1:], q, k, v, begin, *found)
    return found


@library.custom_op("bytelatent::own_bytes_backward", mutates_args=())
def own_bytes_backward(
    d_out_PKHE: Tensor, q_PKHE: Tensor, k_THE: Tensor, v_THE: Tensor, begin: Tensor, exact: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = q_PKHE.new_empty(q_PKHE.shape), k_THE.new_empty(k_THE.shape), v_THE.new_empty(v_THE.shape)
    d_out, q, k, v = (x.contiguous() for x in (d_out_PKHE, q_PKHE, k_THE, v_THE))
    arguments = (q, k, v, begin, exact, weight, d_out, *gradients)
    _launch_attention("own_bytes_backward_kernel", begin.shape[0] - 1, q.shape[1:], *arguments)
    return gradients


@library.custom_op("bytelatent::read_patch", mutates_args=())
def read_patch(q_THE: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, read_T: Tensor, begin: Tensor) -> Tensor:
    """`begin` is for the gradients."""
    out_THE = q_THE.new_empty(q_THE.shape)
    q, k, v = (x.contiguous() for x in (q_THE, k_PKHE, v_PKHE))
    size = q.shape[0]
    _launch_attention("read_patch_kernel", -(-size // BLOCK), k.shape[1:], q, k, v, read_T, out_THE, size)
    return out_THE


@library.custom_op("bytelatent::read_patch_backward", mutates_args=())
def read_patch_backward(
    d_out_THE: Tensor, q_THE: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, read_T: Tensor, begin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = q_THE.new_empty(q_THE.shape), k_PKHE.new_empty(k_PKHE.shape), v_PKHE.new_empty(v_PKHE.shape)
    d_out, q, k, v = (x.contiguous() for x in (d_out_THE, q_THE, k_PKHE, v_PKHE))
    arguments = (q, k, v, read_T, begin, d_out, *gradients)
    _launch_attention("read_patch_backward_kernel", begin.shape[0] - 1, k.shape[1:], *arguments)
    return gradients


@pool.register_fake
def _(h_TD: Tensor, begin: Tensor) -> Tensor:
    return h_TD.new_empty(begin.shape[0] - 1, h_TD.shape[1])


@pool_backward.register_fake
def _(d_out_PD: Tensor, h_TD: Tensor, begin: Tensor, out_PD: Tensor) -> Tensor:
    return h_TD.new_empty(h_TD.shape)


@own_bytes.register_fake
def _(q_PKHE: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_own_bytes(q_PKHE)


@own_bytes_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@read_patch.register_fake
def _(q_THE: Tensor, *_: Tensor) -> Tensor:
    return q_THE.new_empty(q_THE.shape)


@read_patch_backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep_for_pool(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _pool_gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return pool_backward(d_out, *ctx.saved_tensors), None


def _keep_for_own_bytes(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, exact, weight = output
    ctx.mark_non_differentiable(exact, weight)
    ctx.save_for_backward(*inputs, exact, weight)


def _own_bytes_gradients(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *own_bytes_backward(d_out, *ctx.saved_tensors), None


def _keep_for_read_patch(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _read_patch_gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *read_patch_backward(d_out, *ctx.saved_tensors), None, None


pool.register_autograd(_pool_gradients, setup_context=_keep_for_pool)
own_bytes.register_autograd(_own_bytes_gradients, setup_context=_keep_for_own_bytes)
read_patch.register_autograd(_read_patch_gradients, setup_context=_keep_for_read_patch)


def _empty_own_bytes(q_PKHE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact, weight = (q_PKHE.new_empty(shape, dtype=torch.float32) for shape in (q_PKHE.shape, q_PKHE.shape[:-1]))
    return q_PKHE.new_empty(q_PKHE.shape), exact, weight


def _launch_pool(name: str, h_TD: Tensor, begin: Tensor, *rest: Tensor) -> None:
    from bytelatent.kernels import patch_attention_triton

    kernel: Any = getattr(patch_attention_triton, name)
    num_patches, dim = begin.shape[0] - 1, h_TD.shape[1]
    columns = min(WIDTH, _power_of_two(dim))
    if num_patches > 0:
        with torch.cuda.device_of(h_TD):
            kernel[(num_patches * -(-dim // columns),)](
                h_TD, begin, *rest, D=dim, COLUMNS=columns, BLOCK=POOL_BLOCK, STAGES=STAGES, num_warps=1
            )


def _launch_attention(name: str, pieces: int, shape: torch.Size, *arguments: Any) -> None:
    """Run a program for a few heads of each piece, which is a patch, or BLOCK bytes.

    Args:
        shape: K, H, E.
    """
    from bytelatent.kernels import patch_attention_triton

    kernel: Any = getattr(patch_attention_triton, name)
    num_keys, heads, head_dim = shape
    padded = _power_of_two(head_dim)
    width = min(WIDTH, 1024 // _power_of_two(num_keys))  # a program holds two such rows for each of the K, or three
    at_once = min(_power_of_two(heads), max(width // padded, 1))
    if pieces > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(pieces * -(-heads // at_once),)](
                *arguments, head_dim**-0.5, K=num_keys, H=heads, HEADS=at_once, E=head_dim, PADDED_E=padded,
                BLOCK=BLOCK, STAGES=STAGES, num_warps=1,
            )  # fmt: skip


def _power_of_two(size: int) -> int:
    """The next one."""
    return 1 << (size - 1).bit_length()
