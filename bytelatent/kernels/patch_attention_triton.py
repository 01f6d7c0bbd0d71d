"""The Triton side of `patch_attention`.

A program is one warp. It holds all K queries or keys of a patch for a few heads, and walks over the bytes in blocks, so
that sums over bytes and keys stay within a thread and only those over a head's elements pass between threads.
"""

import triton
import triton.language as tl

from bytelatent.kernels import window_attention
from bytelatent.kernels.decode_attention_triton import LOWEST

LOG2_E = tl.constexpr(window_attention.LOG2_E)


@triton.jit
def higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


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
    """`exact_ptr` gets the result in float32, `weight_ptr` the logarithms, to base 2, of the sums of the weights."""
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
    """A program takes BLOCK bytes, of whichever patches: there is nothing to sum up, and keys are read from the cache.

    STAGES is not used; it is there because all attention kernels are launched alike.
    """
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
    """The weights are found anew: they are few, and of one patch's keys."""
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
