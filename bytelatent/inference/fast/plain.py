"""A step in plain PyTorch: its decisions, which `bytelatent.kernels.decode_step` must equal, and what a CPU does faster
than the forms beside the other kernels, which are written to be read.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.sampling import SamplingRows
from bytelatent.kernels.decode_step import Flags
from bytelatent.kernels.quantized import Matrix, dense
from bytelatent.model import entropies
from bytelatent.patching import PatchSettings, PatchState, step
from bytelatent.vocab import EOS


def plain_draw(
    logits_BV: Tensor, rows: SamplingRows, position: Tensor, flags: Flags, expected: Tensor | None = None
) -> None:
    """What `draw` does."""
    draws = flags.is_active & ~flags.is_waiting
    ids, log_probability = rows.draw(logits_BV)
    if expected is not None:
        flags.is_waiting.logical_or_(draws & (ids != expected))
        draws &= ids == expected
    rows.read(ids, draws)
    flags.drawn.copy_(torch.where(draws, ids, -1))
    flags.log_probability.copy_(log_probability)
    ends = draws & ((ids == EOS) | (rows.remaining <= 0))
    flags.is_active.logical_and_(~ends)
    flags.ids.copy_(ids)
    flags.reads.copy_(draws & ~ends)
    index = torch.arange(len(ids), device=ids.device)
    flags.row.copy_(torch.where(flags.reads, index, -1))
    flags.at.copy_(torch.where(flags.reads, position, position - 1).clamp(min=0))


def plain_choose(state: Any, flags: Flags, closes: bool) -> None:
    """What `choose` does."""
    wants, places = flags.wants, len(flags.closing)
    index = torch.arange(len(wants), device=wants.device)
    urgency = wants.int() + (wants & flags.is_waiting).int()
    order = torch.argsort(urgency, descending=True, stable=True)[:places]
    closing = torch.where(wants[order], order, -1) if closes else torch.full_like(order, -1)
    served = torch.zeros(len(wants) + 1, dtype=torch.bool, device=wants.device)
    served = served.index_fill(0, torch.where(closing >= 0, closing, len(wants)), True)[:-1]
    flags.closing.copy_(closing)
    flags.number.copy_(torch.where(closing >= 0, state.num_patches[closing.clamp(min=0)], 0))
    flags.run.fill_(bool((closing >= 0).any()))
    flags.closing_count.copy_(torch.where(closing >= 0, state.open_count[closing.clamp(min=0)], 0))
    state.open_count.mul_(~served)
    state.num_patches.add_(served)
    goes_on = (flags.reads & ~wants) | served
    flags.goes_on.copy_(torch.where(goes_on, index, -1))
    flags.is_waiting.copy_(wants & ~goes_on)
    flags.reads_patch.copy_(state.num_patches > 0)


def plain_keep_patch(kv: Tensor, patch_k: Tensor, patch_v: Tensor, closing: Tensor) -> None:
    """What `keep_patch` does."""
    layers, _, keys, heads, size = patch_k.shape
    kv_CKY2HE = kv.view(len(closing), keys, layers, 2, heads, size)
    for place, row in enumerate(closing.tolist()):
        if row >= 0:
            patch_k[:, row] = kv_CKY2HE[place, :, :, 0].transpose(0, 1)
            patch_v[:, row] = kv_CKY2HE[place, :, :, 1].transpose(0, 1)


def plain_decide(lm_logits_BV: Tensor | None, patching: PatchSettings, state: Any, flags: Flags) -> None:
    """What `decide` does."""
    ids, reads = flags.ids, flags.reads
    found = None if lm_logits_BV is None else entropies(lm_logits_BV)
    before = PatchState(state.position, state.tail[:, -1], state.previous_entropy, state.since_start)
    after, starts = step(before, ids, found, patching)
    state.tail.copy_(torch.where(reads[:, None], torch.cat([state.tail[:, 1:], ids[:, None]], dim=1), state.tail))
    state.previous_entropy.copy_(torch.where(reads, after.previous_entropy, state.previous_entropy))
    state.since_start.copy_(torch.where(reads, after.since_start, state.since_start))
    state.position.add_(reads)
    flags.count.copy_(torch.where(reads, state.open_count, -1))
    state.open_count.add_(reads)
    flags.wants.copy_((starts & reads) | flags.is_waiting)


def attend(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position_B: Tensor,
    rotary_PA2: Tensor,
    *,
    heads: int,
    window: int | None,
    row_B: Tensor,
    new: int = 1,
    run: Tensor | None = None,
) -> Tensor:
    """What `plain_decode_attention` computes, all sequences at once, one new position after another."""
    if new > 1:
        each = qkv.view(-1, new, qkv.shape[1])
        same: Any = {"heads": heads, "window": window, "row_B": row_B, "run": run}
        found = [
            attend(each[:, at], cache_k_CRJE, cache_v_CRJE, position_B + at, rotary_PA2, **same) for at in range(new)
        ]
        return torch.stack(found, dim=1).flatten(0, 1)
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    if run is not None and not bool(run):
        return qkv.new_zeros(len(qkv), heads * head_dim)
    if len(row_B) == 1:
        return _attend_one(qkv[0], cache_k_CRJE, cache_v_CRJE, int(position_B), rotary_PA2, heads, window, int(row_B))
    q_k, v_BJE = qkv.unflatten(-1, (-1, head_dim)).split([heads + kv_heads, kv_heads], dim=1)
    q_BHE, k_BJE = _turned(q_k, rotary_PA2[position_B][:, None]).split([heads, kv_heads], dim=1)
    row, slot = row_B.clamp(min=0), position_B % slots
    if bool((row_B < 0).any()):  # sequences that are passed over write nothing
        here = (row_B >= 0).nonzero()[:, 0]
        cache_k_CRJE[row[here], slot[here]], cache_v_CRJE[row[here], slot[here]] = k_BJE[here], v_BJE[here]
    else:
        cache_k_CRJE[row, slot], cache_v_CRJE[row, slot] = k_BJE, v_BJE
    size = min(int(position_B.max()) + 1, slots)
    newest = position_B[:, None]
    held = newest - (newest - torch.arange(size, device=qkv.device)) % slots
    seen = held >= 0 if window is None else (held >= 0) & (held > newest - window)
    kept = (part[row, :size].transpose(1, 2) for part in (cache_k_CRJE, cache_v_CRJE))
    found = F.scaled_dot_product_attention(
        q_BHE[:, :, None], *kept, attn_mask=seen[:, None, None], enable_gqa=heads != kv_heads
    )
    return found[:, :, 0].flatten(1)


def _attend_one(
    qkv: Tensor,
    cache_k_CRJE: Tensor,
    cache_v_CRJE: Tensor,
    position: int,
    rotary_PA2: Tensor,
    heads: int,
    window: int | None,
    row: int,
) -> Tensor:
    """The same for one sequence, whose cache need not be gathered."""
    _, slots, kv_heads, head_dim = cache_k_CRJE.shape
    if row < 0:
        return qkv.new_zeros(1, heads * head_dim)
    q_k, v_JE = qkv.view(-1, head_dim).split([heads + kv_heads, kv_heads])
    q_HE, k_JE = _turned(q_k, rotary_PA2[position]).split([heads, kv_heads])
    slot, size = position % slots, min(position + 1, slots)
    cache_k_CRJE[row, slot], cache_v_CRJE[row, slot] = k_JE, v_JE
    k_JRE, v_JRE = cache_k_CRJE[row, :size].transpose(0, 1), cache_v_CRJE[row, :size].transpose(0, 1)
    mask = None if window is None or size <= window else _seen(position, slots, window)
    found = F.scaled_dot_product_attention(
        q_HE[None, :, None], k_JRE[None], v_JRE[None], attn_mask=mask, enable_gqa=heads != kv_heads
    )
    return found.view(1, -1)


@lru_cache(maxsize=16)
def _seen(position: int, slots: int, window: int) -> Tensor:
    """Which slots of a ring a position sees, bool [1, 1, 1, R]; the same for all layers of a stack."""
    held = position - (position - torch.arange(min(position + 1, slots))) % slots
    return ((held >= 0) & (held > position - window)).view(1, 1, 1, -1)


def _turned(x: Tensor, rotary: Tensor) -> Tensor:
    """Pairs (2i, 2i+1) rotated: as complex numbers multiplied by cosine and sine."""
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.view_as_complex(rotary)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def read_patch(
    q_THE: Tensor, k_BKHE: Tensor, v_BKHE: Tensor, reads_T: Tensor, *, row_B: Tensor, run: Tensor | None = None
) -> Tensor:
    """What `plain_read_patch` computes for one byte of each sequence, with as many heads of keys as of queries."""
    row = row_B.clamp(min=0)
    k, v = (k_BKHE, v_BKHE) if len(row) == len(k_BKHE) == 1 else (k_BKHE[row], v_BKHE[row])
    weight = ((q_THE[:, None] * k).sum(-1, keepdim=True) * q_THE.shape[-1] ** -0.5).softmax(1)
    return (weight * v).sum(1) * reads_T[:, None, None]


def linear(
    x_MK: Tensor,
    weight_NK: Matrix,
    *,
    eps: float | None = None,
    residual_MN: Tensor | None = None,
    residual_scale: float = 1.0,
    out: Tensor | None = None,
    run: Tensor | None = None,
) -> Tensor:
    """What `plain_skinny_linear` computes, in the weights' precision."""
    if run is not None and not bool(run):
        return x_MK.new_zeros(len(x_MK), weight_NK.shape[0])
    weight_NK = dense(weight_NK, x_MK.dtype)
    x_MK = x_MK if eps is None else _normed(x_MK, eps)
    if residual_MN is None:
        y_MN = F.linear(x_MK, weight_NK)
    else:
        y_MN = torch.addmm(residual_MN, x_MK, weight_NK.T, beta=residual_scale)
    return y_MN if out is None else out.copy_(y_MN)


def gated(x_MK: Tensor, gate_up_2NK: Matrix, *, eps: float | None = None, run: Tensor | None = None) -> Tensor:
    """What `plain_skinny_gated` computes, in the weights' precision."""
    if run is not None and not bool(run):
        return x_MK.new_zeros(len(x_MK), gate_up_2NK.shape[0] // 2)
    gate_up_2NK = dense(gate_up_2NK, x_MK.dtype)
    x_MK = x_MK if eps is None else _normed(x_MK, eps)
    return F.silu(F.linear(x_MK, gate_up_2NK[0::2])).mul_(F.linear(x_MK, gate_up_2NK[1::2]))


def _normed(x_MK: Tensor, eps: float) -> Tensor:
    """RMSNorm without weights."""
    if len(x_MK) > 1:
        return F.rms_norm(x_MK, x_MK.shape[1:], None, eps)
    row = x_MK[0].float()
    return x_MK * (float(row @ row) / len(row) + eps) ** -0.5  # a few microseconds less than the operation
