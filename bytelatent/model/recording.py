"""What a forward pass computes on the way: the states after each layer, and the weights of attention.

Forward hooks record it while they are wanted, so that the model itself knows nothing of it; passes of other threads are
left out. Weights are computed again from recorded queries and keys in a plain form, whatever kernel attends.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bytelatent.model.attention import Mask
from bytelatent.model.blt import BLTModel
from bytelatent.model.rows import Layout

# Shapes: T bytes in the stream, P patches, K queries or keys per patch, D local width, H heads, J key/value heads,
# E head size, B rows, L layout in a row

PARTS = ("encoder", "global_transformer", "decoder")
QueriesKeys = tuple[Tensor, Tensor]


@dataclass
class Recording:
    """What one pass over a packed stream computed, by part of the model.

    Attributes:
        states: what the first layer of a stack reads, then what each layer gives, [T, D] or [P, D]; or in rows.
        queries_keys: of each layer's attention, rotated.
        cross_queries_keys: of each cross-attention: [P, K, H, E] and [T, H, E] in the encoder, [T, H, E] and
            [P, K, H, E] in the decoder.
        patches: what the encoder makes of the patches, [P, K, D]; or in rows.
    """

    states: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    queries_keys: dict[str, list[QueriesKeys]] = field(default_factory=lambda: defaultdict(list))
    cross_queries_keys: dict[str, list[QueriesKeys]] = field(default_factory=lambda: defaultdict(list))
    patches: Tensor | None = None


@dataclass(frozen=True)
class _RecordedMask:
    """A mask that also records what attends."""

    mask: Mask
    into: list[QueriesKeys]

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        self.into.append((q_THE, k_TJE))
        return self.mask.attend(q_THE, k_TJE, v_TJE)


@contextmanager
def recording(
    model: BLTModel, states: bool, attentions: bool, layouts: dict[str, Layout] | None = None
) -> Iterator[Recording]:
    """Record what the model computes within the block, which is one forward pass.

    Args:
        layouts: of each part. States are then recorded in rows, and the model computes with what these hold, so that
            gradients with respect to them exist.
    """
    found = Recording()
    hooks: list[Any] = []
    for name in PARTS:
        part: Any = getattr(model, name)
        if states:
            record = _record(found.states[name], None if layouts is None else layouts[name])
            before = _in_this_thread(lambda _, args, record=record: (record(args[0]), *args[1:]))
            hooks.append(part.stack.blocks[0].register_forward_pre_hook(before))
            after = _in_this_thread(lambda _, args, out, record=record: record(out))
            hooks += [block.register_forward_hook(after) for block in part.stack.blocks]
        if attentions:
            with_mask = _in_this_thread(_with_recorded_mask(found.queries_keys[name]))
            hooks += [block.attention.register_forward_pre_hook(with_mask) for block in part.stack.blocks]
            cross_hook = _in_this_thread(_record_cross(found.cross_queries_keys[name]))
            hooks += [cross.register_forward_hook(cross_hook) for cross in getattr(part, "cross_attention", ())]
    if states:
        patches: list[Tensor] = []
        record = _record(patches, None if layouts is None else layouts["global_transformer"])
        of_patches = _in_this_thread(lambda _, args, out: (out[0], record(out[1]), *out[2:]))
        hooks.append(model.encoder.register_forward_hook(of_patches))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        if states and patches:
            found.patches = patches[0]


def _in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that other threads, which use the same modules at the same time, pass by."""
    thread = threading.get_ident()
    return lambda *given: hook(*given) if threading.get_ident() == thread else None


def _record(into: list[Tensor], layout: Layout | None) -> Callable[[Tensor], Tensor]:
    """A function that records states and gives those that the model continues with."""

    def record(values: Tensor) -> Tensor:
        into.append(values if layout is None else layout.put(values))
        return values if layout is None else layout.take(into[-1])

    return record


def _with_recorded_mask(into: list[QueriesKeys]) -> Any:
    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, rotary_TE2, mask = args
        return x_TD, rotary_TE2, _RecordedMask(mask, into)

    return hook


def _record_cross(into: list[QueriesKeys]) -> Any:
    def hook(cross: Any, args: tuple[Any, ...], out: Tensor) -> None:
        x, states, _ = args
        q = cross.query(cross.query_norm(x)).unflatten(-1, (-1, cross.head_dim))
        into.append((q, cross.keys_values(states)[0]))

    return hook


def attention_weights(q_THE: Tensor, k_TJE: Tensor, layout: Layout, window: int | None) -> Tensor:
    """Weights of causal attention inside rows, float32 [B, H, L, L]: of each place to itself and those before it.

    A place of padding has only zeros. Memory is that of all pairs, window or not.
    """
    q, k = layout.put(q_THE.float()), layout.put(k_TJE.float())
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    score_BHLL = torch.einsum("bqhe,bkhe->bhqk", q, k) * q.shape[-1] ** -0.5
    place = torch.arange(layout.shape[1], device=q.device)
    distance = place[:, None] - place[None, :]
    allowed_LL = (distance >= 0) & (distance < (window or layout.shape[1]))
    allowed = (allowed_LL & layout.is_real[:, :, None] & layout.is_real[:, None, :]).unsqueeze(1)
    # A row without any allowed pair would be NaN; all of its weights are masked afterwards.
    score_BHLL = score_BHLL.masked_fill(~allowed & layout.is_real[:, None, :, None], -torch.inf)
    return torch.where(allowed, score_BHLL.softmax(-1), 0.0)


def own_byte_weights(q_PKHE: Tensor, k_THE: Tensor, patch_T: Tensor) -> Tensor:
    """Weights of the encoder's cross-attention, float32 [T, K, H]: of the K queries of a byte's patch to the byte.

    Those of a patch's bytes sum to 1.
    """
    score_TKH = (q_PKHE.float()[patch_T] * k_THE.float().unsqueeze(1)).sum(-1) * q_PKHE.shape[-1] ** -0.5
    index_TKH = patch_T[:, None, None].expand_as(score_TKH)
    lowest = score_TKH.new_full((len(q_PKHE), *score_TKH.shape[1:]), -torch.inf)
    highest = lowest.scatter_reduce(0, index_TKH, score_TKH.detach(), "amax")
    weight_TKH = (score_TKH - highest[patch_T]).exp()
    return weight_TKH / torch.zeros_like(lowest).index_add(0, patch_T, weight_TKH)[patch_T]


def read_patch_weights(q_THE: Tensor, k_PKHE: Tensor, read_T: Tensor) -> Tensor:
    """Weights of the decoder's cross-attention, float32 [T, K, H]: of a byte to the K keys of the patch it reads.

    They sum to 1, or are 0 where it reads none.
    """
    k_TKHE = k_PKHE.float()[read_T.clamp(min=0)]
    score_TKH = (q_THE.float().unsqueeze(1) * k_TKHE).sum(-1) * q_THE.shape[-1] ** -0.5
    return torch.where((read_T >= 0)[:, None, None], score_TKH.softmax(dim=1), 0.0)
