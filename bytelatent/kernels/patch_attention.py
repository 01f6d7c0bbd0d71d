# pyright: reportInvalidTypeForm=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
"""Cross-attention between bytes and patches: not masked attention, but linear in T, without a T x P matrix.

Encoder: a patch's queries see only its own bytes, so the softmax runs over segments of the stream.
Decoder: a byte sees only the K keys of the patch it reads, so its keys are gathered.

The bytes of a patch are adjacent, and so are those that read one. So on CUDA a kernel walks over these ranges: nothing
is copied to every byte, nothing is added atomically, and sums are always in the same order. A program is one warp. It
holds all K queries or keys of a patch for a few heads, and walks over the bytes in blocks, so that sums over bytes and
keys stay within a thread and only those over a head's elements pass between threads. Operators take tensors of any
strides, return contiguous ones of the same dtype, have gradients, and do not break a compiled graph.

Source: Pagnoni et al. 2024, sections 3.2.2 and 3.3.1.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from bytelatent.kernels import launch
from bytelatent.kernels.launch import LOWEST, power_of_two, tl, triton

# Shapes: T bytes in the batch, P patches, K queries or keys per patch, D local width, H heads, E head size

WIDTH = 256  # elements of a row that a program, which is one warp, works on; fewer where K is above 4
BLOCK = 4  # rows that it loads at once
STAGES = 1  # blocks in memory at once, of which a program works on one
LOG2_E = tl.constexpr(launch.LOG2_E)


@dataclass(frozen=True)
class ByteRanges:
    """Which bytes belong to which patch: those in it, or those that read it. Built once a batch, for all layers."""

    patch_T: Tensor  # the patch of each byte, never decreasing; -1: none
    begin: Tensor  # [P+1] int32, where each patch's bytes begin, and T; bytes of no patch may lie in any range

    @classmethod
    def of(cls, patch_T: Tensor, num_patches: int) -> "ByteRanges":
        """The ranges of bytes in a patch (a stream's `patch`), or of those that read one (its `read`)."""
        order_T = patch_T.clamp(min=0).cummax(0).values
        patches = torch.arange(num_patches + 1, device=patch_T.device)
        return cls(patch_T, torch.searchsorted(order_T, patches, out_int32=True))

    @property
    def num_patches(self) -> int:
        return self.begin.shape[0] - 1


def encoder_cross_attention(q_PKHE: Tensor, k_THE: Tensor, v_THE: Tensor, ranges: ByteRanges) -> Tensor:
    """Each patch's queries attend to the patch's bytes, [P, K, H, E] in the queries' dtype, computed in float32.

    Args:
        q_PKHE: queries.
        k_THE, v_THE: keys and values of the bytes.
        ranges: the bytes in each patch; every byte is in one. The result is zero for a patch without bytes.
    """
    if takes_kernels(q_PKHE):
        return own_bytes_operator(q_PKHE, k_THE, v_THE, ranges.begin)[0]
    return plain_encoder_cross_attention(q_PKHE, k_THE, v_THE, ranges)


def plain_encoder_cross_attention(q_PKHE: Tensor, k_THE: Tensor, v_THE: Tensor, ranges: ByteRanges) -> Tensor:
    num_patches, num_queries, num_heads, head_dim = q_PKHE.shape
    patch = ranges.patch_T
    q, k, v = (_wide(x) for x in (q_PKHE, k_THE, v_THE))
    score_TKH = (q.index_select(0, patch) * k.unsqueeze(1)).sum(-1) * head_dim**-0.5
    lowest = score_TKH.new_full([num_patches, num_queries, num_heads], -torch.inf)
    index_TKH = patch[:, None, None].expand_as(score_TKH)
    highest = lowest.scatter_reduce(0, index_TKH, score_TKH.detach(), "amax")  # only steadies the exponential
    weight_TKH = (score_TKH - highest.index_select(0, patch)).exp()
    total_PKH = torch.zeros_like(lowest).index_add(0, patch, weight_TKH)
    weighted = weight_TKH.unsqueeze(-1) * v.unsqueeze(1)
    sum_PKHE = weighted.new_zeros(q_PKHE.shape).index_add(0, patch, weighted)
    out = sum_PKHE / total_PKH.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return out.to(q_PKHE.dtype)


def decoder_cross_attention(q_THE: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, ranges: ByteRanges) -> Tensor:
    """Each byte attends to the K keys of the patch it reads, [T, H, E] in the queries' dtype, computed in float32.

    Args:
        q_THE: queries of the bytes.
        k_PKHE, v_PKHE: keys and values of the patches.
        ranges: the bytes that read each patch. The result is zero for a byte that reads none.
    """
    if takes_kernels(q_THE):
        return read_patch_operator(q_THE, k_PKHE, v_PKHE, ranges.patch_T, ranges.begin)
    return plain_decoder_cross_attention(q_THE, k_PKHE, v_PKHE, ranges)


def plain_decoder_cross_attention(q_THE: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, ranges: ByteRanges) -> Tensor:
    read = ranges.patch_T
    place = read.clamp(min=0)
    k_TKHE, v_TKHE = (_wide(x).index_select(0, place) for x in (k_PKHE, v_PKHE))
    score_TKH = (_wide(q_THE).unsqueeze(1) * k_TKHE).sum(-1) * q_THE.shape[-1] ** -0.5
    out_THE = (score_TKH.softmax(dim=1).unsqueeze(-1) * v_TKHE).sum(dim=1)
    return torch.where((read >= 0)[:, None, None], out_THE, 0.0).to(q_THE.dtype)


def takes_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def _wide(x: Tensor) -> Tensor:
    """What to compute in: float32, or float64 where the input is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Operators


@library.custom_op("bytelatent::own_bytes", mutates_args=())
def own_bytes_operator(q_PKHE: Tensor, k_THE: Tensor, v_THE: Tensor, begin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Also gives, for the gradients, the result in float32, as a rounded one would give even a patch of one byte some,
    and the logarithms, to base 2, of the sums of the weights, [P, K, H]."""
    found = _empty_own_bytes(q_PKHE)
    q, k, v = (x.contiguous() for x in (q_PKHE, k_THE, v_THE))
    _launch_attention(own_bytes_kernel, begin.shape[0] - 1, q.shape[1:], q, k, v, begin, *found)
    return found


@library.custom_op("bytelatent::own_bytes_backward", mutates_args=())
def own_bytes_backward_operator(
    d_out_PKHE: Tensor, q_PKHE: Tensor, k_THE: Tensor, v_THE: Tensor, begin: Tensor, exact: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(d_out_PKHE, q_PKHE, k_THE, v_THE)
    d_out, q, k, v = (x.contiguous() for x in (d_out_PKHE, q_PKHE, k_THE, v_THE))
    arguments = (q, k, v, begin, exact, weight, d_out, *gradients)
    _launch_attention(own_bytes_backward_kernel, begin.shape[0] - 1, q.shape[1:], *arguments)
    return gradients


@library.custom_op("bytelatent::read_patch", mutates_args=())
def read_patch_operator(q_THE: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, read_T: Tensor, begin: Tensor) -> Tensor:
    """`begin` is for the gradients."""
    out_THE = q_THE.new_empty(q_THE.shape)
    q, k, v = (x.contiguous() for x in (q_THE, k_PKHE, v_PKHE))
    size = q.shape[0]
    _launch_attention(read_patch_kernel, -(-size // BLOCK), k.shape[1:], q, k, v, read_T, out_THE, size)
    return out_THE


@library.custom_op("bytelatent::read_patch_backward", mutates_args=())
def read_patch_backward_operator(
    d_out_THE: Tensor, q_THE: Tensor, k_PKHE: Tensor, v_PKHE: Tensor, read_T: Tensor, begin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _empty_gradients(d_out_THE, q_THE, k_PKHE, v_PKHE)
    d_out, q, k, v = (x.contiguous() for x in (d_out_THE, q_THE, k_PKHE, v_PKHE))
    arguments = (q, k, v, read_T, begin, d_out, *gradients)
    _launch_attention(read_patch_backward_kernel, begin.shape[0] - 1, k.shape[1:], *arguments)
    return gradients


def _save_for_own_bytes(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, exact, weight = output
    ctx.mark_non_differentiable(exact, weight)
    ctx.save_for_backward(*inputs, exact, weight)


def _own_bytes_gradients(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *own_bytes_backward_operator(d_out, *ctx.saved_tensors), None


def _read_patch_gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    return *read_patch_backward_operator(d_out, *ctx.saved_tensors), None, None


def _empty_gradients(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


own_bytes_operator.register_fake(lambda q_PKHE, *_: _empty_own_bytes(q_PKHE))
own_bytes_operator.register_autograd(_own_bytes_gradients, setup_context=_save_for_own_bytes)
own_bytes_backward_operator.register_fake(_empty_gradients)
read_patch_operator.register_fake(lambda q_THE, *_: q_THE.new_empty(q_THE.shape))
read_patch_operator.register_autograd(
    _read_patch_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
read_patch_backward_operator.register_fake(_empty_gradients)


def _empty_own_bytes(q_PKHE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact, weight = (q_PKHE.new_empty(shape, dtype=torch.float32) for shape in (q_PKHE.shape, q_PKHE.shape[:-1]))
    return q_PKHE.new_empty(q_PKHE.shape), exact, weight


def _launch_attention(kernel: Any, pieces: int, shape: torch.Size, *arguments: Any) -> None:
    """Run a program for a few heads of each piece, which is a patch, or BLOCK bytes."""
    num_keys, heads, head_dim = shape  # K, H, E
    padded = power_of_two(head_dim)
    width = min(WIDTH, 1024 // power_of_two(num_keys))  # a program holds two such rows for each of the K, or three
    at_once = min(power_of_two(heads), max(width // padded, 1))
    if pieces > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(pieces * -(-heads // at_once),)](
                *arguments, head_dim**-0.5, K=num_keys, H=heads, HEADS=at_once, E=head_dim, PADDED_E=padded,
                BLOCK=BLOCK, STAGES=STAGES, num_warps=1,
            )  # fmt: skip


# Kernels


@triton.jit
def patch_of_program(begin_ptr, PARTS: tl.constexpr):
    """The patch, where its bytes begin and end, and which of PARTS parts of the width is this program's.

    The last patches come first: padding is in the last one, and so the longest walk does not begin at the end.
    """
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    patch = (number // PARTS).to(tl.int64)
    begin, end = tl.load(begin_ptr + patch).to(tl.int64), tl.load(begin_ptr + patch + 1).to(tl.int64)
    return patch, begin, end, number % PARTS


@triton.jit
def columns_of_heads(first, H: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr):
    """Where HEADS heads lie in a row of H heads, and which of these places exist, [HEADS, PADDED_E]."""
    head, e = first + tl.arange(0, HEADS), tl.arange(0, PADDED_E)
    return head[:, None] * E + e[None, :], (head < H)[:, None] & (e < E)[None, :]


@triton.jit
def rows_of(ptr, first, end, column, exists, NUMBER: tl.constexpr, ROW: tl.constexpr):
    """Rows `first` to `first + NUMBER - 1`, those from `end` on as zeros, each [HEADS, PADDED_E]."""
    rows = ()
    for i in tl.static_range(NUMBER):
        place, within = (first + i) * ROW + column, exists & (first + i < end)
        rows += (tl.load(ptr + place, mask=within, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def repeated(x, NUMBER: tl.constexpr):
    rows = ()
    for _ in tl.static_range(NUMBER):
        rows += (x,)
    return rows


@triton.jit
def own_bytes_kernel(
    q_ptr, k_ptr, v_ptr, begin_ptr, out_ptr, exact_ptr, weight_ptr, scale, K: tl.constexpr, H: tl.constexpr,
    HEADS: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    patch, begin, end, part = patch_of_program(begin_ptr, tl.cdiv(H, HEADS))
    column, exists = columns_of_heads(part * HEADS, H, HEADS, E, PADDED_E)
    q = rows_of(q_ptr, patch * K, patch * K + K, column, exists, K, H * E)
    highest = repeated(tl.full([HEADS], LOWEST, tl.float32), K)
    total = repeated(tl.zeros([HEADS], tl.float32), K)
    acc = repeated(tl.zeros([HEADS, PADDED_E], tl.float32), K)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        k = rows_of(k_ptr, first, end, column, exists, BLOCK, H * E)
        v = rows_of(v_ptr, first, end, column, exists, BLOCK, H * E)
        next_highest, next_total, next_acc = (), (), ()
        for query in tl.static_range(K):
            score, top = (), highest[query]
            for i in tl.static_range(BLOCK):
                score += (tl.where(first + i < end, tl.sum(q[query] * k[i], 1) * (scale * LOG2_E), LOWEST),)
                top = tl.maximum(top, score[i])
            shrink = tl.exp2(highest[query] - top)
            one_total, one_acc = total[query] * shrink, acc[query] * shrink[:, None]
            for i in tl.static_range(BLOCK):
                weight = tl.exp2(score[i] - top)
                one_total += weight
                one_acc += weight[:, None] * v[i]
            next_highest += (top,)
            next_total += (one_total,)
            next_acc += (one_acc,)
        highest, total, acc = next_highest, next_total, next_acc
    head = part * HEADS + tl.arange(0, HEADS)
    for query in tl.static_range(K):
        row = patch * K + query
        all_weight = tl.where(begin < end, total[query], 1.0)
        out = acc[query] / all_weight[:, None]
        tl.store(out_ptr + row * (H * E) + column, out.to(out_ptr.dtype.element_ty), mask=exists)
        tl.store(exact_ptr + row * (H * E) + column, out, mask=exists)
        tl.store(weight_ptr + row * H + head, highest[query] + tl.log2(all_weight), mask=head < H)


@triton.jit
def own_bytes_backward_kernel(
    q_ptr, k_ptr, v_ptr, begin_ptr, exact_ptr, weight_ptr, d_out_ptr, d_q_ptr, d_k_ptr, d_v_ptr, scale,
    K: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    patch, begin, end, part = patch_of_program(begin_ptr, tl.cdiv(H, HEADS))
    column, exists = columns_of_heads(part * HEADS, H, HEADS, E, PADDED_E)
    head = part * HEADS + tl.arange(0, HEADS)
    q = rows_of(q_ptr, patch * K, patch * K + K, column, exists, K, H * E)
    out = rows_of(exact_ptr, patch * K, patch * K + K, column, exists, K, H * E)
    d_out = rows_of(d_out_ptr, patch * K, patch * K + K, column, exists, K, H * E)
    found, all_weight = (), ()
    for query in tl.static_range(K):
        found += (tl.sum(out[query] * d_out[query], 1),)
        all_weight += (tl.load(weight_ptr + (patch * K + query) * H + head, mask=head < H, other=0.0),)
    d_q = repeated(tl.zeros([HEADS, PADDED_E], tl.float32), K)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        k = rows_of(k_ptr, first, end, column, exists, BLOCK, H * E)
        v = rows_of(v_ptr, first, end, column, exists, BLOCK, H * E)
        for i in tl.static_range(BLOCK):
            d_k = tl.zeros([HEADS, PADDED_E], tl.float32)
            d_v = tl.zeros([HEADS, PADDED_E], tl.float32)
            next_d_q = ()
            for query in tl.static_range(K):
                weight = tl.exp2(tl.sum(q[query] * k[i], 1) * (scale * LOG2_E) - all_weight[query])
                d_score = (weight * (tl.sum(d_out[query] * v[i], 1) - found[query]) * scale)[:, None]
                next_d_q += (d_q[query] + tl.where(first + i < end, d_score, 0.0) * k[i],)
                d_k += d_score * q[query]
                d_v += weight[:, None] * d_out[query]
            d_q = next_d_q
            place, within = (first + i) * (H * E) + column, exists & (first + i < end)
            tl.store(d_k_ptr + place, d_k.to(d_k_ptr.dtype.element_ty), mask=within)
            tl.store(d_v_ptr + place, d_v.to(d_v_ptr.dtype.element_ty), mask=within)
    for query in tl.static_range(K):
        place = (patch * K + query) * (H * E) + column
        tl.store(d_q_ptr + place, d_q[query].to(d_q_ptr.dtype.element_ty), mask=exists)


@triton.jit
def read_patch_kernel(
    q_ptr, k_ptr, v_ptr, read_ptr, out_ptr, size, scale, K: tl.constexpr, H: tl.constexpr,
    HEADS: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK bytes, of whichever patches, as nothing is summed over them. STAGES is not used."""
    PARTS: tl.constexpr = tl.cdiv(H, HEADS)
    column, exists = columns_of_heads(tl.program_id(0) % PARTS * HEADS, H, HEADS, E, PADDED_E)
    byte = tl.program_id(0) // PARTS * BLOCK + tl.arange(0, BLOCK)
    read = tl.load(read_ptr + byte, mask=byte < size, other=-1)
    place = byte.to(tl.int64)[:, None, None] * (H * E) + column[None]
    q = tl.load(q_ptr + place, mask=(byte < size)[:, None, None] & exists[None], other=0.0).to(tl.float32)
    at_k = read.to(tl.int64)[:, None, None] * (K * H * E) + column[None]
    within = (read >= 0)[:, None, None] & exists[None]
    highest = tl.full([BLOCK, HEADS], LOWEST, tl.float32)
    total = tl.zeros([BLOCK, HEADS], tl.float32)
    acc = tl.zeros([BLOCK, HEADS, PADDED_E], tl.float32)
    for key in tl.static_range(K):
        k = tl.load(k_ptr + at_k + key * (H * E), mask=within, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at_k + key * (H * E), mask=within, other=0.0).to(tl.float32)
        score = tl.sum(q * k, 2) * (scale * LOG2_E)
        now_highest = tl.maximum(highest, score)
        weight = tl.exp2(score - now_highest)
        shrink = tl.exp2(highest - now_highest)
        total = total * shrink + weight
        acc = acc * shrink[:, :, None] + weight[:, :, None] * v
        highest = now_highest
    out = (acc / total[:, :, None]).to(out_ptr.dtype.element_ty)  # zero where nothing is read: so were the values
    tl.store(out_ptr + place, out, mask=(byte < size)[:, None, None] & exists[None])


@triton.jit
def read_patch_backward_kernel(
    q_ptr, k_ptr, v_ptr, read_ptr, begin_ptr, d_out_ptr, d_q_ptr, d_k_ptr, d_v_ptr, scale,
    K: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr, PADDED_E: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Recomputes the weights: they are few, one patch's keys only."""
    patch, begin, end, part = patch_of_program(begin_ptr, tl.cdiv(H, HEADS))
    column, exists = columns_of_heads(part * HEADS, H, HEADS, E, PADDED_E)
    k = rows_of(k_ptr, patch * K, patch * K + K, column, exists, K, H * E)
    v = rows_of(v_ptr, patch * K, patch * K + K, column, exists, K, H * E)
    d_k = repeated(tl.zeros([HEADS, PADDED_E], tl.float32), K)
    d_v = repeated(tl.zeros([HEADS, PADDED_E], tl.float32), K)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        q = rows_of(q_ptr, first, end, column, exists, BLOCK, H * E)
        d_out = rows_of(d_out_ptr, first, end, column, exists, BLOCK, H * E)
        for i in tl.static_range(BLOCK):
            byte = first + i
            reads = tl.load(read_ptr + byte, mask=byte < end, other=-1) >= 0
            score, top = (), tl.full([HEADS], LOWEST, tl.float32)
            for key in tl.static_range(K):
                score += (tl.sum(q[i] * k[key], 1) * (scale * LOG2_E),)
                top = tl.maximum(top, score[key])
            weight, total = (), tl.zeros([HEADS], tl.float32)
            for key in tl.static_range(K):
                weight += (tl.exp2(score[key] - top),)
                total += weight[key]
            share = tl.where(reads, 1.0 / total, 0.0)
            found, all_found = (), tl.zeros([HEADS], tl.float32)
            for key in tl.static_range(K):
                found += (tl.sum(d_out[i] * v[key], 1),)
                all_found += weight[key] * share * found[key]
            d_q = tl.zeros([HEADS, PADDED_E], tl.float32)
            next_d_k, next_d_v = (), ()
            for key in tl.static_range(K):
                d_score = (weight[key] * share * (found[key] - all_found) * scale)[:, None]
                d_q += d_score * k[key]
                next_d_k += (d_k[key] + d_score * q[i],)
                next_d_v += (d_v[key] + (weight[key] * share)[:, None] * d_out[i],)
            d_k, d_v = next_d_k, next_d_v
            place = byte * (H * E) + column
            tl.store(d_q_ptr + place, d_q.to(d_q_ptr.dtype.element_ty), mask=exists & (byte < end))
    for key in tl.static_range(K):
        place = (patch * K + key) * (H * E) + column
        tl.store(d_k_ptr + place, d_k[key].to(d_k_ptr.dtype.element_ty), mask=exists)
        tl.store(d_v_ptr + place, d_v[key].to(d_v_ptr.dtype.element_ty), mask=exists)
