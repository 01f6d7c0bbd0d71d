"""Causal attention inside packed documents, with or without a window, as an operator: with gradients, and whole in a
compiled graph. On CUDA cuDNN computes it, on Hopper faster than FlexAttention; elsewhere it is the plain form.

The stream is given as a batch of a fixed number of entries, one a document; those that are left over are empty.
"""

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

# Shapes: T positions in the stream, B entries, H heads, J key/value heads, E head size

FEWEST_ENTRIES = 64  # fewer are no faster
POSITIONS = 64  # an entry, at least: with more entries FlexAttention is as fast
HALVES = (torch.bfloat16, torch.float16)
CAPABILITIES = (9, 10)  # Hopper and Blackwell, but not its consumer cards, for which cuDNN takes far more memory
VERSION = 91002  # of cuDNN, 9.10.2: the first that masks packed documents so
GREATEST_HEAD, HEAD_MULTIPLE = 128, 16  # head sizes with which cuDNN's memory grows with T, and not with B times T


class Heads(NamedTuple):
    """What attention is computed of."""

    dtype: torch.dtype  # of queries, keys and values
    num_heads: int
    num_kv_heads: int
    head_dim: int


def entries_for(num_documents: int) -> int:
    """Entries for so many documents and padding: a power of two, so that it seldom changes from batch to batch."""
    return max(FEWEST_ENTRIES, 1 << num_documents.bit_length())


def cudnn_computes(device: torch.device, size: int, num_documents: int, heads: Heads, window: int | None) -> bool:
    """Whether cuDNN computes it here, and is the faster one; its graphs are made then, if they are not yet.

    Args:
        device: on CUDA.
        size: T.
        num_documents: at most so many, beside padding.
    """
    entries = entries_for(num_documents)
    return (
        heads.dtype in HALVES
        and heads.head_dim <= GREATEST_HEAD
        and heads.head_dim % HEAD_MULTIPLE == 0
        and entries <= max(FEWEST_ENTRIES, size // POSITIONS)
        and not torch.are_deterministic_algorithms_enabled()  # it adds up the queries' gradients in any order
        and torch.cuda.get_device_capability(device)[0] in CAPABILITIES
        and cudnn_is_installed()
        and _has_graphs(device, size, entries, heads, window)
    )


@cache
def cudnn_is_installed() -> bool:
    """Whether cuDNN's frontend is there, and finds a cuDNN that will do."""
    try:
        import cudnn  # pyright: ignore[reportMissingImports]

        return cudnn.backend_version() >= VERSION
    except (ImportError, OSError, RuntimeError):  # the last: it finds no cuDNN
        return False


def entries_of(document: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Where each entry begins in the stream, [B+1], and its length, int32 [B]; found without asking the host.

    An entry is a run of equal `document` [T]; padding is one, too. There must be enough of them.
    """
    is_later = torch.cat([torch.zeros_like(document[:1], dtype=torch.bool), document[1:] != document[:-1]])
    begin = torch.searchsorted(is_later.cumsum(0), torch.arange(entries + 1, device=document.device))
    return begin, begin.diff().int()


def packed_attention(
    q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, begin: Tensor, length: Tensor, window: int | None
) -> Tensor:
    """Softmax attention, [T, H, E]: a position sees itself and what came before it in its entry.

    Groups of H/J query heads share a key and value head. On CUDA in bfloat16 or float16 only.

    Args:
        begin, length: of the entries, from `entries_of`; every position must be in one.
        window: positions seen, itself included; None for all.
    """
    return packed_attention_operator(q_THE, k_TJE, v_TJE, begin, length, window)[0]


@library.custom_op("bytelatent::packed_attention", mutates_args=())
def packed_attention_operator(
    q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, begin: Tensor, length: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Also gives, for the gradients, the logarithms of the sums of the weights, float32 [T, H]."""
    q, k, v = (x.contiguous() for x in (q_THE, k_TJE, v_TJE))
    if not q.is_cuda:
        return plain_packed_attention(q, k, v, begin, window)
    from bytelatent.kernels import packed_attention_cudnn

    return packed_attention_cudnn.cudnn_attention(q, k, v, begin, length, window)


@library.custom_op("bytelatent::packed_attention_backward", mutates_args=())
def packed_attention_backward_operator(
    d_out: Tensor,
    q_THE: Tensor,
    k_TJE: Tensor,
    v_TJE: Tensor,
    begin: Tensor,
    length: Tensor,
    window: int | None,
    out_THE: Tensor,
    logsum_TH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_out, q, k, v = (x.contiguous() for x in (d_out, q_THE, k_TJE, v_TJE))
    if not q.is_cuda:
        return plain_packed_attention_backward(d_out, q, k, v, begin, window, out_THE, logsum_TH)
    from bytelatent.kernels import packed_attention_cudnn

    return packed_attention_cudnn.cudnn_attention_backward(d_out, q, k, v, begin, length, window, out_THE, logsum_TH)


@packed_attention_operator.register_fake
def _(q_THE: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q_THE.new_empty(q_THE.shape), q_THE.new_empty(q_THE.shape[:2], dtype=torch.float32)


@packed_attention_backward_operator.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, d_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *inputs, out_THE, logsum_TH = ctx.saved_tensors
    return *packed_attention_backward_operator(d_out, *inputs, ctx.window, out_THE, logsum_TH), None, None, None


packed_attention_operator.register_autograd(_gradients, setup_context=_keep)


def plain_packed_attention(
    q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor, begin: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    with torch.autocast(q_THE.device.type, enabled=False):
        scores_HTT = _scores(q_THE, k_TJE, begin, window)
        logsum_HT = scores_HTT.logsumexp(-1)
        weight_HTT = (scores_HTT - logsum_HT.unsqueeze(-1)).exp()
        out_THE = torch.einsum("hqk,khe->qhe", weight_HTT, _for_all_heads(v_TJE, q_THE))
    return out_THE.to(q_THE.dtype).contiguous(), logsum_HT.T.contiguous()


def plain_packed_attention_backward(
    d_out: Tensor,
    q_THE: Tensor,
    k_TJE: Tensor,
    v_TJE: Tensor,
    begin: Tensor,
    window: int | None,
    out_THE: Tensor,
    logsum_TH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (_for_all_heads(x, q_THE) for x in (k_TJE, v_TJE))
    q, d_out, scale = q_THE.float(), d_out.float(), q_THE.shape[-1] ** -0.5
    weight_HTT = (_scores(q_THE, k_TJE, begin, window) - logsum_TH.T.unsqueeze(-1)).exp()
    d_weight_HTT = torch.einsum("qhe,khe->hqk", d_out, v) - (d_out * out_THE).sum(-1).T.unsqueeze(-1)
    d_scores_HTT = weight_HTT * d_weight_HTT * scale
    d_q = torch.einsum("hqk,khe->qhe", d_scores_HTT, k)
    d_k, d_v = (torch.einsum("hqk,qhe->khe", *x) for x in ((d_scores_HTT, q), (weight_HTT, d_out)))
    shared = k_TJE.shape[1], -1
    d_k, d_v = (x.unflatten(1, shared).sum(2).to(k_TJE.dtype).contiguous() for x in (d_k, d_v))
    return d_q.to(q_THE.dtype).contiguous(), d_k, d_v


def _scores(q_THE: Tensor, k_TJE: Tensor, begin: Tensor, window: int | None) -> Tensor:
    """Scores in float32, [H, T, T]; minus infinity where a position is not seen."""
    place = torch.arange(len(q_THE), device=q_THE.device)
    entry = torch.searchsorted(begin, place, right=True)
    distance = place[:, None] - place
    seen_TT = (entry[:, None] == entry) & (distance >= 0)
    if window is not None:
        seen_TT &= distance < window
    scores = torch.einsum("qhe,khe->hqk", q_THE.float(), _for_all_heads(k_TJE, q_THE)) * q_THE.shape[-1] ** -0.5
    return scores.masked_fill(~seen_TT, -torch.inf)


def _for_all_heads(x_TJE: Tensor, q_THE: Tensor) -> Tensor:
    """Each query head's keys, or values, in float32, [T, H, E]."""
    return x_TJE.float().repeat_interleave(q_THE.shape[1] // x_TJE.shape[1], dim=1)


@cache
def _has_graphs(device: torch.device, size: int, entries: int, heads: Heads, window: int | None) -> bool:
    from bytelatent.kernels import packed_attention_cudnn

    try:
        packed_attention_cudnn.make_graphs(device, size, entries, window, *heads)
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"cuDNN does not compute attention on {name}, FlexAttention does: {error}", stacklevel=2)
        return False
    return True
