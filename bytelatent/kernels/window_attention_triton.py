"""The Triton side of `window_attention`."""

import triton
import triton.language as tl


@triton.jit
def turned(x, cos, sin, ROWS: tl.constexpr, E: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [ROWS, E // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [ROWS, E])


@triton.jit
def turn_in_place(x_ptr, cos_ptr, sin_ptr, ROW: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, E: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, PADDED)[:, None]
    place = x_ptr + at * ROW + head * E + tl.arange(0, E)[None, :]
    angle = at * (E // 2) + tl.arange(0, E // 2)
    cos, sin = tl.load(cos_ptr + angle)[None, :], tl.load(sin_ptr + angle)[None, :]
    x = tl.load(place, mask=head < H, other=0.0)
    tl.store(place, turned(x.to(tl.float32), cos, sin, PADDED, E).to(x.dtype), mask=head < H)


@triton.jit
def over_keys(
    state_acc, state_sum, state_max, q, k_ptr, v_ptr, begin, end, row, low, MASKED: tl.constexpr, ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    for at in tl.range(begin, end, BLOCK, num_stages=2):
        k = tl.load(k_ptr + at * ROW)
        v = tl.load(v_ptr + at * ROW)
        score = tl.dot(q, tl.trans(k))
        if MASKED:
            place = at + tl.arange(0, BLOCK)[None, :]
            score = tl.where((place <= row[:, None]) & (place >= low[:, None]), score, -1e30)
        highest = tl.maximum(state_max, tl.max(score, 1))
        weight = tl.exp2(score - highest[:, None])
        shrink = tl.exp2(state_max - highest)
        state_sum = state_sum * shrink + tl.sum(weight, 1)
        state_acc = tl.dot(weight.to(v.dtype), v, state_acc * shrink[:, None])
        state_max = highest
    return state_acc, state_sum, state_max


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, low_ptr, cos_ptr, sin_ptr, scale, ROW: tl.constexpr, OUT_ROW: tl.constexpr,
    BLOCK: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0), tl.program_id(1) * BLOCK
    row = first + tl.arange(0, BLOCK)
    wide = row.to(tl.int64)[:, None]
    column = head * E + tl.arange(0, E)[None, :]
    angle = wide * (E // 2) + tl.arange(0, E // 2)[None, :]
    q = tl.load(q_ptr + wide * ROW + column)
    q = (turned(q.to(tl.float32), tl.load(cos_ptr + angle), tl.load(sin_ptr + angle), BLOCK, E) * scale).to(q.dtype)
    low = tl.load(low_ptr + row)
    # Every query sees all of the keys from the last one's `low` to the first query.
    begin = tl.load(low_ptr + first) // BLOCK * BLOCK
    inner = tl.minimum((tl.load(low_ptr + first + BLOCK - 1) + BLOCK - 1) // BLOCK * BLOCK, first)
    key = tl.arange(0, BLOCK)[:, None] * ROW + column
    acc = tl.zeros([BLOCK, E], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    highest = tl.full([BLOCK], -1e30, tl.float32)
    keys, values = k_ptr + key, v_ptr + key
    acc, total, highest = over_keys(acc, total, highest, q, keys, values, begin, inner, row, low, True, ROW, BLOCK)
    acc, total, highest = over_keys(acc, total, highest, q, keys, values, inner, first, row, low, False, ROW, BLOCK)
    end = first + BLOCK
    acc, total, highest = over_keys(acc, total, highest, q, keys, values, first, end, row, low, True, ROW, BLOCK)
    tl.store(out_ptr + wide * OUT_ROW + column, (acc / total[:, None]).to(q.dtype))
