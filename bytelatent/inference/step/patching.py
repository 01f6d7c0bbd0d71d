# pyright: reportInvalidTypeForm=false
"""Patches on the device: whether the next byte starts a patch, and for which slots the global transformer runs.

A patching mode has two forms: its decision in `bytelatent.patching.modes`, and `decide_kernel` here.
"""

import numpy as np
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference.kv_cache import DecodeState
from bytelatent.inference.step.sampling import StepBuffers
from bytelatent.kernels.launch import Arrays, launch_options, power_of_two, tl, triton, uses_kernels, wait_for_earlier
from bytelatent.model import entropies
from bytelatent.patching import PatchSettings, PatchState, step
from bytelatent.vocab import OFFSET

# Shapes: B slots, C slots whose patch closes, V vocabulary, W ids of a tail, K keys per patch, Y cross-attentions, H
# heads, E head size

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


def kernel_decision(patching: PatchSettings) -> int:
    """How the kernel numbers the decision of these settings.

    Raises:
        UserError: the mode is not decided on the device.
    """
    if patching.decision not in KERNEL_DECISIONS:
        raise UserError(f"patching: mode '{patching.mode}' is not decided on the device")
    return KERNEL_DECISIONS[patching.decision].value


def append(state: DecodeState, buffers: StepBuffers) -> None:
    """Append the ids that are read to the texts and to the open patches.

    Args:
        state: `position`, `tail` and `open_count` are written.
        buffers: `reads` and `ids` are read; `count` and `reads_patch` are written.
    """
    if not uses_kernels(buffers.ids):
        plain_append(state, buffers)
        return
    append_kernel[(len(buffers.ids),)](
        *(state.position, state.tail, state.open_count, state.num_patches),
        *(buffers.reads, buffers.ids, buffers.count, buffers.reads_patch),
        W=state.tail.shape[1],
        PADDED_W=power_of_two(state.tail.shape[1]),
        num_warps=1,
        **launch_options(),
    )


def plain_append(state: DecodeState, buffers: StepBuffers) -> None:
    arrays, counts = Arrays(buffers), Arrays(state)
    reads, tail, open_count = arrays.reads, counts.tail, counts.open_count
    np.copyto(tail, np.concatenate([tail[:, 1:], arrays.ids[:, None]], axis=1), where=reads[:, None])
    counts.position[:] += reads
    arrays.count[:] = np.where(reads, open_count, -1)
    open_count += reads
    arrays.reads_patch[:] = counts.num_patches > 0


def decide(lm_logits_BV: Tensor | None, patching: PatchSettings, state: DecodeState, buffers: StepBuffers) -> None:
    """Decide whether the ids that follow start patches, as `bytelatent.patching.step` does. Call `append` before.

    Args:
        lm_logits_BV: the entropy model's, float32, where the mode needs entropies.
        patching: of a mode that is decided on the device.
        state: `position` and `tail` are read, `previous_entropy` and `since_start` written.
        buffers: `reads`, `ids`, `is_waiting` are read; `wants` is written.
    """
    if not uses_kernels(buffers.ids):
        plain_decide(lm_logits_BV, patching, state, buffers)
        return
    decide_kernel[(len(buffers.ids),)](
        lm_logits_BV,
        *(state.position, state.tail, state.previous_entropy, state.since_start),
        *(buffers.reads, buffers.ids, buffers.is_waiting, buffers.wants),
        *(patching.threshold or 0.0, patching.threshold_add or 0.0),
        MODE=kernel_decision(patching),
        PATCH_SIZE=patching.patch_size or 1,
        MOST=patching.max_patch_length or 0,
        V=1 if lm_logits_BV is None else lm_logits_BV.shape[1],
        PADDED=1 if lm_logits_BV is None else power_of_two(lm_logits_BV.shape[1]),
        W=state.tail.shape[1],
        OFFSET=OFFSET,
        num_warps=2,
        **launch_options(),
    )


def plain_decide(
    lm_logits_BV: Tensor | None, patching: PatchSettings, state: DecodeState, buffers: StepBuffers
) -> None:
    found = None if lm_logits_BV is None else entropies(lm_logits_BV)
    before = PatchState(state.position - 1, state.tail[:, -2], state.previous_entropy, state.since_start)
    after, starts = step(before, buffers.ids, found, patching)
    arrays, counts = Arrays(buffers), Arrays(state)
    for name in ("previous_entropy", "since_start"):
        np.copyto(getattr(counts, name), getattr(after, name).numpy(), where=arrays.reads)
    arrays.wants[:] = (starts.numpy() & arrays.reads) | arrays.is_waiting


def choose(state: DecodeState, buffers: StepBuffers, quorum: float, decoded: bool) -> None:
    """Choose up to C slots for the global transformer among those whose patch closes; slots that waited come first.

    Args:
        state: `num_patches` and `open_count` are written.
        buffers: `wants`, `is_waiting`, `reads` are read; `closing`, `number`, `closing_count`, `run`, `decodes`,
            `reads_patch` and `is_waiting` are written.
        quorum: the share of the slots at work that must want it; with fewer, all of them wait.
        decoded: whether slots whose patch stays open have their logits already.
    """
    if not uses_kernels(buffers.wants):
        plain_choose(state, buffers, quorum, decoded)
        return
    num_slots, max_closing = len(buffers.wants), len(buffers.closing)
    choose_kernel[(1,)](
        *(state.num_patches, state.open_count, buffers.wants, buffers.is_waiting, buffers.reads),
        *(buffers.closing, buffers.number, buffers.closing_count, buffers.run, buffers.decodes, buffers.reads_patch),
        quorum,
        B=num_slots,
        PADDED_B=power_of_two(num_slots),
        C=max_closing,
        PADDED_C=power_of_two(max_closing),
        DECODED=decoded,
        num_warps=1 if num_slots == 1 else 4,
        **launch_options(),
    )


def plain_choose(state: DecodeState, buffers: StepBuffers, quorum: float, decoded: bool) -> None:
    arrays, counts = Arrays(buffers), Arrays(state)
    wants, reads, is_waiting = arrays.wants, arrays.reads, arrays.is_waiting
    num_patches, open_count = counts.num_patches, counts.open_count
    arrays.closing[:] = -1
    arrays.number[:] = 0
    arrays.closing_count[:] = 0
    served = np.zeros_like(wants)
    if wants.any() and wants.sum() >= quorum * (wants | reads).sum():
        urgency = wants.astype(int) + (wants & is_waiting)
        order = np.argsort(-urgency, kind="stable")[: len(buffers.closing)]
        order = order[wants[order]]
        arrays.closing[: len(order)] = order
        arrays.number[: len(order)] = num_patches[order]
        arrays.closing_count[: len(order)] = open_count[order]
        served[order] = True
        open_count[order] = 0
        num_patches[order] += 1
    arrays.run[:] = served.any()
    goes_on = (reads & ~wants) | served
    arrays.decodes[:] = np.where(served if decoded else goes_on, np.arange(len(wants)), -1)
    is_waiting[:] = wants & ~goes_on
    arrays.reads_patch[:] = num_patches > 0


def store_patch(kv: Tensor, patch_k: Tensor, patch_v: Tensor, closing: Tensor) -> None:
    """Store the keys and values of closed patches, for the decoder's cross-attentions.

    Args:
        kv: [C*K, Y*2*H*E] for each cross-attention the keys, then the values, of the patches; contiguous.
        patch_k, patch_v: [Y, B, K, H, E], written where `closing` [C] names a slot.
    """
    if not uses_kernels(kv):
        plain_store_patch(kv, patch_k, patch_v, closing)
        return
    layers, num_slots, keys, heads, size = patch_k.shape
    assert kv.shape == (len(closing) * keys, layers * 2 * heads * size), f"kv: {tuple(kv.shape)}"
    assert kv.is_contiguous()
    width = heads * size
    store_patch_kernel[(len(closing) * keys, layers)](
        *(kv, patch_k, patch_v, closing),
        B=num_slots,
        K=keys,
        Y=layers,
        WIDTH=width,
        PADDED=power_of_two(width),
        num_warps=4,
        **launch_options(),
    )


def plain_store_patch(kv: Tensor, patch_k: Tensor, patch_v: Tensor, closing: Tensor) -> None:
    layers, _, keys, heads, size = patch_k.shape
    kv_CKY2HE = kv.view(len(closing), keys, layers, 2, heads, size)
    for index, slot in enumerate(closing.tolist()):
        if slot >= 0:
            patch_k[:, slot] = kv_CKY2HE[index, :, :, 0].transpose(0, 1)
            patch_v[:, slot] = kv_CKY2HE[index, :, :, 1].transpose(0, 1)


# Kernels


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
    decodes_ptr, reads_patch_ptr, quorum, B: tl.constexpr, PADDED_B: tl.constexpr, C: tl.constexpr,
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
    # The rank of each: after all that are more urgent, and those as urgent before it. One number orders both.
    order = tl.where(wants, tl.where(waiting, 0, PADDED_B) + b, 2 * PADDED_B + b)
    rank = tl.sum((tl.trans(order[:, None]) < order[:, None]).to(tl.int32), 1)
    lacking = quorum * tl.sum((wants | reads).to(tl.float32), 0) - tl.sum(wants.to(tl.float32), 0)
    served = wants & (rank < tl.where(lacking <= 0, C, 0))
    here = served[:, None] & (rank[:, None] == c[None, :])
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
    tl.store(decodes_ptr + b, tl.where(decodes, b, -1).to(tl.int64), mask=inside)
    tl.debug_barrier()
    tl.store(waiting_ptr + b, wants & (goes_on == 0), mask=inside)
    tl.store(reads_patch_ptr + b, num_patches > 0, mask=inside)


@triton.jit
def store_patch_kernel(
    kv_ptr, k_ptr, v_ptr, closing_ptr, B: tl.constexpr, K: tl.constexpr, Y: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    patch_key, layer = tl.program_id(0), tl.program_id(1)
    wait_for_earlier(OVERLAP)
    slot = tl.load(closing_ptr + patch_key // K)
    if slot >= 0:
        at = tl.arange(0, PADDED)
        inside = at < WIDTH
        source = kv_ptr + (patch_key * Y + layer).to(tl.int64) * (2 * WIDTH) + at
        target = ((layer * B + slot) * K + patch_key % K) * WIDTH + at
        tl.store(k_ptr + target, tl.load(source, mask=inside), mask=inside)
        tl.store(v_ptr + target, tl.load(source + WIDTH, mask=inside), mask=inside)
