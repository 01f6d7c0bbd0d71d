# pyright: reportInvalidTypeForm=false
"""Cross-attention between bytes and patches in decode steps, byte by byte.

Decoder: a byte attends to the K keys of one patch, the last that its sequence has closed. Encoder: as a patch is
closed, its queries attend to its bytes, whose keys and values were cached one by one. In training they are
`decoder_cross_attention` and `encoder_cross_attention` of `bytelatent.kernels.patch_attention`.

Source: Pagnoni et al. 2024, sections 3.2.2 and 3.3.1.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytelatent.kernels.decode_attention import joined_lanes, seen_by_lanes
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

# Shapes: T new bytes, B sequences, C patches that are closed, K keys or queries per patch, L bytes
# of a patch at most, H query heads, J key/value heads, G queries that share a key, E head size, D width


def plain_decoder_cross_attention_step(
    q_THE: Tensor,
    k_BKJE: Tensor,
    v_BKJE: Tensor,
    reads_T: Tensor,
    *,
    row_T: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """The plain form, one byte after another. Without `out`, a skipped byte's result may be anything."""
    if run is not None and not bool(run):
        return torch.zeros_like(q_THE) if out is None else out
    found_THE = np.zeros(q_THE.shape, np.float32) if out is None else array(out)
    q_TJGE = array(q_THE).reshape(len(q_THE), k_BKJE.shape[2], -1, q_THE.shape[-1])
    rows = range(len(q_THE)) if row_T is None else row_T.tolist()
    for t, reads in enumerate(reads_T.tolist()):
        row = rows[t]
        if row >= 0 and reads:
            found_JGE = attend_array(q_TJGE[t], array(k_BKJE, row), array(v_BKJE, row))
            found_THE[t] = found_JGE.reshape(q_THE.shape[1:])
        elif row >= 0:
            found_THE[t] = 0
    return tensor_like(q_THE, found_THE) if out is None else write_back(out, ..., found_THE)


def decoder_cross_attention_step(
    q_THE: Tensor,
    k_BKJE: Tensor,
    v_BKJE: Tensor,
    reads_T: Tensor,
    *,
    row_T: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """Each byte attends to the K keys of the patch that its sequence reads, [T, H, E].

    Args:
        q_THE: queries of the bytes, contiguous.
        k_BKJE, v_BKJE: keys and values of the patch that each row reads, contiguous.
        reads_T: bool, whether each byte reads a patch yet; zeros if not, and its row may hold anything.
        row_T: the row of each byte, where negative nothing is written; None: row t for byte t.
        out: where the result goes; a new tensor of the queries' dtype.
        run: one number on the device; where it is 0 nothing is written.
    """
    if not uses_kernels(q_THE):
        given: dict[str, Any] = {"row_T": row_T, "out": out, "run": run}
        return plain_decoder_cross_attention_step(q_THE, k_BKJE, v_BKJE, reads_T, **given)
    (size, heads, head_dim), (_, num_keys, kv_heads, _) = q_THE.shape, k_BKJE.shape
    out = torch.empty_like(q_THE) if out is None else out
    check_contiguous(q=q_THE, keys=k_BKJE, values=v_BKJE, out=out)
    decoder_cross_attention_step_kernel[(size, kv_heads)](
        *(q_THE, k_BKJE, v_BKJE, reads_T, row_T, out, run, head_dim**-0.5 * LOG2_E),
        K=num_keys,
        PADDED_K=power_of_two(num_keys),
        J=kv_heads,
        G=heads // kv_heads,
        PADDED_G=power_of_two(heads // kv_heads),
        E=head_dim,
        num_warps=1,
        **launch_options(),
    )
    return out


def plain_encoder_cross_attention_step(
    q_CKHE: Tensor,
    k_BLJE: Tensor,
    v_BLJE: Tensor,
    count_C: Tensor,
    *,
    row_C: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """The plain form, one patch after another."""
    out = torch.zeros_like(q_CKHE) if out is None else out
    if run is not None and not bool(run):
        return out
    rows = range(len(out)) if row_C is None else row_C.tolist()
    for place, (row, count) in enumerate(zip(rows, count_C.tolist(), strict=True)):
        if row >= 0 and count > 0:
            k_RJE, v_RJE = (array(part, (row, slice(0, count))) for part in (k_BLJE, v_BLJE))
            q_HKE = array(q_CKHE, place).transpose(1, 0, 2)
            found_JGE = attend_array(q_HKE.reshape(k_RJE.shape[1], -1, k_RJE.shape[2]), k_RJE, v_RJE)
            out[place] = torch.from_numpy(found_JGE.reshape(q_HKE.shape).transpose(1, 0, 2))
        elif row >= 0:
            out[place] = 0
    return out


def encoder_cross_attention_step(
    q_CKHE: Tensor,
    k_BLJE: Tensor,
    v_BLJE: Tensor,
    count_C: Tensor,
    *,
    row_C: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """Each closed patch's queries attend to its bytes, [C, K, H, E].

    Args:
        q_CKHE: queries, contiguous.
        k_BLJE, v_BLJE: keys and values of the bytes of each row's patch, contiguous; see `append_patch_byte`.
        count_C: the number of bytes of each patch, int32 or int64, L at most; 0 gives zeros.
        row_C: the row of each patch, where negative nothing is written; None: row c for patch c.
        out: where the result goes; a new tensor of the queries' dtype.
        run: one number on the device; where it is 0 nothing is written.
    """
    if not uses_kernels(q_CKHE):
        given: dict[str, Any] = {"row_C": row_C, "out": out, "run": run}
        return plain_encoder_cross_attention_step(q_CKHE, k_BLJE, v_BLJE, count_C, **given)
    (patches, num_queries, heads, head_dim), (_, most, kv_heads, _) = q_CKHE.shape, k_BLJE.shape
    out = torch.empty_like(q_CKHE) if out is None else out
    check_contiguous(q=q_CKHE, keys=k_BLJE, values=v_BLJE, out=out)
    encoder_cross_attention_step_kernel[(patches, num_queries, heads)](
        *(q_CKHE, k_BLJE, v_BLJE, count_C, row_C, out, run, head_dim**-0.5 * LOG2_E),
        L=most,
        K=num_queries,
        H=heads,
        J=kv_heads,
        E=head_dim,
        BLOCK=16,
        num_warps=1,
        **launch_options(),
    )
    return out


def plain_append_patch_byte(
    kv_B2JE: Tensor,
    k_BLJE: Tensor,
    v_BLJE: Tensor,
    count_B: Tensor,
    *,
    h_BD: Tensor | None = None,
    pooled_BD: Tensor | None = None,
    run: Tensor | None = None,
) -> None:
    """The plain form, one sequence after another."""
    if run is not None and not bool(run):
        return
    kv_heads = k_BLJE.shape[2]
    for b, count in enumerate(count_B.tolist()):
        if not 0 <= count < k_BLJE.shape[1]:
            continue
        k_BLJE[b, count], v_BLJE[b, count] = kv_B2JE[b, :kv_heads], kv_B2JE[b, kv_heads:]
        if h_BD is not None and pooled_BD is not None:
            h_D = h_BD[b].to(pooled_BD.dtype)
            pooled_BD[b] = h_D if count == 0 else torch.maximum(pooled_BD[b], h_D)


def append_patch_byte(
    kv_B2JE: Tensor,
    k_BLJE: Tensor,
    v_BLJE: Tensor,
    count_B: Tensor,
    *,
    h_BD: Tensor | None = None,
    pooled_BD: Tensor | None = None,
    run: Tensor | None = None,
) -> None:
    """Add a byte of each sequence to its open patch: its key and value, and its state to the patch's maximum.

    Args:
        kv_B2JE: the byte's key, then its value, contiguous.
        k_BLJE, v_BLJE: those of the open patch's bytes, contiguous; written.
        count_B: bytes that the patch has already, int32 or int64; 0 starts a new patch, and where negative or L nothing
            is written. It is not counted up.
        h_BD, pooled_BD: the byte's state and the maximum of the patch's, both or neither, contiguous; the maximum is
            written.
        run: one number on the device; where it is 0 nothing is written.
    """
    if not uses_kernels(kv_B2JE):
        plain_append_patch_byte(kv_B2JE, k_BLJE, v_BLJE, count_B, h_BD=h_BD, pooled_BD=pooled_BD, run=run)
        return
    _, most, kv_heads, head_dim = k_BLJE.shape
    width, dim, block = kv_heads * head_dim, 0 if h_BD is None else h_BD.shape[1], 256
    check_contiguous(kv=kv_B2JE, keys=k_BLJE, values=v_BLJE, states=h_BD, pooled=pooled_BD)
    append_patch_byte_kernel[(len(kv_B2JE), -(-max(width, dim) // block))](
        *(kv_B2JE, k_BLJE, v_BLJE, count_B, h_BD, pooled_BD, run),
        L=most,
        WIDTH=width,
        D=dim,
        BLOCK=block,
        num_warps=1,
        **launch_options(),
    )


# Kernels


@triton.jit
def decoder_cross_attention_step_kernel(
    q_ptr, k_ptr, v_ptr, reads_ptr, row_ptr, out_ptr, run_ptr, scale, K: tl.constexpr,
    PADDED_K: tl.constexpr, J: tl.constexpr, G: tl.constexpr, PADDED_G: tl.constexpr, E: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    byte, group = tl.program_id(0), tl.program_id(1)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    row = byte
    if row_ptr is not None:
        row = tl.load(row_ptr + byte).to(tl.int32)
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
def encoder_cross_attention_step_kernel(
    q_ptr, k_ptr, v_ptr, count_ptr, row_ptr, out_ptr, run_ptr, scale, L, K: tl.constexpr,
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
        place = start + byte[:, None] * (J * E) + e[None, :]
        k = tl.load(k_ptr + place, mask=seen[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + place, mask=seen[:, None], other=0.0).to(tl.float32)
        highest, total, acc = seen_by_lanes(q, k, v, seen, scale, highest, total, acc)
    highest, total, acc = joined_lanes(highest, total, acc)
    out = tl.where(count > 0, acc / tl.where(count > 0, total, 1.0), 0.0)
    tl.store(out_ptr + at_q, out.to(out_ptr.dtype.element_ty))


@triton.jit
def append_patch_byte_kernel(
    kv_ptr, k_ptr, v_ptr, count_ptr, h_ptr, pooled_ptr, run_ptr, L, WIDTH: tl.constexpr,
    D: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    wait_for_earlier(OVERLAP)
    if run_ptr is not None and tl.load(run_ptr) == 0:
        return
    count = tl.load(count_ptr + b).to(tl.int32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    appends = (count >= 0) & (count < L)
    within = (at < WIDTH) & appends
    place = (b.to(tl.int64) * L + count) * WIDTH + at
    own = kv_ptr + b.to(tl.int64) * (2 * WIDTH) + at
    tl.store(k_ptr + place, tl.load(own, mask=within), mask=within)
    tl.store(v_ptr + place, tl.load(own + WIDTH, mask=within), mask=within)
    if pooled_ptr is not None:
        within = (at < D) & appends
        place = b.to(tl.int64) * D + at
        h = tl.load(h_ptr + place, mask=within, other=0.0).to(tl.float32)
        pooled = tl.load(pooled_ptr + place, mask=within, other=0.0).to(tl.float32)
        pooled = tl.where(count == 0, h, tl.maximum(pooled, h))
        tl.store(pooled_ptr + place, pooled.to(pooled_ptr.dtype.element_ty), mask=within)
