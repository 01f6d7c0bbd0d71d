"""Incremental decoding with KV caches: whole prompts in one packed pass, then new ids, any number per slot at a time.

`Decoder.prefill`, `Decoder.extend` and `Decoder.branch` give the logits of the full forward pass at every position; the
last two cost what the new ids cost. The global transformer runs for those of them that close a patch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.kv_cache import (
    BLTPass,
    BLTState,
    ByteLMState,
    KVCache,
    NewPositions,
    PerDocument,
    PromptAttention,
    StepAttention,
    StoreNewest,
    empty_state,
)
from bytelatent.model import BLTModel, ByteLM, Stream, entropies, pack_rows
from bytelatent.model.attention import Mask, build_mask
from bytelatent.model.settings import StackSettings
from bytelatent.patching import PatchSettings, PatchState, Tail, step

# Shapes: T new ids (a slot and a position each), B slots, P patches, V vocabulary, W ids of a tail

State = ByteLMState | BLTState
MakeAttention = Callable[[KVCache, StackSettings, NewPositions, int], Mask]  # the last: padding positions


class Decoder:
    """A BLT or a byte LM, decoded incrementally.

    Args:
        patching: patching settings of a BLT.
        byte_lm: gives the entropies, where the patching mode needs them.
    """

    pad_to = 1  # prompts are padded to a multiple of it

    def __init__(self, model: BLTModel | ByteLM, patching: PatchSettings | None, byte_lm: ByteLM | None):
        self.model = model
        self.patching = patching
        self.byte_lm = byte_lm if patching is not None and patching.needs_entropies else None
        self.device = next(model.parameters()).device
        self._prompt_model: Any = model  # what reads whole prompts
        self._prompt_byte_lm: Any = self.byte_lm

    def empty(self, num_slots: int) -> State:
        """The state of slots that have read nothing."""
        return empty_state(self.model, self.byte_lm, num_slots)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor], last_only: bool = False) -> tuple[State, Tensor]:
        """Read whole prompts at once.

        Args:
            prompts: ids of each, BOS first; any lengths but zero.
            last_only: whether only the logits of each prompt's last id are wanted.

        Returns:
            The state, one slot per prompt, and the logits [T, V] of all prompts' ids, one prompt after another; or of
            the last ones [B, V].
        """
        stream = pack_rows([prompt.to(self.device) for prompt in prompts])
        state, new = self.empty(len(prompts)), NewPositions(stream.document, stream.position)
        logits = self._read(state, new, stream.ids, new.last if last_only else None, is_prompt=True)
        return state, logits

    @torch.no_grad()
    def extend(self, state: State, slots: Tensor, ids: Tensor) -> Tensor:
        """Read new ids.

        Args:
            state: is updated.
            slots: [T] the slot of each new id; the ids of a slot lie in order, one after another.
            ids: [T]

        Returns:
            Logits, float32 [T, V].
        """
        index = torch.arange(len(slots), device=slots.device)
        is_first = torch.cat([torch.ones_like(slots[:1], dtype=torch.bool), slots[1:] != slots[:-1]])
        offset = index - torch.where(is_first, index, 0).cummax(0).values
        return self._read(state, NewPositions(slots, state.position[slots] + offset), ids)

    @torch.no_grad()
    def branch(self, state: State, slots: Sequence[int], texts: Sequence[Tensor]) -> Tensor:
        """Read texts in one pass, each as if it alone followed what its slot has read, and forget them.

        Args:
            state: is not changed.
            slots: the slot of each text; those of a slot lie together.
            texts: ids of each, one at least.

        Returns:
            Logits of all texts' ids, one text after another, float32 [T, V].
        """
        stream = pack_rows([text.to(self.device) for text in texts])
        slot = torch.tensor(slots, device=self.device)[stream.document]
        new = NewPositions(slot, state.position[slot] + stream.position)
        return self._read(state, new, stream.ids, store=False)

    def _read(
        self,
        state: State,
        new: NewPositions,
        ids: Tensor,
        at: Tensor | None = None,
        store: bool = True,
        is_prompt: bool = False,
    ) -> Tensor:
        """Logits of new ids [T], float32 [T, V], or [N, V] of those `at` N places.

        Args:
            store: whether the state takes what later ids need.
            is_prompt: whether the state is empty, and the new ids are whole prompts.
        """
        model: Any = self.model
        byte_lm: Any = self.byte_lm
        shapes: Any = model.settings
        attention = self._step_attention(store)
        num_padding = 0
        if is_prompt:
            model, byte_lm, attention = self._prompt_model, self._prompt_byte_lm, self._prompt_attention
            num_padding = -len(ids) % self.pad_to
            at = torch.arange(len(ids), device=ids.device) if at is None and num_padding else at
        padded, position = F.pad(ids, (0, num_padding)), F.pad(new.position, (0, num_padding))
        stream = Stream(padded, F.pad(new.slots, (0, num_padding), value=-1), position)
        tail_TW = _tails(state, new, ids)
        if isinstance(state, ByteLMState):
            logits = model(stream, attention(state.byte_lm, shapes, new, num_padding), at)
        else:
            assert self.patching is not None, "a BLT needs patching settings"
            found = torch.zeros(len(ids), device=ids.device)
            if state.byte_lm is not None:
                cache = attention(state.byte_lm, byte_lm.settings, new, num_padding)
                found = entropies(byte_lm(stream, cache))[: len(ids)]
            patches = boundaries(self.patching, state, new, ids, found)
            closing = patches.closes.nonzero()[:, 0]
            closed = NewPositions(new.slots[closing], patches.num_patches[closing] - 1)
            cache = BLTPass(
                state,
                new,
                tail_TW,
                patches.closes,
                patches.begin,
                closed,
                attention(state.encoder, shapes.encoder, new, num_padding),
                attention(state.patches, shapes.global_transformer, closed, 0) if len(closing) else PerDocument([]),
                attention(state.decoder, shapes.decoder, new, num_padding),
                store,
                num_padding,
            )
            logits = model(stream, cache, at)
            if store:
                patches.store(state, new, found)
        if store:
            state.tail[new.slot] = tail_TW[new.last]
            state.position[new.slot] = new.position[new.last] + 1
        return logits

    def _step_attention(self, store: bool) -> MakeAttention:
        """Attention of new ids."""
        return lambda cache, _, new, __: StepAttention(cache, new, store)

    def _prompt_attention(self, cache: KVCache, stack: StackSettings, new: NewPositions, num_padding: int) -> Mask:
        """Attention of whole prompts, and of padding after them."""
        counts = new.count.tolist()
        store = StoreNewest(cache, new.slot.tolist(), counts)
        if stack.window is None and new.slots.device.type != "cuda":  # no kernel there leaves pairs out
            return PromptAttention(PerDocument([*counts, num_padding]), store)
        return PromptAttention(build_mask(F.pad(new.slots, (0, num_padding), value=-1), stack.window), store)


def _tails(state: State, new: NewPositions, ids: Tensor) -> Tensor:
    """[T, W] the newest ids up to each new one."""
    size = state.tail.shape[1]
    back = torch.arange(size - 1, -1, -1, device=ids.device)
    index = torch.arange(len(ids), device=ids.device)[:, None] - back
    before = state.tail[new.slots[:, None], (size + new.offset[:, None] - back).clamp(max=size - 1)]
    return torch.where(back <= new.offset[:, None], ids[index.clamp(min=0)], before)


@dataclass
class Boundaries:
    """What is known about patches once each of T new ids is read."""

    closes: Tensor  # [T] bool, the id is the last of its patch
    begin: Tensor  # [T] position where its patch begins
    since_start: Tensor  # [T] ids since the patching mode itself last started a patch
    num_patches: Tensor  # [T] closed patches
    tails: list[Tail] = field(default_factory=list)  # of the mode `bpe`

    def store(self, state: BLTState, new: NewPositions, entropies: Tensor) -> None:
        """Update the state to the last new id of each slot."""
        slot, last = new.slot, new.last
        position, closes = new.position[last], self.closes[last]
        state.previous_entropy[slot] = entropies[last].to(state.previous_entropy.dtype)
        state.since_start[slot] = self.since_start[last]
        state.num_patches[slot] = self.num_patches[last]
        state.open_count[slot] = torch.where(closes, 0, position + 1 - self.begin[last])
        if self.tails:
            state.tails = state.tails or [Tail() for _ in state.position]
            for number, index in zip(slot.tolist(), last.tolist(), strict=True):
                state.tails[number] = self.tails[index]


def boundaries(
    patching: PatchSettings, state: BLTState, new: NewPositions, ids: Tensor, entropies: Tensor
) -> Boundaries:
    """Decide where patches close among new ids [T], all at once.

    Args:
        entropies: [T] nats, where the patching mode needs them.
    """
    offset, index = new.offset, torch.arange(len(ids), device=ids.device)

    def previous(values: Tensor, before: Tensor) -> Tensor:
        """[T] the value before each one: of its run, or of its slot's state."""
        return torch.where(offset == 0, before[new.slots], torch.cat([values[:1], values[:-1]]))

    def newest(events: Tensor) -> tuple[Tensor, Tensor]:
        """[T] the index of the newest event of its run up to each one, and whether there is any."""
        found = torch.where(events, index, -1).cummax(0).values
        return found, found >= new.begin

    tails: list[Tail] = []
    if patching.needs_tail:
        tails = _token_tails(patching, state, new, ids)
        natural = torch.tensor([tail.token_began for tail in tails], device=ids.device)
    else:
        ids_before, entropies_before = previous(ids, state.tail[:, -1]), previous(entropies, state.previous_entropy)
        moment = PatchState(new.position, ids_before, entropies_before, torch.zeros_like(ids))
        natural = step(moment, ids, entropies, patching.model_copy(update={"max_patch_length": None}))[1]
    found, any_natural = newest(natural)
    since_start = torch.where(any_natural, index - found, state.since_start[new.slots] + offset + 1)
    closes = natural
    if patching.max_patch_length is not None:
        closes = natural | ((previous(since_start, state.since_start) + 1) % patching.max_patch_length == 0)
    found, any_closed = newest(closes)
    open_begin = state.position - state.open_count
    next_begin = torch.where(any_closed, new.position[found] + 1, open_begin[new.slots])  # of the next id's patch
    closed = closes.cumsum(0)
    return Boundaries(
        closes=closes,
        begin=previous(next_begin, open_begin),
        since_start=since_start,
        num_patches=state.num_patches[new.slots] + closed - (closed - closes.long())[new.begin],
        tails=tails,
    )


def _token_tails(patching: PatchSettings, state: BLTState, new: NewPositions, ids: Tensor) -> list[Tail]:
    """What the patching mode `bpe` carries after each id."""
    tails: list[Tail] = []
    for slot, offset, i in zip(*(x.tolist() for x in (new.slots, new.offset, ids)), strict=True):
        before = state.tails[slot] if state.tails else Tail()
        tails.append((tails[-1] if offset else before).read(i, str(patching.tokenizer)))
    return tails
