"""The Triton side of `hash_embed`."""

import triton
import triton.language as tl

from bytelatent.kernels.overlap_triton import wait_for_earlier


@triton.jit
def hash_embed_kernel(
    tail_ptr, history_ptr, powers_ptr, tables_ptr, embedding_ptr, out_ptr, rows_ptr, run_ptr, S, L,
    N: tl.constexpr, PADDED_N: tl.constexpr, W: tl.constexpr, PADDED_W: tl.constexpr, V: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    table, back = tl.arange(0, PADDED_N), tl.arange(0, PADDED_W)
    inside = (table < N)[:, None] & (back < W)[None, :]
    powers = tl.load(powers_ptr + table[:, None] * W + back[None, :], mask=inside, other=0)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    place = L - S + t % S
    newest = tail_ptr + (t // S).to(tl.int64) * L + place
    history = tl.load(history_ptr + t)
    ids = tl.load(newest - back, mask=(back < W) & (back <= history) & (back <= place), other=0).to(tl.int64)
    hashes = tl.sum(ids[None, :] * powers, 1) % V
    # The remainder has the sign of what is divided, on the device.
    rows = table * V + tl.where(hashes < 0, hashes + V, hashes)
    if rows_ptr is not None and tl.program_id(1) == 0:
        tl.store(rows_ptr + t.to(tl.int64) * N + table, rows, mask=table < N)
    found = tl.load(
        tables_ptr + rows[:, None] * D + d[None, :], mask=(table < N)[:, None] & (d < D)[None, :], other=0.0
    )
    x = tl.sum(found.to(tl.float32), 0)
    if embedding_ptr is not None:
        own = embedding_ptr + tl.load(newest).to(tl.int64) * D + d
        x += tl.load(own, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t.to(tl.int64) * D + d, x.to(out_ptr.dtype.element_ty), mask=d < D)
