"""The Triton side of `decode_attention`."""

import triton
import triton.language as tl

from bytelatent.kernels.overlap_triton import wait_for_earlier
from bytelatent.kernels.window_attention_triton import turned

LOWEST = tl.constexpr(-1e30)  # no score is as low; an infinity would make NaN of its differences


@triton.jit
def seen_by_lanes(q, k, v, seen, scale, highest, total, acc):
    """One key for each lane of a block: every lane keeps a softmax of its own, so that the loop sums over no lanes."""
    score = tl.where(seen, tl.sum(k * q[None, :], 1) * scale, LOWEST)
    higher = tl.maximum(highest, score)
    weight = tl.where(seen, tl.exp2(score - higher), 0.0)
    shrink = tl.exp2(highest - higher)
    return higher, total * shrink + weight, acc * shrink[:, None] + weight[:, None] * v


@triton.jit
def joined_lanes(highest, total, acc):
    """The softmax of all lanes."""
    higher = tl.max(highest, 0)
    shrink = tl.exp2(highest - higher)
    return higher, tl.sum(total * shrink, 0), tl.sum(acc * shrink[:, None], 0)


@triton.jit
def share_of_split(low, position, split, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The cached positions that this program looks at."""
    share = tl.cdiv(tl.cdiv(position - low, SPLITS), BLOCK) * BLOCK
    begin = low + split * share
    return begin, tl.minimum(begin + share, position)


@triton.jit
def deliver(
    acc, total, highest, query, within, place, out_ptr, found_ptr, weights_ptr, arrived_ptr, arrived_at, split,
    SPLITS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write what was found; with splits, leave it to the one that finishes last.

    Args:
        acc, total, highest: [QUERIES, E], [QUERIES], [QUERIES], over this program's keys.
        query, within: [QUERIES] the number of each query of all, and whether there is such a query.
        place: [QUERIES, E] in the output.
    """
    e = tl.arange(0, E)[None, :]
    inside = within[:, None] & (e < E)
    if SPLITS == 1:
        tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        part = query * SPLITS + split
        tl.store(found_ptr + part[:, None] * E + e, acc, mask=inside)
        tl.store(weights_ptr + part * 2, highest, mask=within)
        tl.store(weights_ptr + part * 2 + 1, total, mask=within)
        tl.debug_barrier()  # all threads have written before one of them says so
        arrived = tl.atomic_add(arrived_ptr + arrived_at, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            UNROLL: tl.constexpr = SPLITS if acc.shape[0] <= 16 and SPLITS <= 8 else 2
            all_acc = tl.zeros_like(acc)
            all_total = tl.zeros_like(total)
            all_highest = tl.full(highest.shape, LOWEST, tl.float32)
            for other in tl.range(0, SPLITS, loop_unroll_factor=UNROLL):
                part = query * SPLITS + other
                acc = tl.load(found_ptr + part[:, None] * E + e, mask=inside, other=0.0, cache_modifier=".cg")
                highest = tl.load(weights_ptr + part * 2, mask=within, other=0.0, cache_modifier=".cg")
                total = tl.load(weights_ptr + part * 2 + 1, mask=within, other=1.0, cache_modifier=".cg")
                higher = tl.maximum(all_highest, highest)
                before, now = tl.exp2(all_highest - higher), tl.exp2(highest - higher)
                all_acc = all_acc * before[:, None] + acc * now[:, None]
                all_total = all_total * before + total * now
                all_highest = higher
            tl.store(out_ptr + place, (all_acc / all_total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(arrived_ptr + arrived_at, 0)


@triton.jit
def attend_one(
    qkv_ptr, k_ptr, v_ptr, position_ptr, rotary_ptr, row_ptr, out_ptr, run_ptr, found_ptr, weights_ptr, arrived_ptr,
    scale, qkv_row, out_row, R, WINDOW: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    J: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One new position, and no two heads share keys."""
    b, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    row = b
    if row_ptr is not None:
        row = tl.load(row_ptr + b).to(tl.int32)
        if row < 0:
            return
    position = tl.load(position_ptr + b).to(tl.int32)
    e, angle = tl.arange(0, E), tl.arange(0, E // 2)
    cos = tl.load(rotary_ptr + position * E + 2 * angle)[None, :]
    sin = tl.load(rotary_ptr + position * E + 2 * angle + 1)[None, :]
    at_q = qkv_ptr + b.to(tl.int64) * qkv_row + head * E + e
    q, k_new, v_new = tl.load(at_q), tl.load(at_q + J * E), tl.load(at_q + 2 * J * E).to(v_ptr.dtype.element_ty)
    q = tl.reshape(turned(q[None, :].to(tl.float32), cos, sin, 1, E), [E]).to(q.dtype).to(tl.float32)
    k_new = tl.reshape(turned(k_new[None, :].to(tl.float32), cos, sin, 1, E), [E]).to(k_ptr.dtype.element_ty)
    keys = k_ptr + row.to(tl.int64) * (R * J * E) + head * E
    values = v_ptr + row.to(tl.int64) * (R * J * E) + head * E
    if split == 0 and (WINDOW > 0) | (position < R):
        tl.store(keys + position % R * (J * E) + e, k_new)
        tl.store(values + position % R * (J * E) + e, v_new)
    low = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    begin, end = share_of_split(low, position, split, SPLITS, BLOCK)
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, E], tl.float32)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        seen = at < end
        place = (at % R)[:, None] * (J * E) + e[None, :]
        k = tl.load(keys + place, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=seen[:, None], other=0.0).to(tl.float32)
        highest, total, acc = seen_by_lanes(q, k, v, seen, scale, highest, total, acc)
    old_highest, old_total, old_acc = joined_lanes(highest, total, acc)
    # The new position sees itself, in the first split.
    own = tl.where(split == 0, tl.sum(q * k_new.to(tl.float32), 0) * scale, LOWEST)
    higher = tl.maximum(old_highest, own)
    shrink, weight = tl.exp2(old_highest - higher), tl.where(split == 0, tl.exp2(own - higher), 0.0)
    acc = (old_acc * shrink + weight * v_new.to(tl.float32))[None, :]
    one = tl.zeros([1], tl.int32)
    zero = one.to(tl.float32)
    deliver(
        acc, zero + (old_total * shrink + weight), zero + higher, one + (b * H + head), one == 0,
        b.to(tl.int64) * out_row + head * E + e[None, :], out_ptr, found_ptr, weights_ptr, arrived_ptr, b * J + head,
        split, SPLITS, E,
    )  # fmt: skip


@triton.jit
def seen_block(q, k, v, seen, scale, highest, total, acc):
    """Several queries, [QUERIES, E], a block of keys and values, [BLOCK, E], and which keys each sees."""
    score = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, LOWEST)
    higher = tl.maximum(highest, tl.max(score, 1))
    weight = tl.where(seen, tl.exp2(score - higher[:, None]), 0.0)
    shrink = tl.exp2(highest - higher)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(weight, 1), acc


@triton.jit
def attend_several(
    qkv_ptr, k_ptr, v_ptr, position_ptr, rotary_ptr, row_ptr, out_ptr, run_ptr, found_ptr, weights_ptr, arrived_ptr,
    scale, qkv_row, out_row, R, WINDOW: tl.constexpr, S: tl.constexpr, H: tl.constexpr,
    J: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    QUERIES: tl.constexpr, NEW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Several new positions, or heads that share keys: query i is head i mod G of the group at new position i / G."""
    G: tl.constexpr = H // J
    b, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    row = b
    if row_ptr is not None:
        row = tl.load(row_ptr + b).to(tl.int32)
        if row < 0:
            return
    position = tl.load(position_ptr + b).to(tl.int32)
    e, angle = tl.arange(0, E)[None, :], tl.arange(0, E // 2)[None, :]
    query = tl.arange(0, QUERIES)
    within = query < S * G
    step = tl.minimum(query // G, S - 1)  # what lies past the last position repeats it
    head = group * G + query % G
    at = (b * S + step).to(tl.int64)[:, None]
    turn = rotary_ptr + (position + step)[:, None] * E + 2 * angle
    q = tl.load(qkv_ptr + at * qkv_row + head[:, None] * E + e)
    q = turned(q.to(tl.float32), tl.load(turn), tl.load(turn + 1), QUERIES, E).to(k_ptr.dtype.element_ty)

    new = tl.arange(0, NEW)
    new_step = tl.minimum(new, S - 1)
    at_new = (b * S + new_step).to(tl.int64)[:, None] * qkv_row + (H + group) * E + e
    turn = rotary_ptr + (position + new_step)[:, None] * E + 2 * angle
    k_new, v_new = tl.load(qkv_ptr + at_new), tl.load(qkv_ptr + at_new + J * E).to(v_ptr.dtype.element_ty)
    k_new = turned(k_new.to(tl.float32), tl.load(turn), tl.load(turn + 1), NEW, E).to(k_ptr.dtype.element_ty)
    keys = k_ptr + row.to(tl.int64) * (R * J * E) + group * E
    values = v_ptr + row.to(tl.int64) * (R * J * E) + group * E
    stored = (new < S) & (split == 0)
    if WINDOW == 0:
        stored = stored & (position + new < R)
    slot = ((position + new) % R)[:, None] * (J * E) + e
    tl.store(keys + slot, k_new, mask=stored[:, None])
    tl.store(values + slot, v_new, mask=stored[:, None])

    low = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    begin, end = share_of_split(low, position, split, SPLITS, BLOCK)
    highest = tl.full([QUERIES], LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, E], tl.float32)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at_key = first + tl.arange(0, BLOCK)
        place = (at_key % R)[:, None] * (J * E) + e
        k = tl.load(keys + place, mask=(at_key < end)[:, None], other=0.0)
        v = tl.load(values + place, mask=(at_key < end)[:, None], other=0.0)
        seen = (at_key < end)[None, :] & (query >= 0)[:, None]
        if WINDOW > 0:
            seen = seen & (at_key[None, :] > (position + step)[:, None] - WINDOW)
        highest, total, acc = seen_block(q, k, v, seen, scale, highest, total, acc)
    seen = (new[None, :] <= step[:, None]) & (split == 0)
    if WINDOW > 0:
        seen = seen & (new[None, :] > step[:, None] - WINDOW)
    highest, total, acc = seen_block(q, k_new, v_new, seen, scale, highest, total, acc)
    deliver(
        acc, total, highest, (b * S + step) * H + head, within, at * out_row + head[:, None] * E + e, out_ptr,
        found_ptr, weights_ptr, arrived_ptr, b * J + group, split, SPLITS, E,
    )  # fmt: skip
