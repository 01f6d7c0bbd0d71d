# pyright: reportInvalidTypeForm=false
"""Sampling on the device: one kernel draws an id in every slot, the one that `SamplingSlots.draw` draws.

A sampling setting has two forms: `SamplingSlots.weights` in PyTorch, and `draw_kernel` here.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bytelatent.inference.sampling import OUTDATED, READY, SamplingSlots
from bytelatent.kernels.launch import Arrays, launch_options, power_of_two, tl, triton, uses_kernels, wait_for_earlier
from bytelatent.vocab import EOS, OFFSET, VOCAB_SIZE

# Shapes: B slots, C slots whose patch closes, V vocabulary

# Of `SamplingSlots`: the kernel compares ids instead, and has a parameter for each other field.
PLAIN_FIELDS = {"is_special", "is_text"}

FAR = tl.constexpr(1e30)
GOLDEN = tl.constexpr(-7046029254386353131)  # 0x9E3779B97F4A7C15
MIX_1 = tl.constexpr(-4658895280553007687)  # 0xBF58476D1CE4E5B9
MIX_2 = tl.constexpr(-7723592293110705685)  # 0x94D049BB133111EB


@dataclass
class StepBuffers:
    """What a step decides, for each slot."""

    is_active: Tensor  # [B] bool, whether a sequence is in the slot
    is_waiting: Tensor  # [B] bool, whether its closed patch waits for the global transformer
    drawn: Tensor  # [B] the id that was drawn, -1: none
    log_probability: Tensor  # [B] float32 of it
    ids: Tensor  # [B] the id to read, any where none is read
    reads: Tensor  # [B] bool, whether an id is read
    slot: Tensor  # [B] the slot itself, -1 where no id is read
    at: Tensor  # [B] position of the newest id, that to read included
    count: Tensor  # [B] bytes in the open patch before this one, -1 where no id is read
    wants: Tensor  # [B] bool, whether a closed patch is there
    closing: Tensor  # [C] slots for which the global transformer runs, -1: none
    number: Tensor  # [C] the number of the patch that each of them closes
    closing_count: Tensor  # [C] bytes in that patch
    run: Tensor  # [1] whether there is any of them
    decodes: Tensor  # [B] the slot itself, -1 where no logits are to come any more in this step
    reads_patch: Tensor  # [B] bool, whether a patch is closed yet
    starts: Tensor  # [B] bool, whether the drawn id begins a patch
    is_held: Tensor  # [B] bool, whether the logits are those of `held`, since a step went by that drew nothing
    held: Tensor  # [B, V] float32

    @classmethod
    def empty(cls, num_slots: int, max_closing: int, device: torch.device | str) -> "StepBuffers":
        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        sizes = {"closing": max_closing, "number": max_closing, "closing_count": max_closing, "run": 1}
        flags = ("is_active", "is_waiting", "reads", "wants", "reads_patch", "starts", "is_held")
        dtypes = dict.fromkeys(flags, torch.bool)
        dtypes |= {"log_probability": torch.float32, "run": torch.int32}
        names = [field.name for field in fields(cls) if field.name != "held"]
        held = torch.zeros(num_slots, VOCAB_SIZE, device=device)
        return cls(
            **{name: zeros(sizes.get(name, num_slots), dtypes.get(name, torch.long)) for name in names}, held=held
        )


def draw(logits_BV: Tensor, sampling: SamplingSlots, position: Tensor, buffers: StepBuffers) -> None:
    """Draw an id in each active slot that does not wait, be it for what its constraint allows: `SamplingSlots.draw` and
    `read` in one.

    A slot ends with EOS, or once as many ids were drawn as were asked for. One whose constraint is OUTDATED draws
    nothing, and the step may write over its logits: they are held until it draws.

    Args:
        logits_BV: float32, of what comes next.
        position: [B] ids read.
        buffers: `is_active`, `is_waiting`, `is_held` and `held` are read; `is_active`, `drawn`, `log_probability`,
            `ids`, `reads`, `slot`, `at`, `is_held` and `held` are written.
    """
    if not uses_kernels(logits_BV):
        plain_draw(logits_BV, sampling, position, buffers)
        return
    assert logits_BV.is_contiguous(), "logits are not contiguous"
    draw_kernel[(logits_BV.shape[0],)](
        logits_BV,
        *(position, buffers.is_active, buffers.is_waiting),
        *(buffers.drawn, buffers.log_probability, buffers.ids, buffers.reads, buffers.slot, buffers.at),
        *(buffers.is_held, buffers.held),
        **{f"{name}_ptr": part for name, part in vars(sampling).items() if name not in PLAIN_FIELDS},
        V=logits_BV.shape[1],
        PADDED=power_of_two(logits_BV.shape[1]),
        EOS=EOS,
        OFFSET=OFFSET,
        READY=READY,
        OUTDATED=OUTDATED,
        num_warps=4,
        **launch_options(),
    )


def plain_draw(logits_BV: Tensor, sampling: SamplingSlots, position: Tensor, buffers: StepBuffers) -> None:
    arrays, at = Arrays(buffers), position.numpy()
    is_active, is_held, constraint = arrays.is_active, arrays.is_held, sampling.constraint.numpy()
    could_draw = is_active & ~arrays.is_waiting
    draws, holds = could_draw & (constraint != OUTDATED), could_draw & (constraint == OUTDATED) & ~is_held
    if is_held.any():
        uses_held = torch.from_numpy(is_held & (constraint == READY))
        logits_BV = torch.where(uses_held[:, None], buffers.held, logits_BV)
    buffers.held[torch.from_numpy(holds)] = logits_BV[torch.from_numpy(holds)]
    drawn, log_probability = sampling.draw(logits_BV)
    ids = drawn.numpy()
    is_held[:] = (is_held | holds) & ~draws
    sampling.read(drawn, torch.from_numpy(draws))
    ends = draws & ((ids == EOS) | (sampling.remaining.numpy() <= 0))
    reads = draws & ~ends
    is_active &= ~ends
    arrays.drawn[:] = np.where(draws, ids, -1)
    arrays.log_probability[:] = log_probability.numpy()
    arrays.ids[:] = ids
    arrays.reads[:] = reads
    arrays.slot[:] = np.where(reads, np.arange(len(ids)), -1)
    arrays.at[:] = np.maximum(at - ~reads, 0)


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
def newest_logits(v, logits_ptr, held_ptr, uses_held, other, V: tl.constexpr):
    """The logits of ids `v`, or those that were held; `other` of ids beyond the last."""
    held = tl.load(held_ptr + v, mask=(v < V) & uses_held, other=other)
    return tl.where(uses_held, held, tl.load(logits_ptr + v, mask=v < V, other=other))


@triton.jit
def candidates(
    v, logits_ptr, held_ptr, seen_ptr, needed_after_ptr, allowed_ptr, penalty, valid, utf8, room, constrained,
    uses_held, V: tl.constexpr, EOS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The logits of ids `v` as they are drawn from, float64; -inf where one may not be drawn."""
    inside = v < V
    logit = newest_logits(v, logits_ptr, held_ptr, uses_held, 0.0, V).to(tl.float64)
    seen = tl.load(seen_ptr + v, mask=inside, other=0) != 0
    penalised = tl.where(logit > 0, logit / penalty, logit * penalty)
    logit = tl.where(seen, penalised, logit)
    logit = tl.where(logit == logit, logit, -FAR)
    logit = tl.minimum(tl.maximum(logit, -FAR), FAR)
    needed = tl.load(needed_after_ptr + utf8 * V + v, mask=inside, other=1 << 30)
    allowed = tl.where(valid, needed < room, (v >= OFFSET) | (v == EOS))
    by_constraint = tl.load(allowed_ptr + v, mask=inside & constrained, other=0) != 0
    allowed = tl.where(constrained, by_constraint, allowed)
    return tl.where(allowed & inside, logit, -float("inf"))


@triton.jit
def draw_kernel(
    logits_ptr, position_ptr, active_ptr, waiting_ptr, drawn_id_ptr, log_probability_ptr, ids_ptr,
    reads_ptr, slot_ptr, at_ptr, is_held_ptr, held_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    repetition_penalty_ptr, seed_ptr, drawn_ptr, seen_ptr, valid_utf8_ptr, utf8_ptr, remaining_ptr, constraint_ptr,
    allowed_ptr, utf8_after_ptr, needed_ptr, needed_after_ptr, V: tl.constexpr, PADDED: tl.constexpr,
    EOS: tl.constexpr, OFFSET: tl.constexpr, READY: tl.constexpr, OUTDATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    v = tl.arange(0, PADDED)
    wait_for_earlier(OVERLAP)
    logits_ptr += b * V
    seen_ptr += b * V
    allowed_ptr += b * V
    constraint = tl.load(constraint_ptr + b)
    constrained = (constraint == READY) | (constraint == OUTDATED)
    could_draw = (tl.load(active_ptr + b) != 0) & (tl.load(waiting_ptr + b) == 0)
    draws = could_draw & (constraint != OUTDATED)
    held_ptr += b * V
    is_held = tl.load(is_held_ptr + b) != 0
    holds = could_draw & (constraint == OUTDATED) & (is_held == 0)
    uses_held = is_held & (constraint == READY)
    plain = newest_logits(v, logits_ptr, held_ptr, uses_held, -float("inf"), V)
    highest = tl.max(plain, 0)
    normaliser = highest + tl.log(tl.sum(tl.exp(plain - highest), 0))

    utf8, valid = tl.load(utf8_ptr + b), tl.load(valid_utf8_ptr + b) != 0
    remaining = tl.load(remaining_ptr + b)
    room = tl.maximum(remaining, tl.maximum(tl.load(needed_ptr + utf8), 1))
    penalty = tl.load(repetition_penalty_ptr + b).to(tl.float64)
    logit = candidates(
        v, logits_ptr, held_ptr, seen_ptr, needed_after_ptr, allowed_ptr, penalty, valid, utf8, room, constrained,
        uses_held, V, EOS, OFFSET,
    )  # fmt: skip
    top = tl.max(logit, 0)
    temperature = tl.load(temperature_ptr + b).to(tl.float64)
    top_k, top_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b).to(tl.float64)
    greedy = temperature == 0
    scale = tl.where(greedy, 1.0, temperature)
    relative = tl.exp((logit - top) / scale)
    weight = (relative * 1073741824.0 + 0.5).to(tl.int64)
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
                other_v, logits_ptr, held_ptr, seen_ptr, needed_after_ptr, allowed_ptr, penalty, valid, utf8, room,
                constrained, uses_held, V, EOS, OFFSET,
            )  # fmt: skip
            other_weight = (tl.exp((other - top) / scale) * 1073741824.0 + 0.5).to(tl.int64)
            precedes = other[None, :] > logit[:, None]
            precedes |= (other[None, :] == logit[:, None]) & (other_v[None, :] < v[:, None])
            rank += tl.sum(precedes.to(tl.int32), 1)
            before += tl.sum(tl.where(precedes, other_weight[None, :], 0), 1)
        weight = tl.where(rank < top_k, weight, 0)
        share = top_p * tl.sum(weight, 0).to(tl.float64)
        weight = tl.where((before.to(tl.float64) < share) | (v == first), weight, 0)
    min_p = tl.load(min_p_ptr + b).to(tl.float64)
    weight = tl.where((relative >= min_p) | (v == first), weight, 0)

    count = tl.load(drawn_ptr + b)
    number = shifted(mixed(mixed(tl.load(seed_ptr + b)) + (count + 1) * GOLDEN), 40)
    point = (number * tl.sum(weight, 0)) >> 24
    drawn = tl.sum((tl.cumsum(weight, 0) <= point).to(tl.int32), 0).to(tl.int64)
    log_probability = tl.sum(tl.where(v == drawn, plain, 0.0), 0) - normaliser

    tl.debug_barrier()  # what follows writes what was read above
    tl.store(held_ptr + v, plain, mask=(v < V) & holds)
    left = remaining - 1
    ends = draws & ((drawn == EOS) | (left <= 0))
    reads = draws & (drawn != EOS) & (left > 0)
    tl.store(drawn_ptr + b, count + 1, mask=draws)
    tl.store(remaining_ptr + b, left, mask=draws)
    tl.store(constraint_ptr + b, OUTDATED, mask=draws & constrained)
    tl.store(is_held_ptr + b, (is_held | holds) & (draws == 0))
    tl.store(utf8_ptr + b, tl.load(utf8_after_ptr + utf8 * V + drawn), mask=draws)
    tl.store(seen_ptr + drawn, 1, mask=draws & (drawn >= OFFSET))
    tl.store(active_ptr + b, 0, mask=ends)
    tl.store(drawn_id_ptr + b, tl.where(draws, drawn, -1))
    tl.store(log_probability_ptr + b, log_probability)
    tl.store(ids_ptr + b, drawn)
    tl.store(reads_ptr + b, reads)
    tl.store(slot_ptr + b, tl.where(reads, b, -1).to(tl.int64))
    position = tl.load(position_ptr + b)
    tl.store(at_ptr + b, tl.maximum(tl.where(reads, position, position - 1), 0))
