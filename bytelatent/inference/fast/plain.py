"""The decisions of a step in plain PyTorch: what `bytelatent.kernels.decode_step` must equal."""

from typing import Any

import torch
from torch import Tensor

from bytelatent.inference.sampling import SamplingRows
from bytelatent.kernels.decode_step import Flags
from bytelatent.model import entropies
from bytelatent.patching import PatchSettings, PatchState, step
from bytelatent.vocab import EOS


def plain_draw(logits_BV: Tensor, rows: SamplingRows, position: Tensor, flags: Flags) -> None:
    """What `draw` does."""
    draws = flags.is_active & ~flags.is_waiting
    ids, log_probability = rows.draw(logits_BV)
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
    flags.number.copy_(state.num_patches[closing.clamp(min=0)])
    flags.run.fill_(bool((closing >= 0).any()))
    flags.closing_count.copy_(state.open_count)
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
