"""The Triton side of `decode_step`."""

import triton
import triton.language as tl

from bytelatent.kernels.overlap_triton import wait_for_earlier

FAR = tl.constexpr(1e30)
GOLDEN = tl.constexpr(-7046029254386353131)  # 0x9E3779B97F4A7C15
MIX_1 = tl.constexpr(-4658895280553007687)  # 0xBF58476D1CE4E5B9
MIX_2 = tl.constexpr(-7723592293110705685)  # 0x94D049BB133111EB


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
    if MODE < 3:
        v = tl.arange(0, PADDED)
        logits = tl.load(logits_ptr + b * V + v, mask=v < V, other=-float("inf"))
        above = logits - tl.max(logits, 0)
        weight = tl.exp(above)
        total = tl.sum(weight, 0)
        entropy = tl.log(total) - tl.sum(tl.where(weight > 0, weight * above, 0.0), 0) / total
    rise = entropy - previous
    if MODE == 0:
        natural = (position == 0) | (entropy > threshold)
    elif MODE == 1:
        natural = (position <= 1) | (rise > threshold)
    elif MODE == 2:
        natural = (position <= 1) | ((entropy > threshold) & (rise > threshold_add) & (position != 2))
    elif MODE == 3:
        continues = (position > 0) & is_space_like(tl.load(tail_ptr + b * W + W - 2), OFFSET)
        natural = (ids < OFFSET) | (is_space_like(ids, OFFSET) & (continues == 0))
    elif MODE == 4:
        natural = (position + 1) % PATCH_SIZE == 0
    else:
        natural = position >= 0
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
