"""Attention of the newest positions of several sequences over caches of their keys and values, for decoding.

The kernel takes queries, keys and values as one product wrote them, turns them by their rotary angles, puts the new
keys and values into the cache and attends, all at once. A cache is a ring: position p lies in slot p mod R. The new
positions' keys are used from where they were computed; nothing that a launch writes is read by it.

Where keys are many and sequences few, several programs share the keys of one head. The last of them to finish joins
what they found, always in the same order.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bytelatent.kernels.overlap import launch_options
from bytelatent.kernels.window_attention import LOG2_E, angles, turn

# Shapes: B sequences, S new positions each, H query heads, J key/value heads, E head size, A = E/2 angles,
# C rows of the cache, R slots of a row, Z = H + 2J heads of queries, keys and values together

PROGRAMS = 132  # that run at once on the GPU that the launches are chosen for


@dataclass(frozen=True)
class AttentionLaunch:
    """How the attention is cut into programs.

    Attributes:
        block: keys looked at at once, a power of two, from 16 on.
        splits: programs that share the keys of a head of a sequence.
    """

    block: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SplitScratch:
    """What programs that share keys leave for each other; calls that follow one another may use the same."""

    found: Tensor  # [B*S*H, splits, E]
    weights: Tensor  # [B*S*H, splits, 2]: the highest score and the sum of the weights
    arrived: Tensor  # [B*J] programs that are done, 0 between launches


def split_scratch(rows: int, heads: int, head_dim: int, splits: int, device: torch.device | str) -> SplitScratch:
    """For `rows` = B*S new positions and H `heads`."""
    found = torch.empty(rows * heads, splits, head_dim, device=device)
    weights = torch.empty(rows * heads, splits, 2, device=device)
    return SplitScratch(found, weights, torch.zeros(rows * heads, dtype=torch.int32, device=device))


def launch_for_attention(sequences: int, new: int, heads: int, kv_heads: int, reach: int) -> AttentionLaunch:
    """The launch for attention that looks at `reach` positions at most: the window, or the slots of a row."""
    splits, programs = 1, sequences * kv_heads
    while splits < 8 and programs * splits * 2 <= PROGRAMS and reach >= splits * 2 * 32:
        splits *= 2
    if new * heads == kv_heads:
        return AttentionLaunch(
            block=32 if reach <= splits * 128 or splits == 1 else 64, splits=splits, num_warps=4, num_stages=2
        )
    return AttentionLaunch(block=64, splits=splits, num_warps=4, num_stages=2)


def rotary_table(max_position: int, head_dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """Cosine and sine of the angles of positions below `max_position`, float32 [max_position, A, 2]."""
    return torch.stack(angles(torch.arange(max_position, device=device), head_dim, theta), dim=-1)


def plain_decode_attention(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position_B: Tensor,
    rotary_PA2: Tensor,
    *,
    heads: int,
    window: int | None,
    new: int = 1,
    row_B: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """What `decode_attention` computes, one position after the other."""
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    out = qkv.new_zeros(qkv.shape[0], heads * head_dim) if out is None else out
    if run is not None and not bool(run):
        return out
    qkv_TZE = qkv.unflatten(-1, (-1, head_dim))
    for b, first in enumerate(position_B.tolist()):
        row = b if row_B is None else int(row_B[b])
        for s in range(new if row >= 0 else 0):
            position, at = first + s, b * new + s
            low = 0 if window is None else max(position - window + 1, 0)
            cos_1A, sin_1A = rotary_PA2[position : position + 1].unbind(-1)
            q_HE, k_JE, v_JE = qkv_TZE[at].split([heads, kv_heads, kv_heads])
            q_HE, k_JE = (turn(x[None], cos_1A, sin_1A)[0] for x in (q_HE, k_JE))
            cache_k_CRJE[row, position % slots], cache_v_CRJE[row, position % slots] = k_JE, v_JE
            seen = torch.arange(low, position + 1, device=qkv.device) % slots
            k, v = (
                cache[row, seen].float().repeat_interleave(heads // kv_heads, dim=1)
                for cache in (cache_k_CRJE, cache_v_CRJE)
            )
            weight = (torch.einsum("he,nhe->hn", q_HE.float(), k) * head_dim**-0.5).softmax(-1)
            out[at] = torch.einsum("hn,nhe->he", weight, v).flatten()
    return out


def decode_attention(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position_B: Tensor,
    rotary_PA2: Tensor,
    *,
    heads: int,
    window: int | None,
    new: int = 1,
    row_B: Tensor | None = None,
    out: Tensor | None = None,
    run: Tensor | None = None,
    scratch: SplitScratch | None = None,
    launch: AttentionLaunch | None = None,
) -> Tensor:
    """Softmax attention of S new positions of each sequence; their keys and values go into the cache, [B*S, H*E].

    Position p sees positions p - window + 1 to p, or 0 to p without a window.

    Args:
        qkv: [B*S, Z*E] the heads' queries, then keys, then values, not rotated; rows may lie apart.
        cache_k_CRJE, cache_v_CRJE: rotated keys, and values; R is at least window + S - 1, or without a window no
            position reaches it.
        position_B: of each sequence's first new position, int32 or int64.
        rotary_PA2: see `rotary_table`; positions do not reach its end.
        heads: H, a multiple of J.
        window: positions seen, the own one included; None for all.
        new: S, 1 to 16.
        row_B: the row of the cache of each sequence, int32 or int64; where negative the sequence is passed over and
            nothing is written. None: row b of the cache for sequence b.
        out: where the result goes; a new tensor of qkv's dtype.
        run: one number on the device; where it is 0 nothing is written.
        scratch: for launches with splits; see `split_scratch`.
        launch: see `launch_for_attention`.
    """
    from bytelatent.kernels import decode_attention_triton

    kernels: Any = decode_attention_triton
    sequences = position_B.shape[0]
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    out = torch.empty(qkv.shape[0], heads * head_dim, dtype=qkv.dtype, device=qkv.device) if out is None else out
    assert qkv.shape == (sequences * new, (heads + 2 * kv_heads) * head_dim), f"qkv: {tuple(qkv.shape)}"
    assert out.shape == (sequences * new, heads * head_dim), f"out: {tuple(out.shape)}"
    assert qkv.stride(1) == out.stride(1) == 1, "a row is not contiguous"
    assert cache_k_CRJE.is_contiguous(), "the cache of keys is not contiguous"
    assert cache_v_CRJE.is_contiguous(), "the cache of values is not contiguous"
    assert cache_k_CRJE.shape == cache_v_CRJE.shape, "the caches differ in shape"
    assert rotary_PA2.is_contiguous(), "the rotary table is not contiguous"
    assert heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads}"
    assert head_dim in (16, 32, 64, 128, 256), f"a head size of {head_dim} is no power of two from 16 to 256"
    assert window is None or slots >= window + new - 1, (
        f"{slots} slots for a window of {window} and {new} new positions"
    )
    launch = launch or launch_for_attention(sequences, new, heads, kv_heads, window or slots)
    if launch.splits == 1:
        parts = (None, None, None)
    else:
        scratch = scratch or split_scratch(sequences * new, heads, head_dim, launch.splits, qkv.device)
        assert scratch.found.shape[0] >= sequences * new * heads, "the scratch is too small"
        assert scratch.found.shape[1:] == (launch.splits, head_dim), f"scratch: {tuple(scratch.found.shape)}"
        parts = (scratch.found, scratch.weights, scratch.arrived)
    one = new * heads == kv_heads
    queries = 1 if one else max(16, _power_of_two(new * heads // kv_heads))
    blocks = {} if one else {"QUERIES": queries, "NEW": max(16, _power_of_two(new))}
    kernel = kernels.attend_one if one else kernels.attend_several
    kernel[(sequences, kv_heads, launch.splits)](
        qkv,
        cache_k_CRJE,
        cache_v_CRJE,
        position_B,
        rotary_PA2,
        row_B,
        out,
        run,
        *parts,
        head_dim**-0.5 * LOG2_E,
        qkv.stride(0),
        out.stride(0),
        R=slots,
        WINDOW=window or 0,
        S=new,
        H=heads,
        J=kv_heads,
        E=head_dim,
        SPLITS=launch.splits,
        BLOCK=launch.block,
        STAGES=launch.num_stages,
        **blocks,
        num_warps=launch.num_warps,
        **launch_options(),
    )
    return out


def _power_of_two(size: int) -> int:
    """The next one."""
    return 1 << (size - 1).bit_length()
