"""The Triton side of `decode_patches`."""

import triton
import triton.language as tl

from bytelatent.kernels.decode_attention_triton import LOWEST, joined_lanes, seen_by_lanes
from bytelatent.kernels.overlap_triton import wait_for_earlier


@triton.jit
def read_patch_kernel(
    q_ptr, k_ptr, v_ptr, reads_ptr, row_ptr, out_ptr, run_ptr, scale, S: tl.constexpr, K: tl.constexpr,
    PADDED_K: tl.constexpr, J: tl.constexpr, G: tl.constexpr, PADDED_G: tl.constexpr, E: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    byte, group = tl.program_id(0), tl.program_id(1)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    row = byte // S
    if row_ptr is not None:
        row = tl.load(row_ptr + row).to(tl.int32)
        if row < 0:
            return
    reads = tl.load(reads_ptr + byte).to(tl.int32) != 0
    head, key, e = tl.arange(0, PADDED_G), tl.arange(0, PADDED_K), tl.arange(0, E)
    at_q = (byte * J + group).to(tl.int64) * (G * E) + head[:, None] * E + e[None, :]
    at_k = row.to(tl.int64) * (K * J * E) + key[:, None] * (J * E) + group * E + e[None, :]
    q = tl.load(q_ptr + at_q, mask=(head < G)[:, None], other=0.0).to(tl.float32)
    within = (key < K) & reads
    k = tl.load(k_ptr + at_k, mask=within[:, None], other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at_k, mask=within[:, None], other=0.0).to(tl.float32)
    score = tl.where(within[None, :], tl.sum(q[:, None, :] * k[None, :, :], 2) * scale, LOWEST)
    weight = tl.exp2(score - tl.max(score, 1)[:, None])  # of equal keys, all 0, where nothing is read
    weight = tl.where((key < K)[None, :], weight, 0.0)
    out = tl.sum(weight[:, :, None] * v[None, :, :], 1) / tl.sum(weight, 1)[:, None]
    tl.store(out_ptr + at_q, out.to(out_ptr.dtype.element_ty), mask=(head < G)[:, None])


@triton.jit
def gather_bytes_kernel(
    q_ptr, k_ptr, v_ptr, count_ptr, begin_ptr, row_ptr, out_ptr, run_ptr, scale, L, K: tl.constexpr,
    H: tl.constexpr, J: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    patch, query, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    row = patch
    if row_ptr is not None:
        row = tl.load(row_ptr + patch).to(tl.int32)
        if row < 0:
            return
    count = tl.load(count_ptr + patch).to(tl.int32)
    begin = 0
    if begin_ptr is not None:
        begin = tl.load(begin_ptr + patch).to(tl.int32)
    e = tl.arange(0, E)
    at_q = ((patch * K + query) * H + head).to(tl.int64) * E + e
    q = tl.load(q_ptr + at_q).to(tl.float32)
    start = row.to(tl.int64) * (L * J * E) + head // (H // J) * E
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, E], tl.float32)
    for first in tl.range(0, count, BLOCK):
        byte = first + tl.arange(0, BLOCK)
        seen = byte < count
        place = start + (begin + byte)[:, None] * (J * E) + e[None, :]
        k = tl.load(k_ptr + place, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + place, mask=seen[:, None], other=0.0).to(tl.float32)
        highest, total, acc = seen_by_lanes(q, k, v, seen, scale, highest, total, acc)
    highest, total, acc = joined_lanes(highest, total, acc)
    out = tl.where(count > 0, acc / tl.where(count > 0, total, 1.0), 0.0)
    tl.store(out_ptr + at_q, out.to(out_ptr.dtype.element_ty))


@triton.jit
def keep_byte_kernel(
    kv_ptr, k_ptr, v_ptr, count_ptr, h_ptr, pooled_ptr, run_ptr, L, WIDTH: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    count = tl.load(count_ptr + b).to(tl.int32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    kept = (count >= 0) & (count < L)
    within = (at < WIDTH) & kept
    place = (b.to(tl.int64) * L + count) * WIDTH + at
    own = kv_ptr + b.to(tl.int64) * (2 * WIDTH) + at
    tl.store(k_ptr + place, tl.load(own, mask=within), mask=within)
    tl.store(v_ptr + place, tl.load(own + WIDTH, mask=within), mask=within)
    if pooled_ptr is not None:
        within = (at < D) & kept
        place = b.to(tl.int64) * D + at
        h = tl.load(h_ptr + place, mask=within, other=0.0).to(tl.float32)
        pooled = tl.load(pooled_ptr + place, mask=within, other=0.0).to(tl.float32)
        pooled = tl.where(count == 0, h, tl.maximum(pooled, h))
        tl.store(pooled_ptr + place, pooled.to(pooled_ptr.dtype.element_ty), mask=within)
