# pyright: reportInvalidTypeForm=false
"""Attention between bytes and patches when bytes are decoded one by one.

Decoder: a byte reads the K keys of one patch, the last that its sequence has closed. Encoder: as a patch is closed, its
queries gather from its bytes, whose keys and values were kept one by one. What they equal in training is
`decoder_cross_attention` and `encoder_cross_attention` in `bytelatent.kernels.patch_attention`.

Source: Pagnoni et al. 2024, sections 3.2.2 and 3.3.1.
"""

import torch
from torch import Tensor

from bytelatent.kernels.decode_attention import LOWEST, joined_lanes, seen_by_lanes
from bytelatent.kernels.launch import (
    LOG2_E,
    check_contiguous,
    check_heads,
    launch_options,
    power_of_two,
    tl,
    triton,
    uses_kernels,
    wait_for_earlier,
)
from bytelatent.kernels.plain import attend_array, is_float32

# Shapes: T new bytes, B sequences, C patches that are closed, K keys or queries a patch, L bytes a patch at most,
# H query heads, J key/value heads, E head size, D width


def plain_decoder_cross_attention_step(
    q_THE: Tensor,
    k_BKJE: Tensor,
    v_BKJE: Tensor,
    reads_T: Tensor,
    *,
    new: int = 1,
    row_B: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """The plain form, with the keys of each byte gathered. Without `out`, a skipped byte's result may be anything."""
    if len(q_THE) == 1 and row_B is not None and out is None and is_float32(q_THE, k_BKJE):
        row = int(row_B)
        if row < 0 or not bool(reads_T):
            return torch.zeros_like(q_THE)
        q_JGE = q_THE.numpy().reshape(k_BKJE.shape[2], -1, q_THE.shape[-1])
        return torch.from_numpy(attend_array(q_JGE, k_BKJE.numpy()[row], v_BKJE.numpy()[row]).reshape(q_THE.shape))
    if run is not None and not bool(run):
        return torch.zeros_like(q_THE) if out is None else out
    row_T = torch.arange(len(q_THE) // new, device=q_THE.device) if row_B is None else row_B
    row_T = row_T if new == 1 else row_T.repeat_interleave(new)
    row = row_T.clamp(min=0)
    k, v, q = k_BKJE[row].float(), v_BKJE[row].float(), q_THE.float()
    if q.shape[1] != k.shape[2]:
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[2], dim=2) for part in (k, v))
    weight = ((q[:, None] * k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5).softmax(1)
    found = (weight * v).sum(1).masked_fill_(~reads_T[:, None, None], 0.0).to(q_THE.dtype)
    if out is None:
        return found
    out[row_T >= 0] = found[row_T >= 0]
    return out


def decoder_cross_attention_step(
    q_THE: Tensor,
    k_BKJE: Tensor,
    v_BKJE: Tensor,
    reads_T: Tensor,
    *,
    new: int = 1,
    row_B: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """Each byte attends to the K keys of the patch that its sequence reads, [T, H, E].

    Args:
        q_THE: queries of the bytes, contiguous; byte t belongs to sequence t / S.
        k_BKJE, v_BKJE: keys and values of the patch that each row reads, contiguous.
        reads_T: bool, whether each byte reads a patch yet; zeros if not, and its row may hold anything.
        new: S, new bytes a sequence.
        row_B: the row of each sequence, where negative nothing is written; None: row b for sequence b.
        out: where the result goes; a new tensor of the queries' dtype.
        run: one number on the device; where it is 0 nothing is written.
    """
    if not uses_kernels(q_THE):
        return plain_decoder_cross_attention_step(
            q_THE, k_BKJE, v_BKJE, reads_T, new=new, row_B=row_B, out=out, run=run
        )
    size, heads, head_dim = q_THE.shape
    _, num_keys, kv_heads, _ = k_BKJE.shape
    out = torch.empty_like(q_THE) if out is None else out
    assert k_BKJE.shape == v_BKJE.shape, "keys and values differ in shape"
    check_contiguous(q=q_THE, keys=k_BKJE, values=v_BKJE, out=out)
    check_heads(heads, kv_heads, head_dim)
    read_patch_kernel[(size, kv_heads)](
        q_THE,
        k_BKJE,
        v_BKJE,
        reads_T,
        row_B,
        out,
        run,
        head_dim**-0.5 * LOG2_E,
        S=new,
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
    begin_C: Tensor | None = None,
    row_C: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """The plain form, one patch after another."""
    out = torch.zeros_like(q_CKHE) if out is None else out
    if run is not None and not bool(run):
        return out
    begins = [0] * len(out) if begin_C is None else begin_C.tolist()
    rows = range(len(out)) if row_C is None else row_C.tolist()
    for place, (row, begin, count) in enumerate(zip(rows, begins, count_C.tolist(), strict=True)):
        if row >= 0 and count > 0:
            k_RJE, v_RJE = (part[row, begin : begin + count].float().numpy() for part in (k_BLJE, v_BLJE))
            q_HKE = q_CKHE[place].float().numpy().transpose(1, 0, 2)
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
    begin_C: Tensor | None = None,
    row_C: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """Each closed patch's queries attend to its bytes, [C, K, H, E].

    Args:
        q_CKHE: queries, contiguous.
        k_BLJE, v_BLJE: keys and values of the bytes of each row's patch, contiguous; see `append_patch_byte`.
        count_C: how many bytes each patch has, int32 or int64, L at most; zeros come of none.
        begin_C: where in its row each patch begins; None: with the first byte.
        row_C: the row of each patch, where negative nothing is written; None: row c for patch c.
        out: where the result goes; a new tensor of the queries' dtype.
        run: one number on the device; where it is 0 nothing is written.
    """
    if not uses_kernels(q_CKHE):
        return plain_encoder_cross_attention_step(
            q_CKHE, k_BLJE, v_BLJE, count_C, begin_C=begin_C, row_C=row_C, out=out, run=run
        )
    patches, num_queries, heads, head_dim = q_CKHE.shape
    _, most, kv_heads, _ = k_BLJE.shape
    out = torch.empty_like(q_CKHE) if out is None else out
    assert k_BLJE.shape == v_BLJE.shape, "keys and values differ in shape"
    check_contiguous(q=q_CKHE, keys=k_BLJE, values=v_BLJE, out=out)
    check_heads(heads, kv_heads, head_dim)
    gather_bytes_kernel[(patches, num_queries, heads)](
        q_CKHE,
        k_BLJE,
        v_BLJE,
        count_C,
        begin_C,
        row_C,
        out,
        run,
        head_dim**-0.5 * LOG2_E,
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
    """Put a byte of each sequence into its open patch: its key and value, and its state into the patch's maximum.

    Args:
        kv_B2JE: the byte's key, then its value, contiguous.
        k_BLJE, v_BLJE: those of the open patch's bytes, contiguous; written.
        count_B: bytes that the patch has already, int32 or int64; 0 starts a new patch, and where negative or L nothing
            is written. It is not counted up.
        h_BD, pooled_BD: the byte's state and the maximum of the patch's, contiguous; the maximum is written.
        run: one number on the device; where it is 0 nothing is written.
    """
    if not uses_kernels(kv_B2JE):
        plain_append_patch_byte(kv_B2JE, k_BLJE, v_BLJE, count_B, h_BD=h_BD, pooled_BD=pooled_BD, run=run)
        return
    sequences = kv_B2JE.shape[0]
    _, most, kv_heads, head_dim = k_BLJE.shape
    assert kv_B2JE.shape[1:] == (2 * kv_heads, head_dim), f"kv: {tuple(kv_B2JE.shape)}"
    check_contiguous(kv=kv_B2JE, keys=k_BLJE, values=v_BLJE)
    width, dim, block = kv_heads * head_dim, 0, 256
    assert (h_BD is None) == (pooled_BD is None), "states without their maximum, or it without them"
    if h_BD is not None and pooled_BD is not None:
        assert h_BD.shape == pooled_BD.shape, "states and their maximum differ in shape"
        check_contiguous(states=h_BD, pooled=pooled_BD)
        dim = h_BD.shape[1]
    keep_byte_kernel[(sequences, -(-max(width, dim) // block))](
        kv_B2JE,
        k_BLJE,
        v_BLJE,
        count_B,
        h_BD,
        pooled_BD,
        run,
        L=most,
        WIDTH=width,
        D=dim,
        BLOCK=block,
        num_warps=1,
        **launch_options(),
    )


# Kernels


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
