"""Attention between bytes and patches when bytes are decoded one by one.

Decoder: a byte reads the K keys of one patch, the last that its sequence has closed. Encoder: as a patch is closed, its
queries gather from its bytes, whose keys and values were kept one by one. What they equal in training is
`attend_to_read_patch` and `attend_to_own_bytes` in `bytelatent.kernels.patch_attention`.

Source: Pagnoni et al. 2024, sections 3.2.2 and 3.3.1.
"""

from typing import Any

import torch
from torch import Tensor

from bytelatent.kernels.overlap import launch_options
from bytelatent.kernels.window_attention import LOG2_E

# Shapes: T new bytes, B sequences, C patches that are closed, K keys or queries a patch, L bytes a patch at most,
# H query heads, J key/value heads, E head size, D width


def plain_read_patch(
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
    """What `read_patch` computes, with the keys of each byte gathered."""
    out = torch.zeros_like(q_THE) if out is None else out
    if run is not None and not bool(run):
        return out
    sequence_T = torch.arange(q_THE.shape[0], device=q_THE.device) // new
    row_T = sequence_T if row_B is None else row_B.long()[sequence_T]
    group = q_THE.shape[1] // k_BKJE.shape[2]
    k, v = (part[row_T.clamp(min=0)].float().repeat_interleave(group, dim=2) for part in (k_BKJE, v_BKJE))
    weight = (torch.einsum("the,tkhe->tkh", q_THE.float(), k) * q_THE.shape[-1] ** -0.5).softmax(1)
    found = torch.einsum("tkh,tkhe->the", weight, v)
    found = torch.where((reads_T != 0)[:, None, None], found, 0.0).to(out.dtype)
    out.copy_(torch.where((row_T >= 0)[:, None, None], found, out))
    return out


def read_patch(
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
    from bytelatent.kernels import decode_patches_triton

    kernels: Any = decode_patches_triton
    size, heads, head_dim = q_THE.shape
    _, num_keys, kv_heads, _ = k_BKJE.shape
    out = torch.empty_like(q_THE) if out is None else out
    assert k_BKJE.shape == v_BKJE.shape, "keys and values differ in shape"
    _all_contiguous(q=q_THE, keys=k_BKJE, values=v_BKJE, out=out)
    _check_heads(heads, kv_heads, head_dim)
    kernels.read_patch_kernel[(size, kv_heads)](
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
        PADDED_K=_power_of_two(num_keys),
        J=kv_heads,
        G=heads // kv_heads,
        PADDED_G=_power_of_two(heads // kv_heads),
        E=head_dim,
        num_warps=1,
        **launch_options(),
    )
    return out


def plain_gather_bytes(
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
    """What `gather_bytes` computes, one patch after the other."""
    out = torch.zeros_like(q_CKHE) if out is None else out
    if run is not None and not bool(run):
        return out
    group = q_CKHE.shape[2] // k_BLJE.shape[2]
    for c, q_KHE in enumerate(q_CKHE):
        row = c if row_C is None else int(row_C[c])
        if row < 0:
            continue
        begin, count = 0 if begin_C is None else int(begin_C[c]), int(count_C[c])
        k, v = (part[row, begin : begin + count].float().repeat_interleave(group, dim=1) for part in (k_BLJE, v_BLJE))
        weight = (torch.einsum("khe,lhe->khl", q_KHE.float(), k) * q_KHE.shape[-1] ** -0.5).softmax(-1)
        out[c] = torch.einsum("khl,lhe->khe", weight, v)
    return out


def gather_bytes(
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
        k_BLJE, v_BLJE: keys and values of the bytes of each row's patch, contiguous; see `keep_byte`.
        count_C: how many bytes each patch has, int32 or int64, L at most; zeros come of none.
        begin_C: where in its row each patch begins; None: with the first byte.
        row_C: the row of each patch, where negative nothing is written; None: row c for patch c.
        out: where the result goes; a new tensor of the queries' dtype.
        run: one number on the device; where it is 0 nothing is written.
    """
    from bytelatent.kernels import decode_patches_triton

    kernels: Any = decode_patches_triton
    patches, num_queries, heads, head_dim = q_CKHE.shape
    _, most, kv_heads, _ = k_BLJE.shape
    out = torch.empty_like(q_CKHE) if out is None else out
    assert k_BLJE.shape == v_BLJE.shape, "keys and values differ in shape"
    _all_contiguous(q=q_CKHE, keys=k_BLJE, values=v_BLJE, out=out)
    _check_heads(heads, kv_heads, head_dim)
    kernels.gather_bytes_kernel[(patches, num_queries, heads)](
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


def plain_keep_byte(
    kv_B2JE: Tensor,
    k_BLJE: Tensor,
    v_BLJE: Tensor,
    count_B: Tensor,
    *,
    h_BD: Tensor | None = None,
    pooled_BD: Tensor | None = None,
    run: Tensor | None = None,
) -> None:
    """What `keep_byte` does, one sequence after the other."""
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


def keep_byte(
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
        count_B: bytes that the patch has already, int32 or int64; 0 starts it anew, and where negative or L nothing is
            written. It is not counted up.
        h_BD, pooled_BD: the byte's state and the maximum of the patch's, contiguous; the maximum is written.
        run: one number on the device; where it is 0 nothing is written.
    """
    from bytelatent.kernels import decode_patches_triton

    kernels: Any = decode_patches_triton
    sequences = kv_B2JE.shape[0]
    _, most, kv_heads, head_dim = k_BLJE.shape
    assert kv_B2JE.shape[1:] == (2 * kv_heads, head_dim), f"kv: {tuple(kv_B2JE.shape)}"
    _all_contiguous(kv=kv_B2JE, keys=k_BLJE, values=v_BLJE)
    width, dim, block = kv_heads * head_dim, 0, 256
    assert (h_BD is None) == (pooled_BD is None), "states without their maximum, or it without them"
    if h_BD is not None and pooled_BD is not None:
        assert h_BD.shape == pooled_BD.shape, "states and their maximum differ in shape"
        _all_contiguous(states=h_BD, pooled=pooled_BD)
        dim = h_BD.shape[1]
    kernels.keep_byte_kernel[(sequences, -(-max(width, dim) // block))](
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


def _all_contiguous(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        assert tensor.is_contiguous(), f"{name}: not contiguous"


def _check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    assert heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads}"
    assert head_dim & (head_dim - 1) == 0, f"a head size of {head_dim} is no power of two"


def _power_of_two(size: int) -> int:
    """The next one."""
    return 1 << (size - 1).bit_length()
