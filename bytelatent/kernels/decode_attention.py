# pyright: reportInvalidTypeForm=false
"""Attention of the newest position of several sequences over their KV caches, for decode steps.

The kernel takes queries, keys and values as one product wrote them, rotates them by their positions, puts the new
keys and values into the cache and attends, all at once. A cache is a ring: position p is in slot p mod R. The new
position's key is used from where it was computed; nothing that a launch writes is read by it.

A cache may hold 8-bit keys and values with a scale per head and position; the new ones are quantized before they are
attended to, as they will be read later.

Where keys are many and sequences few, several programs share the keys of one head. The last of them to finish joins
what they found, always in the same order.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bytelatent.kernels.launch import (
    LOG2_E,
    LOWEST,
    array,
    attend_array,
    check_contiguous,
    launch_options,
    power_of_two,
    tensor_like,
    tl,
    triton,
    uses_kernels,
    wait_for_earlier,
    write_back,
)
from bytelatent.kernels.quantized_heads import held_heads, numbers_of_heads, quantize_heads, store_new
from bytelatent.kernels.rotary import rotated

# Shapes: B sequences, H query heads, J key/value heads, E head size, A = E/2 pairs, C rows of the
# cache, R slots of a row
# Z = H + 2J heads of queries, keys and values together, G queries that share a key

PROGRAMS = 132  # that run at once on the GPU that the launches are chosen for


class AttentionLaunch(NamedTuple):
    """How the attention is cut into programs.

    Attributes:
        block: keys that a program reads at once, a power of two, from 16 on.
        splits: programs that share the keys of a head of a sequence.
    """

    block: int
    splits: int
    num_warps: int
    num_stages: int


class SplitScratch(NamedTuple):
    """What programs that share keys leave for each other; calls that follow one another may use the same."""

    found: Tensor  # [B*H, splits, E]
    weights: Tensor  # [B*H, splits, 2]: the highest score and the sum of the weights
    arrived: Tensor  # [B*J] programs that are done, 0 between launches


def split_scratch(sequences: int, heads: int, head_dim: int, splits: int, device: torch.device | str) -> SplitScratch:
    found = torch.empty(sequences * heads, splits, head_dim, device=device)
    weights = torch.empty(sequences * heads, splits, 2, device=device)
    return SplitScratch(found, weights, torch.zeros(sequences * heads, dtype=torch.int32, device=device))


def launch_for_attention(sequences: int, heads: int, kv_heads: int, reach: int) -> AttentionLaunch:
    """The launch for attention to `reach` positions at most: the window, or the slots of a row."""
    splits, programs = 1, sequences * kv_heads
    while splits < 8 and programs * splits * 2 <= PROGRAMS and reach >= splits * 2 * 32:
        splits *= 2
    is_small = heads == kv_heads and (reach <= splits * 128 or splits == 1)
    return AttentionLaunch(block=32 if is_small else 64, splits=splits, num_warps=4, num_stages=2)


def plain_decode_attention(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position_B: Tensor,
    rotary_PA2: Tensor,
    *,
    heads: int,
    window: int | None,
    scales: Sequence[Tensor] = (),
    row_B: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """The plain form, one sequence after another. Without `out`, the result of a skipped sequence may be anything."""
    (size, _), (_, slots, kv_heads, head_dim) = qkv.shape, cache_k_CRJE.shape
    if run is not None and not bool(run):
        return qkv.new_zeros(size, heads * head_dim) if out is None else out
    found_BX = np.zeros((size, heads * head_dim), np.float32) if out is None else array(out)
    qkv_BZE, rotation_PA = array(qkv).reshape(size, -1, head_dim), array(rotary_PA2).view(np.complex64)[..., 0]
    rows = range(size) if row_B is None else row_B.tolist()
    for b, (row, position) in enumerate(zip(rows, position_B.tolist(), strict=True)):
        if row < 0:
            continue
        slot, seen = position % slots, min(position + 1, slots)
        q_k = (qkv_BZE[b, : heads + kv_heads].view(np.complex64) * rotation_PA[position]).view(np.float32)
        new_k_v = q_k[heads:], qkv_BZE[b, heads + kv_heads :]
        if scales:  # the new ones are stored first, and then read as all others
            k_v, exponents = quantize_heads(torch.from_numpy(np.stack(new_k_v)).to(qkv.dtype))
            for part, table in enumerate((cache_k_CRJE, cache_v_CRJE)):
                table[row, slot], scales[part][row, slot] = k_v[part], exponents[part]
            k_RJE, v_RJE = (
                numbers_of_heads(table[row, :seen], scale[row, :seen])
                for table, scale in zip((cache_k_CRJE, cache_v_CRJE), scales, strict=True)
            )
        else:
            k_RJE, v_RJE = array(cache_k_CRJE, row), array(cache_v_CRJE, row)
            k_RJE[slot], v_RJE[slot] = new_k_v
        oldest = slots - 1 - slot
        bias = None if window is None or seen <= window else _window_bias(slots, window)[oldest : oldest + seen]
        q_JGE = q_k[:heads].reshape(kv_heads, -1, head_dim)
        found_BX[b] = attend_array(q_JGE, k_RJE[:seen], v_RJE[:seen], bias).reshape(-1)
        if not scales:
            write_back(cache_k_CRJE, row, k_RJE)
            write_back(cache_v_CRJE, row, v_RJE)
    return tensor_like(qkv, found_BX) if out is None else write_back(out, ..., found_BX)


@lru_cache(maxsize=16)
def _window_bias(slots: int, window: int) -> np.ndarray:
    """What the position at the last slot of a ring adds to the scores of the slots, float32 [2R-1]: -inf beyond the
    window. The position at slot s adds what begins R-1-s further on.
    """
    back = (slots - 1 - np.arange(2 * slots - 1)) % slots
    return np.where(back < window, 0, -np.inf).astype(np.float32)


def decode_attention(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position_B: Tensor,
    rotary_PA2: Tensor,
    *,
    heads: int,
    window: int | None,
    scales: Sequence[Tensor] = (),
    row_B: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
    scratch: SplitScratch | None = None,
    launch: AttentionLaunch | None = None,
) -> Tensor:
    """Softmax attention of the new position of each sequence; its keys and values go into the cache, [B, H*E].

    Position p attends to positions p - window + 1 to p, or 0 to p without a window.

    Args:
        qkv: [B, Z*E] the heads' queries, then keys, then values, not rotated; rows need not be adjacent.
        cache_k_CRJE, cache_v_CRJE: rotated keys, and values, contiguous; R is at least the window, or without a window
            no position reaches it.
        position_B: of each sequence's new position, int32 or int64.
        rotary_PA2: see `rotary_embedding`; positions do not reach its end.
        heads: H, a multiple of J.
        window: positions attended to, the own one included; None for all.
        scales: of a cache in 8 bits, of keys and of values, uint8 [C, R, J], contiguous; see `quantize_heads`.
        row_B: the row of the cache of each sequence, int32 or int64; where negative the sequence is skipped and nothing
            is written. None: row b of the cache for sequence b.
        out: where the result goes; a new tensor of qkv's dtype.
        run: one number on the device; where it is 0 nothing is written.
        scratch: for launches with splits; see `split_scratch`.
        launch: see `launch_for_attention`.
    """
    if not uses_kernels(qkv):
        given: dict[str, Any] = {"heads": heads, "window": window, "scales": scales}
        given |= {"row_B": row_B, "out": out, "run": run}
        return plain_decode_attention(qkv, cache_k_CRJE, cache_v_CRJE, position_B, rotary_PA2, **given)
    sequences, (_, slots, kv_heads, head_dim) = len(position_B), cache_k_CRJE.shape
    out = qkv.new_empty(len(qkv), heads * head_dim) if out is None else out
    k_scale_CRJ, v_scale_CRJ = scales or (None, None)
    check_contiguous(
        keys=cache_k_CRJE, values=cache_v_CRJE, rotary=rotary_PA2, k_scale=k_scale_CRJ, v_scale=v_scale_CRJ
    )
    assert qkv.stride(1) == out.stride(1) == 1, "a row is not contiguous"
    assert window is None or slots >= window, f"{slots} slots, a window of {window}"
    launch = launch or launch_for_attention(sequences, heads, kv_heads, window or slots)
    if launch.splits > 1 and scratch is None:
        scratch = split_scratch(sequences, heads, head_dim, launch.splits, qkv.device)
    kernel, blocks = attend_one, {}
    if heads > kv_heads:
        kernel, blocks = attend_several, {"QUERIES": max(16, power_of_two(heads // kv_heads))}
    kernel[(sequences, kv_heads, launch.splits)](
        *(qkv, cache_k_CRJE, cache_v_CRJE, k_scale_CRJ, v_scale_CRJ, position_B, rotary_PA2, row_B, out, run),
        *(scratch if scratch is not None and launch.splits > 1 else (None, None, None)),
        *(head_dim**-0.5 * LOG2_E, qkv.stride(0), out.stride(0)),
        **{"R": slots, "WINDOW": window or 0, "H": heads, "J": kv_heads, "E": head_dim, **blocks},
        SPLITS=launch.splits,
        BLOCK=launch.block,
        STAGES=launch.num_stages,
        num_warps=launch.num_warps,
        **launch_options(),
    )
    return out


# Kernels


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
    """The cached positions that this program attends to."""
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
        tl.debug_barrier()  # all threads have written before the count
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
    qkv_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, position_ptr, rotary_ptr, row_ptr, out_ptr, run_ptr, found_ptr,
    weights_ptr, arrived_ptr, scale, qkv_row, out_row, R, WINDOW: tl.constexpr, H: tl.constexpr,
    J: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """No two heads share keys."""
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
    e, pair = tl.arange(0, E), tl.arange(0, E // 2)
    cos = tl.load(rotary_ptr + position * E + 2 * pair)[None, :]
    sin = tl.load(rotary_ptr + position * E + 2 * pair + 1)[None, :]
    at_q = qkv_ptr + b.to(tl.int64) * qkv_row + head * E + e
    q, k_new, v_new = tl.load(at_q), tl.load(at_q + J * E), tl.load(at_q + 2 * J * E)
    q = tl.reshape(rotated(q[None, :].to(tl.float32), cos, sin, 1, E), [E]).to(q.dtype).to(tl.float32)
    first_head = row.to(tl.int64) * (R * J) + head
    stores = (split == 0) & ((WINDOW > 0) | (position < R))
    at_new = first_head + position % R * J
    k_new, v_new = store_new(k_new, v_new, cos, sin, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, at_new, stores, E)
    low = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    begin, end = share_of_split(low, position, split, SPLITS, BLOCK)
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, E], tl.float32)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        seen = at < end
        k = held_heads(k_ptr, k_scale_ptr, first_head, at % R, seen, tl.float32, J, E).to(tl.float32)
        v = held_heads(v_ptr, v_scale_ptr, first_head, at % R, seen, tl.float32, J, E).to(tl.float32)
        highest, total, acc = seen_by_lanes(q, k, v, seen, scale, highest, total, acc)
    old_highest, old_total, old_acc = joined_lanes(highest, total, acc)
    # The new position sees itself, in the first split.
    own = tl.where(split == 0, tl.sum(q * k_new, 0) * scale, LOWEST)
    higher = tl.maximum(old_highest, own)
    shrink, weight = tl.exp2(old_highest - higher), tl.where(split == 0, tl.exp2(own - higher), 0.0)
    acc = (old_acc * shrink + weight * v_new)[None, :]
    one = tl.zeros([1], tl.int32)
    zero = one.to(tl.float32)
    deliver(
        acc, zero + (old_total * shrink + weight), zero + higher, one + (b * H + head), one == 0,
        b.to(tl.int64) * out_row + head * E + e[None, :], out_ptr, found_ptr, weights_ptr, arrived_ptr, b * J + head,
        split, SPLITS, E,
    )  # fmt: skip


@triton.jit
def seen_block(q, k, v, seen, scale, highest, total, acc):
    """Several queries, [QUERIES, E], a block of keys and values, [BLOCK, E], and which of them are seen, [1, BLOCK]."""
    score = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, LOWEST)
    higher = tl.maximum(highest, tl.max(score, 1))
    weight = tl.where(seen, tl.exp2(score - higher[:, None]), 0.0)
    shrink = tl.exp2(highest - higher)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, total * shrink + tl.sum(weight, 1), acc


@triton.jit
def attend_several(
    qkv_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, position_ptr, rotary_ptr, row_ptr, out_ptr, run_ptr, found_ptr,
    weights_ptr, arrived_ptr, scale, qkv_row, out_row, R, WINDOW: tl.constexpr, H: tl.constexpr,
    J: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    QUERIES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Heads that share keys: query i is head i of the group."""
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
    e, pair = tl.arange(0, E), tl.arange(0, E // 2)
    cos = tl.load(rotary_ptr + position * E + 2 * pair)[None, :]
    sin = tl.load(rotary_ptr + position * E + 2 * pair + 1)[None, :]
    query = tl.arange(0, QUERIES)
    within = query < G
    head = group * G + tl.minimum(query, G - 1)  # what lies past the last head repeats it
    own = qkv_ptr + b.to(tl.int64) * qkv_row
    q = tl.load(own + head[:, None] * E + e[None, :])
    q = rotated(q.to(tl.float32), cos, sin, QUERIES, E).to(q.dtype)
    own += (H + group) * E + e
    first_head = row.to(tl.int64) * (R * J) + group
    stores = (split == 0) & ((WINDOW > 0) | (position < R))
    at_new, k_new, v_new = first_head + position % R * J, tl.load(own), tl.load(own + J * E)
    k_new, v_new = store_new(k_new, v_new, cos, sin, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, at_new, stores, E)

    # The new position sees itself, in the first split.
    own_score = tl.sum(q.to(tl.float32) * k_new[None, :], 1) * scale
    highest = tl.where(split == 0, own_score, LOWEST)
    total = tl.where(split == 0, 1.0, 0.0) + tl.zeros([QUERIES], tl.float32)
    acc = total[:, None] * v_new[None, :]
    low = tl.maximum(position - WINDOW + 1, 0) if WINDOW > 0 else 0
    begin, end = share_of_split(low, position, split, SPLITS, BLOCK)
    for first in tl.range(begin, end, BLOCK, num_stages=STAGES):
        at = first + tl.arange(0, BLOCK)
        seen = at < end
        k = held_heads(k_ptr, k_scale_ptr, first_head, at % R, seen, q.dtype, J, E)
        v = held_heads(v_ptr, v_scale_ptr, first_head, at % R, seen, q.dtype, J, E)
        highest, total, acc = seen_block(q, k, v, seen[None, :], scale, highest, total, acc)
    deliver(
        acc, total, highest, b * H + head, within, b.to(tl.int64) * out_row + head[:, None] * E + e[None, :], out_ptr,
        found_ptr, weights_ptr, arrived_ptr, b * J + group, split, SPLITS, E,
    )  # fmt: skip
