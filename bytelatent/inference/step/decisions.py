# pyright: reportInvalidTypeForm=false
"""The decisions of a decoding step, for all rows: what is drawn, whether a patch closes, which rows go on.

They are little arithmetic in many small operations, each of which would be a kernel of its own. Here they are five.
A patching mode and a sampling setting each have a half here, in `decide_kernel` and in `draw_kernel`.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference.sampling import SamplingSlots
from bytelatent.kernels.launch import Arrays, launch_options, power_of_two, tl, triton, uses_kernels, wait_for_earlier
from bytelatent.model import entropies
from bytelatent.patching import PatchSettings, PatchState, step
from bytelatent.vocab import EOS, OFFSET

# Shapes: B rows, C places for rows whose patch closes, V vocabulary, W ids of a tail, K keys a patch, Y
# cross-attentions, H heads, E head size

# What `draw_kernel` takes of `SamplingSlots`, in the order of its parameters
SAMPLING_FIELDS = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "drawn", "seen", "valid_utf8", "utf8"),
    *("remaining", "utf8_after", "needed", "needed_after"),
)
PLAIN_SAMPLING_FIELDS = ("is_special",)  # only the plain form reads them; the kernel compares ids

# The decisions of `bytelatent.patching.modes` as `decide_kernel` numbers them
THRESHOLD, RISE, COMBINED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SPACE, STATIC, BYTE = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
KERNEL_DECISIONS = {
    "threshold": THRESHOLD,
    "rise": RISE,
    "combined": COMBINED,
    "space": SPACE,
    "static": STATIC,
    "byte": BYTE,
}

FAR = tl.constexpr(1e30)
GOLDEN = tl.constexpr(-7046029254386353131)  # 0x9E3779B97F4A7C15
MIX_1 = tl.constexpr(-4658895280553007687)  # 0xBF58476D1CE4E5B9
MIX_2 = tl.constexpr(-7723592293110705685)  # 0x94D049BB133111EB


def check_sampling_fields(known: tuple[str, ...] = SAMPLING_FIELDS + PLAIN_SAMPLING_FIELDS) -> None:
    """Refuse sampling settings that the kernel does not know: it would ignore them without a word."""
    if unknown := [field.name for field in fields(SamplingSlots) if field.name not in known]:
        raise NotImplementedError(f"draw_kernel does not know the sampling settings {', '.join(unknown)}")


check_sampling_fields()


def kernel_decision(patching: PatchSettings) -> int:
    """How the kernel numbers the decision of these settings.

    Raises:
        UserError: the mode is not decided on the device.
    """
    if patching.decision not in KERNEL_DECISIONS:
        raise UserError(f"patching: mode '{patching.mode}' is not decided on the device")
    return KERNEL_DECISIONS[patching.decision].value


@dataclass
class Flags:
    """What a step decides, for each row."""

    is_active: Tensor  # [B] bool, whether a sequence is in the row
    is_waiting: Tensor  # [B] bool, whether its closed patch waits for the global transformer
    drawn: Tensor  # [B] the id that was drawn, -1: none
    log_probability: Tensor  # [B] float32 of it
    ids: Tensor  # [B] the id to read, any where none is read
    reads: Tensor  # [B] bool, whether an id is read
    row: Tensor  # [B] the row itself, -1 where no id is read
    at: Tensor  # [B] position of the newest id, that to read included
    count: Tensor  # [B] bytes in the open patch before this one, -1 where no id is read
    wants: Tensor  # [B] bool, whether a closed patch is there
    closing: Tensor  # [C] rows for which the global transformer runs, -1: none
    number: Tensor  # [C] the number of the patch that each of them closes
    closing_count: Tensor  # [C] bytes in that patch
    run: Tensor  # [1] whether there is any of them
    goes_on: Tensor  # [B] the row itself, -1 where no logits are to come any more in this step
    reads_patch: Tensor  # [B] bool, whether a patch is closed yet

    @classmethod
    def empty(cls, num_rows: int, places: int, device: torch.device | str) -> "Flags":
        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        sizes = {"closing": places, "number": places, "closing_count": places, "run": 1}
        dtypes = dict.fromkeys(("is_active", "is_waiting", "reads", "wants", "reads_patch"), torch.bool)
        dtypes |= {"log_probability": torch.float32, "run": torch.int32}
        names = [field.name for field in fields(cls)]
        return cls(**{name: zeros(sizes.get(name, num_rows), dtypes.get(name, torch.long)) for name in names})


def draw(
    logits_BV: Tensor, rows: SamplingSlots, position: Tensor, flags: Flags, expected: Tensor | None = None
) -> None:
    """Draw an id in each active row that does not wait, and note it.

    Equals `SamplingSlots.draw` and `read`; a row ends with EOS, or once as many ids were drawn as were asked for.

    Args:
        logits_BV: float32, of what comes next.
        rows: how each row draws.
        position: [B] ids read.
        flags: `is_active`, `is_waiting` are read; `is_active`, `drawn`, `log_probability`, `ids`, `reads`, `row` and
            `at` are written.
        expected: [B] the only ids that are drawn: a row that would draw another one draws none, and waits.
    """
    if not uses_kernels(logits_BV):
        plain_draw(logits_BV, rows, position, flags, expected)
        return
    assert logits_BV.is_contiguous(), "logits are not contiguous"
    draw_kernel[(logits_BV.shape[0],)](
        logits_BV,
        *(getattr(rows, name) for name in SAMPLING_FIELDS),
        *(position, expected, flags.is_active, flags.is_waiting),
        *(flags.drawn, flags.log_probability, flags.ids, flags.reads, flags.row, flags.at),
        V=logits_BV.shape[1],
        PADDED=power_of_two(logits_BV.shape[1]),
        EOS=EOS,
        OFFSET=OFFSET,
        num_warps=4,
        **launch_options(),
    )


def plain_draw(
    logits_BV: Tensor, rows: SamplingSlots, position: Tensor, flags: Flags, expected: Tensor | None = None
) -> None:
    """The plain form."""
    arrays, at = Arrays(flags), position.numpy()
    is_active, is_waiting = arrays.is_active, arrays.is_waiting
    draws = is_active & ~is_waiting
    drawn, log_probability = rows.draw(logits_BV)
    ids = drawn.numpy()
    if expected is not None:
        agrees = ids == expected.numpy()
        is_waiting |= draws & ~agrees
        draws &= agrees
    rows.read(drawn, torch.from_numpy(draws))
    ends = draws & ((ids == EOS) | (rows.remaining.numpy() <= 0))
    reads = draws & ~ends
    is_active &= ~ends
    arrays.drawn[:] = np.where(draws, ids, -1)
    arrays.log_probability[:] = log_probability.numpy()
    arrays.ids[:] = ids
    arrays.reads[:] = reads
    arrays.row[:] = np.where(reads, np.arange(len(ids)), -1)
    arrays.at[:] = np.maximum(at - ~reads, 0)


def append(state: Any, flags: Flags) -> None:
    """Put the ids that are read to those that were, and into the open patches.

    Args:
        state: `FastState`: `position`, `tail` and `open_count` are written.
        flags: `reads` and `ids` are read; `count` and `reads_patch` are written.
    """
    if not uses_kernels(flags.ids):
        plain_append(state, flags)
        return
    append_kernel[(len(flags.ids),)](
        *(state.position, state.tail, state.open_count, state.num_patches),
        *(flags.reads, flags.ids, flags.count, flags.reads_patch),
        W=state.tail.shape[1],
        PADDED_W=power_of_two(state.tail.shape[1]),
        num_warps=1,
        **launch_options(),
    )


def plain_append(state: Any, flags: Flags) -> None:
    """The plain form."""
    arrays, counts = Arrays(flags), Arrays(state)
    reads, tail, open_count = arrays.reads, counts.tail, counts.open_count
    np.copyto(tail, np.concatenate([tail[:, 1:], arrays.ids[:, None]], axis=1), where=reads[:, None])
    counts.position[:] += reads
    arrays.count[:] = np.where(reads, open_count, -1)
    open_count += reads
    arrays.reads_patch[:] = counts.num_patches > 0


def decide(lm_logits_BV: Tensor | None, patching: PatchSettings, state: Any, flags: Flags) -> None:
    """Whether what comes after the ids that were read starts a patch. They are appended before.

    Equals `bytelatent.patching.step`.

    Args:
        lm_logits_BV: the byte LM's, float32, where the mode needs its entropies.
        patching: of a mode that is decided on the device.
        state: `FastState`: `position` and `tail` (two ids and more) are read, `previous_entropy` and `since_start`
            written.
        flags: `reads`, `ids`, `is_waiting` are read; `wants` is written.
    """
    if not uses_kernels(flags.ids):
        plain_decide(lm_logits_BV, patching, state, flags)
        return
    decision = kernel_decision(patching)
    decide_kernel[(len(flags.ids),)](
        lm_logits_BV,
        *(state.position, state.tail, state.previous_entropy, state.since_start),
        *(flags.reads, flags.ids, flags.is_waiting, flags.wants),
        *(patching.threshold or 0.0, patching.threshold_add or 0.0),
        MODE=decision,
        PATCH_SIZE=patching.patch_size or 1,
        MOST=patching.max_patch_length or 0,
        V=1 if lm_logits_BV is None else lm_logits_BV.shape[1],
        PADDED=1 if lm_logits_BV is None else power_of_two(lm_logits_BV.shape[1]),
        W=state.tail.shape[1],
        OFFSET=OFFSET,
        num_warps=2,
        **launch_options(),
    )


def plain_decide(lm_logits_BV: Tensor | None, patching: PatchSettings, state: Any, flags: Flags) -> None:
    """The plain form."""
    found = None if lm_logits_BV is None else entropies(lm_logits_BV)
    before = PatchState(state.position - 1, state.tail[:, -2], state.previous_entropy, state.since_start)
    after, starts = step(before, flags.ids, found, patching)
    arrays, counts = Arrays(flags), Arrays(state)
    for name in ("previous_entropy", "since_start"):
        np.copyto(getattr(counts, name), getattr(after, name).numpy(), where=arrays.reads)
    arrays.wants[:] = (starts.numpy() & arrays.reads) | arrays.is_waiting


def choose(state: Any, flags: Flags, quorum: float, decoded: bool) -> None:
    """Give the rows that want the global transformer the places there are, those that have waited first.

    Args:
        state: `FastState`: `num_patches` and `open_count` are written.
        flags: `wants`, `is_waiting`, `reads` are read; `closing`, `number`, `closing_count`, `run`, `goes_on`,
            `reads_patch` and `is_waiting` are written.
        quorum: the share of the rows that read or wait that must want it; of fewer all wait on.
        decoded: whether the rows that want nothing have their logits already.
    """
    if not uses_kernels(flags.wants):
        plain_choose(state, flags, quorum, decoded)
        return
    rows, places = len(flags.wants), len(flags.closing)
    choose_kernel[(1,)](
        *(state.num_patches, state.open_count, flags.wants, flags.is_waiting, flags.reads),
        *(flags.closing, flags.number, flags.closing_count, flags.run, flags.goes_on, flags.reads_patch),
        quorum,
        B=rows,
        PADDED_B=power_of_two(rows),
        C=places,
        PADDED_C=power_of_two(places),
        DECODED=decoded,
        num_warps=1 if rows == 1 else 4,
        **launch_options(),
    )


def plain_choose(state: Any, flags: Flags, quorum: float, decoded: bool) -> None:
    """The plain form."""
    arrays, counts = Arrays(flags), Arrays(state)
    wants, reads, is_waiting = arrays.wants, arrays.reads, arrays.is_waiting
    num_patches, open_count = counts.num_patches, counts.open_count
    arrays.closing[:] = -1
    arrays.number[:] = 0
    arrays.closing_count[:] = 0
    served = np.zeros_like(wants)
    if wants.any() and wants.sum() >= quorum * (wants | reads).sum():
        urgency = wants.astype(int) + (wants & is_waiting)
        order = np.argsort(-urgency, kind="stable")[: len(flags.closing)]
        order = order[wants[order]]
        arrays.closing[: len(order)] = order
        arrays.number[: len(order)] = num_patches[order]
        arrays.closing_count[: len(order)] = open_count[order]
        served[order] = True
        open_count[order] = 0
        num_patches[order] += 1
    arrays.run[:] = served.any()
    goes_on = (reads & ~wants) | served
    arrays.goes_on[:] = np.where(served if decoded else goes_on, np.arange(len(wants)), -1)
    is_waiting[:] = wants & ~goes_on
    arrays.reads_patch[:] = num_patches > 0


def store_patch(kv: Tensor, patch_k: Tensor, patch_v: Tensor, closing: Tensor) -> None:
    """Let rows read the patch that they have closed.

    Args:
        kv: [C*K, Y*2*H*E] for each cross-attention the keys, then the values, of the patches; contiguous.
        patch_k, patch_v: [Y, B, K, H, E], written where `closing` [C] names a row.
    """
    if not uses_kernels(kv):
        plain_store_patch(kv, patch_k, patch_v, closing)
        return
    layers, rows, keys, heads, size = patch_k.shape
    assert kv.shape == (len(closing) * keys, layers * 2 * heads * size), f"kv: {tuple(kv.shape)}"
    assert kv.is_contiguous()
    width = heads * size
    keep_patch_kernel[(len(closing) * keys, layers)](
        *(kv, patch_k, patch_v, closing),
        B=rows,
        K=keys,
        Y=layers,
        WIDTH=width,
        PADDED=power_of_two(width),
        num_warps=4,
        **launch_options(),
    )


def plain_store_patch(kv: Tensor, patch_k: Tensor, patch_v: Tensor, closing: Tensor) -> None:
    """The plain form."""
    layers, _, keys, heads, size = patch_k.shape
    kv_CKY2HE = kv.view(len(closing), keys, layers, 2, heads, size)
    for place, row in enumerate(closing.tolist()):
        if row >= 0:
            patch_k[:, row] = kv_CKY2HE[place, :, :, 0].transpose(0, 1)
            patch_v[:, row] = kv_CKY2HE[place, :, :, 1].transpose(0, 1)


# Kernels


@triton.jit
def shifted(x, BITS: tl.constexpr):
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def mixed(x):
    x = (x ^ shifted(x, 30)) * MIX_1
    x = (x ^ shifted(x, 27)) * MIX_2
    return x ^ shifted(x, 31)


@triton.jit
def candidates(
    v, logits_ptr, seen_ptr, needed_after_ptr, penalty, valid, utf8, room, V: tl.constexpr, EOS: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """The logits of ids `v` as they are drawn from, float64; -inf where one may not be drawn."""
    inside = v < V
    logit = tl.load(logits_ptr + v, mask=inside, other=0.0).to(tl.float64)
    seen = tl.load(seen_ptr + v, mask=inside, other=0) != 0
    penalised = tl.where(logit > 0, logit / penalty, logit * penalty)
    logit = tl.where(seen, penalised, logit)
    logit = tl.where(logit == logit, logit, -FAR)
    logit = tl.minimum(tl.maximum(logit, -FAR), FAR)
    needed = tl.load(needed_after_ptr + utf8 * V + v, mask=inside, other=1 << 30)
    allowed = tl.where(valid, needed < room, (v >= OFFSET) | (v == EOS))
    return tl.where(allowed & inside, logit, -float("inf"))


@triton.jit
def draw_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, penalty_ptr, seed_ptr, count_ptr, seen_ptr, valid_ptr,
    utf8_ptr, remaining_ptr, utf8_after_ptr, needed_ptr, needed_after_ptr, position_ptr, expected_ptr, active_ptr,
    waiting_ptr, drawn_ptr, log_probability_ptr, ids_ptr, reads_ptr, row_ptr, at_ptr, V: tl.constexpr,
    PADDED: tl.constexpr, EOS: tl.constexpr, OFFSET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    v = tl.arange(0, PADDED)
    wait_for_earlier(OVERLAP)
    logits_ptr += b * V
    seen_ptr += b * V
    draws = (tl.load(active_ptr + b) != 0) & (tl.load(waiting_ptr + b) == 0)
    plain = tl.load(logits_ptr + v, mask=v < V, other=-float("inf"))
    highest = tl.max(plain, 0)
    normaliser = highest + tl.log(tl.sum(tl.exp(plain - highest), 0))

    utf8, valid = tl.load(utf8_ptr + b), tl.load(valid_ptr + b) != 0
    remaining = tl.load(remaining_ptr + b)
    room = tl.maximum(remaining, tl.maximum(tl.load(needed_ptr + utf8), 1))
    penalty = tl.load(penalty_ptr + b).to(tl.float64)
    logit = candidates(v, logits_ptr, seen_ptr, needed_after_ptr, penalty, valid, utf8, room, V, EOS, OFFSET)
    top = tl.max(logit, 0)
    temperature = tl.load(temperature_ptr + b).to(tl.float64)
    top_k, top_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b).to(tl.float64)
    greedy = temperature == 0
    scale = tl.where(greedy, 1.0, temperature)
    relative = tl.exp((logit - top) / scale)
    weight = tl.floor(relative * 1073741824.0 + 0.5).to(tl.int64)
    first = tl.min(tl.where(logit == top, v, PADDED), 0)
    if greedy:
        weight = tl.where(v == first, weight, 0)
    elif (top_k < V) | (top_p < 1):
        # Which ids come before each one, from the likeliest on; among equals the lowest id.
        rank = tl.zeros([PADDED], tl.int32)
        before = tl.zeros([PADDED], tl.int64)
        for begin in range(0, PADDED, 16):
            other_v = begin + tl.arange(0, 16)
            other = candidates(
                other_v, logits_ptr, seen_ptr, needed_after_ptr, penalty, valid, utf8, room, V, EOS, OFFSET
            )
            other_weight = tl.floor(tl.exp((other - top) / scale) * 1073741824.0 + 0.5).to(tl.int64)
            precedes = other[None, :] > logit[:, None]
            precedes |= (other[None, :] == logit[:, None]) & (other_v[None, :] < v[:, None])
            rank += tl.sum(precedes.to(tl.int32), 1)
            before += tl.sum(tl.where(precedes, other_weight[None, :], 0), 1)
        weight = tl.where(rank < top_k, weight, 0)
        share = top_p * tl.sum(weight, 0).to(tl.float64)
        weight = tl.where((before.to(tl.float64) < share) | (v == first), weight, 0)
    min_p = tl.load(min_p_ptr + b).to(tl.float64)
    weight = tl.where((relative >= min_p) | (v == first), weight, 0)

    count = tl.load(count_ptr + b)
    number = shifted(mixed(mixed(tl.load(seed_ptr + b)) + (count + 1) * GOLDEN), 40)
    point = (number * tl.sum(weight, 0)) >> 24
    drawn = tl.sum((tl.cumsum(weight, 0) <= point).to(tl.int32), 0).to(tl.int64)
    log_probability = tl.sum(tl.where(v == drawn, plain, 0.0), 0) - normaliser

    tl.debug_barrier()  # what follows writes what was read above
    if expected_ptr is not None:
        agrees = drawn == tl.load(expected_ptr + b)
        tl.store(waiting_ptr + b, 1, mask=draws & (agrees == 0))
        draws = draws & agrees
    left = remaining - 1
    ends = draws & ((drawn == EOS) | (left <= 0))
    reads = draws & (drawn != EOS) & (left > 0)
    tl.store(count_ptr + b, count + 1, mask=draws)
    tl.store(remaining_ptr + b, left, mask=draws)
    tl.store(utf8_ptr + b, tl.load(utf8_after_ptr + utf8 * V + drawn), mask=draws)
    tl.store(seen_ptr + drawn, 1, mask=draws & (drawn >= OFFSET))
    tl.store(active_ptr + b, 0, mask=ends)
    tl.store(drawn_ptr + b, tl.where(draws, drawn, -1))
    tl.store(log_probability_ptr + b, log_probability)
    tl.store(ids_ptr + b, drawn)
    tl.store(reads_ptr + b, reads)
    tl.store(row_ptr + b, tl.where(reads, b, -1).to(tl.int64))
    position = tl.load(position_ptr + b)
    tl.store(at_ptr + b, tl.maximum(tl.where(reads, position, position - 1), 0))


@triton.jit
def is_space_like(ids, OFFSET: tl.constexpr):
    byte = ids - OFFSET
    word = ((byte >= 48) & (byte <= 57)) | ((byte >= 65) & (byte <= 90)) | ((byte >= 97) & (byte <= 122))
    return (word | ((byte >= 0x80) & (byte <= 0xBF))) == 0


@triton.jit
def append_kernel(
    position_ptr, tail_ptr, open_ptr, patches_ptr, reads_ptr, ids_ptr, count_ptr, reads_patch_ptr, W: tl.constexpr,
    PADDED_W: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    w = tl.arange(0, PADDED_W)
    wait_for_earlier(OVERLAP)
    reads = tl.load(reads_ptr + b) != 0
    ids, position, open_count = tl.load(ids_ptr + b), tl.load(position_ptr + b), tl.load(open_ptr + b)
    num_patches = tl.load(patches_ptr + b)
    shifted_tail = tl.load(tail_ptr + b * W + w + 1, mask=w < W - 1, other=0)
    tl.debug_barrier()  # what follows writes what was read above
    tl.store(tail_ptr + b * W + w, tl.where(w == W - 1, ids, shifted_tail), mask=(w < W) & reads)
    tl.store(position_ptr + b, position + 1, mask=reads)
    tl.store(count_ptr + b, tl.where(reads, open_count, -1))
    tl.store(open_ptr + b, open_count + 1, mask=reads)
    tl.store(reads_patch_ptr + b, num_patches > 0)


@triton.jit
def decide_kernel(
    logits_ptr, position_ptr, tail_ptr, entropy_ptr, since_ptr, reads_ptr, ids_ptr, waiting_ptr, wants_ptr, threshold,
    threshold_add, MODE: tl.constexpr, PATCH_SIZE: tl.constexpr, MOST: tl.constexpr, V: tl.constexpr,
    PADDED: tl.constexpr, W: tl.constexpr, OFFSET: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    wait_for_earlier(OVERLAP)
    reads = tl.load(reads_ptr + b) != 0
    ids, position = tl.load(ids_ptr + b), tl.load(position_ptr + b) - 1
    previous = tl.load(entropy_ptr + b)
    entropy = previous
    if MODE <= COMBINED:  # the decisions by entropy come first
        v = tl.arange(0, PADDED)
        logits = tl.load(logits_ptr + b * V + v, mask=v < V, other=-float("inf"))
        above = logits - tl.max(logits, 0)
        weight = tl.exp(above)
        total = tl.sum(weight, 0)
        entropy = tl.log(total) - tl.sum(tl.where(weight > 0, weight * above, 0.0), 0) / total
    rise = entropy - previous
    if MODE == THRESHOLD:
        natural = (position == 0) | (entropy > threshold)
    elif MODE == RISE:
        natural = (position <= 1) | (rise > threshold)
    elif MODE == COMBINED:
        natural = (position <= 1) | ((entropy > threshold) & (rise > threshold_add) & (position != 2))
    elif MODE == SPACE:
        continues = (position > 0) & is_space_like(tl.load(tail_ptr + b * W + W - 2), OFFSET)
        natural = (ids < OFFSET) | (is_space_like(ids, OFFSET) & (continues == 0))
    elif MODE == STATIC:
        natural = (position + 1) % PATCH_SIZE == 0
    elif MODE == BYTE:
        natural = position >= 0
    else:
        tl.static_assert(False, "the kernel does not know this patching mode")
    since = tl.load(since_ptr + b) + 1
    starts = natural
    if MOST > 0:
        starts = natural | (since % MOST == 0)
    tl.debug_barrier()  # what follows writes what was read above
    tl.store(entropy_ptr + b, entropy, mask=reads)
    tl.store(since_ptr + b, tl.where(natural, 0, since), mask=reads)
    tl.store(wants_ptr + b, (starts & reads) | (tl.load(waiting_ptr + b) != 0))


@triton.jit
def choose_kernel(
    patches_ptr, open_ptr, wants_ptr, waiting_ptr, reads_ptr, closing_ptr, number_ptr, closing_count_ptr, run_ptr,
    goes_on_ptr, reads_patch_ptr, quorum, B: tl.constexpr, PADDED_B: tl.constexpr, C: tl.constexpr,
    PADDED_C: tl.constexpr, DECODED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b, c = tl.arange(0, PADDED_B), tl.arange(0, PADDED_C)
    wait_for_earlier(OVERLAP)
    inside = b < B
    wants = tl.load(wants_ptr + b, mask=inside, other=0) != 0
    waiting = tl.load(waiting_ptr + b, mask=inside, other=0) != 0
    reads = tl.load(reads_ptr + b, mask=inside, other=0) != 0
    num_patches = tl.load(patches_ptr + b, mask=inside, other=0)
    open_count = tl.load(open_ptr + b, mask=inside, other=0)
    # The place of each: after all that are more urgent, and those as urgent before it. One number says both.
    order = tl.where(wants, tl.where(waiting, 0, PADDED_B) + b, 2 * PADDED_B + b)
    place = tl.sum((tl.trans(order[:, None]) < order[:, None]).to(tl.int32), 1)
    lacking = quorum * tl.sum((wants | reads).to(tl.float32), 0) - tl.sum(wants.to(tl.float32), 0)
    served = wants & (place < tl.where(lacking <= 0, C, 0))
    here = served[:, None] & (place[:, None] == c[None, :])
    closing = tl.sum(tl.where(here, b[:, None] + 1, 0), 0) - 1
    tl.store(closing_ptr + c, closing.to(tl.int64), mask=c < C)
    tl.store(number_ptr + c, tl.sum(tl.where(here, num_patches[:, None], 0), 0), mask=c < C)
    tl.store(run_ptr, tl.max(served.to(tl.int32), 0))
    tl.store(closing_count_ptr + c, tl.sum(tl.where(here, open_count[:, None], 0), 0), mask=c < C)
    tl.store(open_ptr + b, tl.where(served, 0, open_count), mask=inside)
    num_patches += served.to(tl.int64)
    tl.store(patches_ptr + b, num_patches, mask=inside)
    goes_on = (reads & (wants == 0)) | served
    decodes = served if DECODED else goes_on
    tl.store(goes_on_ptr + b, tl.where(decodes, b, -1).to(tl.int64), mask=inside)
    tl.debug_barrier()
    tl.store(waiting_ptr + b, wants & (goes_on == 0), mask=inside)
    tl.store(reads_patch_ptr + b, num_patches > 0, mask=inside)


@triton.jit
def keep_patch_kernel(
    kv_ptr, k_ptr, v_ptr, closing_ptr, B: tl.constexpr, K: tl.constexpr, Y: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    patch_key, layer = tl.program_id(0), tl.program_id(1)
    wait_for_earlier(OVERLAP)
    row = tl.load(closing_ptr + patch_key // K)
    if row >= 0:
        at = tl.arange(0, PADDED)
        inside = at < WIDTH
        source = kv_ptr + (patch_key * Y + layer).to(tl.int64) * (2 * WIDTH) + at
        target = ((layer * B + row) * K + patch_key % K) * WIDTH + at
        tl.store(k_ptr + target, tl.load(source, mask=inside), mask=inside)
        tl.store(v_ptr + target, tl.load(source + WIDTH, mask=inside), mask=inside)
