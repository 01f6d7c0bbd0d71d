# pyright: reportInvalidTypeForm=false
"""Attention of the newest positions of several sequences over caches of their keys and values, for decoding.

The kernel takes queries, keys and values as one product wrote them, rotates them by their positions, puts the new
keys and values into the cache and attends, all at once. A cache is a ring: position p lies in slot p mod R. The new
positions' keys are used from where they were computed; nothing that a launch writes is read by it.

Where keys are many and sequences few, several programs share the keys of one head. The last of them to finish joins
what they found, always in the same order.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.kernels.launch import LOG2_E, launch_options, power_of_two, tl, triton, uses_kernels, wait_for_earlier
from bytelatent.kernels.plain import attend_array, is_float32
from bytelatent.kernels.rotary import rotate, rotated

# Shapes: B sequences, S new positions each, H query heads, J key/value heads, E head size, A = E/2 rotary angles,
# C rows of the cache, R slots of a row, Z = H + 2J heads of queries, keys and values together

PROGRAMS = 132  # that run at once on the GPU that the launches are chosen for
LOWEST = tl.constexpr(-1e30)  # no score is as low; an infinity would make NaN of its differences


@dataclass(frozen=True)
class AttentionLaunch:
    """How the attention is cut into programs.

    Attributes:
        block: keys looked at at once, a power of two, from 16 on.
        splits: programs that share the keys of a head of a sequence.
    """

    block: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SplitScratch:
    """What programs that share keys leave for each other; calls that follow one another may use the same."""

    found: Tensor  # [B*S*H, splits, E]
    weights: Tensor  # [B*S*H, splits, 2]: the highest score and the sum of the weights
    arrived: Tensor  # [B*J] programs that are done, 0 between launches


def split_scratch(rows: int, heads: int, head_dim: int, splits: int, device: torch.device | str) -> SplitScratch:
    """For `rows` = B*S new positions and H `heads`."""
    found = torch.empty(rows * heads, splits, head_dim, device=device)
    weights = torch.empty(rows * heads, splits, 2, device=device)
    return SplitScratch(found, weights, torch.zeros(rows * heads, dtype=torch.int32, device=device))


def launch_for_attention(sequences: int, new: int, heads: int, kv_heads: int, reach: int) -> AttentionLaunch:
    """The launch for attention that looks at `reach` positions at most: the window, or the slots of a row."""
    splits, programs = 1, sequences * kv_heads
    while splits < 8 and programs * splits * 2 <= PROGRAMS and reach >= splits * 2 * 32:
        splits *= 2
    if new * heads == kv_heads:
        return AttentionLaunch(
            block=32 if reach <= splits * 128 or splits == 1 else 64, splits=splits, num_warps=4, num_stages=2
        )
    return AttentionLaunch(block=64, splits=splits, num_warps=4, num_stages=2)


def plain_decode_attention(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position_B: Tensor,
    rotary_PA2: Tensor,
    *,
    heads: int,
    window: int | None,
    new: int = 1,
    row_B: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """The plain form: all sequences at once, one new position after another.

    Without `out`, the result of a sequence that is skipped may be anything.
    """
    head_dim = cache_k_CRJE.shape[-1]
    if run is not None and not bool(run):
        return qkv.new_zeros(len(qkv), heads * head_dim) if out is None else out
    if row_B is None:
        row_B = torch.arange(len(position_B), device=qkv.device)
    given = (cache_k_CRJE, cache_v_CRJE)
    if new > 1:
        qkv_BSZ = qkv.view(-1, new, qkv.shape[1])
        found = [
            _plain_one_position(qkv_BSZ[:, step], *given, position_B + step, rotary_PA2, heads, window, row_B)
            for step in range(new)
        ]
        attended = torch.stack(found, dim=1).flatten(0, 1)
    else:
        attended = _plain_one_position(qkv, *given, position_B, rotary_PA2, heads, window, row_B)
    if out is None:
        return attended
    is_read = (row_B >= 0).repeat_interleave(new)
    out[is_read] = attended[is_read]
    return out


def _plain_one_position(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position_B: Tensor,
    rotary_PA2: Tensor,
    heads: int,
    window: int | None,
    row_B: Tensor,
) -> Tensor:
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    if len(row_B) == 1 and is_float32(qkv, cache_k_CRJE):
        return _plain_one_sequence(
            qkv, cache_k_CRJE, cache_v_CRJE, int(position_B), rotary_PA2, heads, window, int(row_B)
        )
    q_k, v_BJE = qkv.unflatten(-1, (-1, head_dim)).split([heads + kv_heads, kv_heads], dim=1)
    q_BHE, k_BJE = rotate(q_k, rotary_PA2[position_B]).split([heads, kv_heads], dim=1)
    row, slot = row_B.clamp(min=0), position_B % slots
    if bool((row_B < 0).any()):  # skipped sequences write nothing
        here = (row_B >= 0).nonzero()[:, 0]
        cache_k_CRJE[row[here], slot[here]], cache_v_CRJE[row[here], slot[here]] = k_BJE[here], v_BJE[here]
    else:
        cache_k_CRJE[row, slot], cache_v_CRJE[row, slot] = k_BJE, v_BJE
    size = min(int(position_B.max()) + 1, slots)
    newest = position_B[:, None]
    held = newest - (newest - torch.arange(size, device=qkv.device)) % slots
    seen = held >= 0 if window is None else (held >= 0) & (held > newest - window)
    cached = (part[row, :size].transpose(1, 2) for part in (cache_k_CRJE, cache_v_CRJE))
    found = F.scaled_dot_product_attention(
        q_BHE[:, :, None], *cached, attn_mask=seen[:, None, None], enable_gqa=heads != kv_heads
    )
    return found[:, :, 0].flatten(1)


def _plain_one_sequence(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position: int,
    rotary_PA2: Tensor,
    heads: int,
    window: int | None,
    row: int,
) -> Tensor:
    """One sequence, whose cache need not be gathered, in NumPy; see `plain`."""
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    if row < 0:
        return qkv.new_zeros(1, heads * head_dim)
    new = qkv.numpy().reshape(-1, head_dim)
    rotation_A = rotary_PA2.numpy()[position].view(np.complex64)[:, 0]
    q_k = (new[: heads + kv_heads].view(np.complex64) * rotation_A).view(np.float32)
    k_RJE, v_RJE = cache_k_CRJE.numpy()[row], cache_v_CRJE.numpy()[row]
    slot, size = position % slots, min(position + 1, slots)
    k_RJE[slot], v_RJE[slot] = q_k[heads:], new[heads + kv_heads :]
    first = slots - 1 - slot
    bias = None if window is None or size <= window else _window_bias(slots, window)[first : first + size]
    found = attend_array(q_k[:heads].reshape(kv_heads, -1, head_dim), k_RJE[:size], v_RJE[:size], bias)
    return torch.from_numpy(found.reshape(1, -1))


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
    new: int = 1,
    row_B: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
    scratch: SplitScratch | None = None,
    launch: AttentionLaunch | None = None,
) -> Tensor:
    """Softmax attention of S new positions of each sequence; their keys and values go into the cache, [B*S, H*E].

    Position p sees positions p - window + 1 to p, or 0 to p without a window.

    Args:
        qkv: [B*S, Z*E] the heads' queries, then keys, then values, not rotated; rows may lie apart.
        cache_k_CRJE, cache_v_CRJE: rotated keys, and values; R is at least window + S - 1, or without a window no
            position reaches it.
        position_B: of each sequence's first new position, int32 or int64.
        rotary_PA2: see `rotary_embedding`; positions do not reach its end.
        heads: H, a multiple of J.
        window: positions seen, the own one included; None for all.
        new: S, 1 to 16.
        row_B: the row of the cache of each sequence, int32 or int64; where negative the sequence is passed over and
            nothing is written. None: row b of the cache for sequence b.
        out: where the result goes; a new tensor of qkv's dtype.
        run: one number on the device; where it is 0 nothing is written.
        scratch: for launches with splits; see `split_scratch`.
        launch: see `launch_for_attention`.
    """
    if not uses_kernels(qkv):
        given: dict[str, Any] = {"heads": heads, "window": window, "new": new, "row_B": row_B, "out": out, "run": run}
        return plain_decode_attention(qkv, cache_k_CRJE, cache_v_CRJE, position_B, rotary_PA2, **given)
    sequences = position_B.shape[0]
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    out = torch.empty(qkv.shape[0], heads * head_dim, dtype=qkv.dtype, device=qkv.device) if out is None else out
    assert qkv.shape == (sequences * new, (heads + 2 * kv_heads) * head_dim), f"qkv: {tuple(qkv.shape)}"
    assert out.shape == (sequences * new, heads * head_dim), f"out: {tuple(out.shape)}"
    assert qkv.stride(1) == out.stride(1) == 1, "a row is not contiguous"
    assert cache_k_CRJE.is_contiguous(), "the cache of keys is not contiguous"
    assert cache_v_CRJE.is_contiguous(), "the cache of values is not contiguous"
    assert cache_k_CRJE.shape == cache_v_CRJE.shape, "the caches differ in shape"
    assert rotary_PA2.is_contiguous(), "the rotary table is not contiguous"
    assert heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads}"
    assert head_dim in (16, 32, 64, 128, 256), f"a head size of {head_dim} is no power of two from 16 to 256"
    assert window is None or slots >= window + new - 1, (
        f"{slots} slots for a window of {window} and {new} new positions"
    )
    launch = launch or launch_for_attention(sequences, new, heads, kv_heads, window or slots)
    if launch.splits == 1:
        parts = (None, None, None)
    else:
        scratch = scratch or split_scratch(sequences * new, heads, head_dim, launch.splits, qkv.device)
        assert scratch.found.shape[0] >= sequences * new * heads, "the scratch is too small"
        assert scratch.found.shape[1:] == (launch.splits, head_dim), f"scratch: {tuple(scratch.found.shape)}"
        parts = (scratch.found, scratch.weights, scratch.arrived)
    one = new * heads == kv_heads
    queries = 1 if one else max(16, power_of_two(new * heads // kv_heads))
    blocks = {} if one else {"QUERIES": queries, "NEW": max(16, power_of_two(new))}
    kernel = attend_one if one else attend_several
    kernel[(sequences, kv_heads, launch.splits)](
        qkv,
        cache_k_CRJE,
        cache_v_CRJE,
        position_B,
        rotary_PA2,
        row_B,
        out,
        run,
        *parts,
        head_dim**-0.5 * LOG2_E,
        qkv.stride(0),
        out.stride(0),
        R=slots,
        WINDOW=window or 0,
        S=new,
        H=heads,
        J=kv_heads,
        E=head_dim,
        SPLITS=launch.splits,
        BLOCK=launch.block,
        STAGES=launch.num_stages,
        **blocks,
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
    q = tl.reshape(rotated(q[None, :].to(tl.float32), cos, sin, 1, E), [E]).to(q.dtype).to(tl.float32)
    k_new = tl.reshape(rotated(k_new[None, :].to(tl.float32), cos, sin, 1, E), [E]).to(k_ptr.dtype.element_ty)
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
    q = rotated(q.to(tl.float32), tl.load(turn), tl.load(turn + 1), QUERIES, E).to(k_ptr.dtype.element_ty)

    new = tl.arange(0, NEW)
    new_step = tl.minimum(new, S - 1)
    at_new = (b * S + new_step).to(tl.int64)[:, None] * qkv_row + (H + group) * E + e
    turn = rotary_ptr + (position + new_step)[:, None] * E + 2 * angle
    k_new, v_new = tl.load(qkv_ptr + at_new), tl.load(qkv_ptr + at_new + J * E).to(v_ptr.dtype.element_ty)
    k_new = rotated(k_new.to(tl.float32), tl.load(turn), tl.load(turn + 1), NEW, E).to(k_ptr.dtype.element_ty)
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
