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

from bytelatent.inference.cached_attention import (
    NewPositions,
    PerDocument,
    PromptAttention,
    StepAttention,
    StoreNewest,
)
from bytelatent.inference.kv_cache import BLTDecodeState, CacheCapacity, DecodeState, KVCache, empty_state
from bytelatent.inference.settings import KVCacheNumbers
from bytelatent.kernels.patch_attention import ByteRanges
from bytelatent.kernels.patch_pooling import pool_patches
from bytelatent.model import BLTModel, BLTSettings, ByteLM, LanguageModel, Stream, entropies, pack_rows
from bytelatent.model.attention import Mask, build_mask
from bytelatent.model.settings import StackSettings
from bytelatent.patching import PatchSettings, PatchState, Tail, step
from bytelatent.vocab import BOS, NEWLINE, VOCAB_SIZE

# Shapes: T new ids (a slot and a position each), B slots, N of them have new ids, P patches that close, D local width,
# K keys per patch, H heads, E head size, V vocabulary, W ids of a tail


class Decoder:
    """A BLT, a byte LM or a token LM, decoded incrementally.

    Args:
        patching: patching settings of a BLT.
        byte_lm: gives the entropies, where the patching mode needs them.
        kv_cache: `int8`: KV caches in 8 bits.
    """

    pad_to = 1  # prompts are padded to a multiple of it

    def __init__(
        self,
        model: BLTModel | LanguageModel,
        patching: PatchSettings | None,
        byte_lm: ByteLM | None,
        kv_cache: KVCacheNumbers = "full",
    ):
        self.model = model
        self.kv_cache: KVCacheNumbers = kv_cache
        self.patching = patching
        self.byte_lm = byte_lm if patching is not None and patching.needs_entropies else None
        self.device = next(model.parameters()).device
        self.vocab_size = model.settings.vocab_size if isinstance(model, LanguageModel) else VOCAB_SIZE
        self._prompt_model: Any = model  # what reads whole prompts
        self._prompt_byte_lm: Any = self.byte_lm

    def empty(self, num_slots: int) -> DecodeState:
        """The state of slots that have read nothing."""
        return empty_state(self.model, self.byte_lm, num_slots, self.kv_cache)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor], last_only: bool = False) -> tuple[DecodeState, Tensor]:
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
    def extend(self, state: DecodeState, slots: Tensor, ids: Tensor, last_only: bool = False) -> Tensor:
        """Read new ids.

        Args:
            state: is updated.
            slots: [T] the slot of each new id; the ids of a slot lie in order, one after another.
            ids: [T]
            last_only: whether only the logits of each slot's last id are wanted.

        Returns:
            Logits, float32 [T, V], or the last ones [N, V].
        """
        index = torch.arange(len(slots), device=slots.device)
        is_first = torch.cat([torch.ones_like(slots[:1], dtype=torch.bool), slots[1:] != slots[:-1]])
        offset = index - torch.where(is_first, index, 0).cummax(0).values
        new = NewPositions(slots, state.position[slots] + offset)
        return self._read(state, new, ids, new.last if last_only else None)

    @torch.no_grad()
    def branch(self, state: DecodeState, slots: Sequence[int], texts: Sequence[Tensor]) -> Tensor:
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
        state: DecodeState,
        new: NewPositions,
        ids: Tensor,
        at: Tensor | None = None,
        store: bool = True,
        is_prompt: bool = False,
    ) -> Tensor:
        """Logits of new ids [T], float32 [T, V], or [N, V] of those at N indices.

        Args:
            store: whether to update the state.
            is_prompt: whether the state is empty, and the new ids are whole prompts.
        """
        model: Any = self.model
        byte_lm: Any = self.byte_lm
        num_padding = 0
        if is_prompt:
            model, byte_lm, num_padding = self._prompt_model, self._prompt_byte_lm, -len(ids) % self.pad_to
            at = torch.arange(len(ids), device=ids.device) if at is None and num_padding else at

        def attention(
            cache: KVCache, stack: StackSettings, new: NewPositions = new, num_padding: int = num_padding
        ) -> Mask:
            if is_prompt:
                return self._prompt_attention(cache, stack, new, num_padding)
            return StepAttention(cache, new, store)

        document = F.pad(new.slots, (0, num_padding), value=-1)
        stream = Stream(F.pad(ids, (0, num_padding)), document, F.pad(new.position, (0, num_padding)))
        tail_TW = _tails(state, new, ids)
        if not isinstance(state, BLTDecodeState):
            assert state.byte_lm is not None
            logits = model(stream, attention(state.byte_lm, model.settings), at)
        else:
            assert self.patching is not None, "a BLT needs patching settings"
            found = torch.zeros(len(ids), device=ids.device)
            if state.byte_lm is not None:
                lm_new, lm_stream = new, stream
                if self.patching.reset_at_newline:
                    lm_new, lm_stream = _lines(state, new, stream)
                found = entropies(byte_lm(lm_stream, attention(state.byte_lm, byte_lm.settings, lm_new)))[: len(ids)]
                if store:
                    state.context_begin[new.slot] = (new.position - lm_new.position)[new.last]
            patches = boundaries(self.patching, state, new, ids, found)
            cache = BLTPass(state, new, patches, tail_TW, attention, model.settings, store, num_padding)
            logits = model(stream, cache, at)
            if store:
                patches.store(state, new, found)
        if store:
            state.tail[new.slot] = tail_TW[new.last]
            state.position[new.slot] = new.position[new.last] + 1
        return logits

    def _prompt_attention(self, cache: KVCache, stack: StackSettings, new: NewPositions, num_padding: int) -> Mask:
        """Attention of whole prompts, and of padding after them."""
        store = StoreNewest(cache, new)
        if stack.window is None and new.slots.device.type != "cuda":  # no kernel there leaves pairs out
            return PromptAttention(PerDocument([*new.count.tolist(), num_padding]), store)
        return PromptAttention(build_mask(F.pad(new.line, (0, num_padding), value=-1), stack.window), store)


def _lines(state: DecodeState, new: NewPositions, stream: Stream) -> tuple[NewPositions, Stream]:
    """New positions and their stream, padding included, as a byte LM reads them whose context is reset at newlines.

    As `bytelatent.model.lines_as_documents`: each newline is the BOS of a document.
    """
    is_newline = stream.ids == NEWLINE
    resets, index = is_newline[: len(new.slots)], torch.arange(len(new.slots), device=new.slots.device)
    found = torch.where(resets, index, -1).cummax(0).values
    position = torch.where(found >= new.begin, index - found, new.position - state.context_begin[new.slots])
    lines = NewPositions(new.slots, position, resets | (new.begin == index))
    num_padding = len(stream.ids) - len(index)
    ids = torch.where(is_newline, BOS, stream.ids)
    return lines, Stream(ids, stream.document, F.pad(position, (0, num_padding)))


def _tails(state: DecodeState, new: NewPositions, ids: Tensor) -> Tensor:
    """[T, W] the newest ids up to each new one."""
    size = state.tail.shape[1]
    back = torch.arange(size - 1, -1, -1, device=ids.device)
    index = torch.arange(len(ids), device=ids.device)[:, None] - back
    before = state.tail[new.slots[:, None], (size + new.offset[:, None] - back).clamp(max=size - 1)]
    return torch.where(back <= new.offset[:, None], ids[index.clamp(min=0)], before)


@dataclass
class Boundaries:
    """What is known about patches after each of T new ids."""

    closes: Tensor  # [T] bool, the id is the last of its patch
    begin: Tensor  # [T] position where its patch begins
    since_start: Tensor  # [T] ids since the patching mode itself last started a patch
    num_patches: Tensor  # [T] closed patches
    tails: list[Tail] = field(default_factory=list)  # of the mode `bpe`

    def store(self, state: BLTDecodeState, new: NewPositions, entropies: Tensor) -> None:
        """Update the state to the last new id of each slot."""
        slot, last = new.slot, new.last
        state.previous_entropy[slot] = entropies[last].to(state.previous_entropy.dtype)
        state.since_start[slot] = self.since_start[last]
        state.num_patches[slot] = self.num_patches[last]
        state.open_count[slot] = torch.where(self.closes[last], 0, new.position[last] + 1 - self.begin[last])
        if self.tails:
            state.tails = state.tails or [Tail() for _ in state.position]
            for number, index in zip(slot.tolist(), last.tolist(), strict=True):
                state.tails[number] = self.tails[index]


def boundaries(
    patching: PatchSettings, state: BLTDecodeState, new: NewPositions, ids: Tensor, entropies: Tensor
) -> Boundaries:
    """Decide where patches close among new ids [T], all at once.

    Args:
        entropies: [T] nats, where the patching mode needs them.
    """
    index = torch.arange(len(ids), device=ids.device)

    def previous(values: Tensor, before: Tensor) -> Tensor:
        """[T] the value before each one: of its run, or of its slot's state."""
        return torch.where(new.offset == 0, before[new.slots], torch.cat([values[:1], values[:-1]]))

    def newest(events: Tensor) -> tuple[Tensor, Tensor]:
        """[T] the index of the newest event of its run up to each one, and whether there is any."""
        found = torch.where(events, index, -1).cummax(0).values
        return found, found >= new.begin

    tails: list[Tail] = []
    if patching.needs_tail:
        for slot, offset, id_ in zip(*(x.tolist() for x in (new.slots, new.offset, ids)), strict=True):
            before = tails[-1] if offset else state.tails[slot] if state.tails else Tail()
            tails.append(before.read(id_, str(patching.tokenizer)))
        natural = torch.tensor([tail.token_began for tail in tails], device=ids.device)
    else:
        ids_before, entropies_before = previous(ids, state.tail[:, -1]), previous(entropies, state.previous_entropy)
        moment = PatchState(new.position, ids_before, entropies_before, torch.zeros_like(ids))
        natural = step(moment, ids, entropies, patching.model_copy(update={"max_patch_length": None}))[1]
    found, any_natural = newest(natural)
    since_start = torch.where(any_natural, index - found, state.since_start[new.slots] + new.offset + 1)
    closes = natural
    if patching.max_patch_length is not None:
        closes = natural | ((previous(since_start, state.since_start) + 1) % patching.max_patch_length == 0)
    found, any_closed = newest(closes)
    open_begin = state.position - state.open_count
    next_begin = torch.where(any_closed, new.position[found] + 1, open_begin[new.slots])  # of the next id's patch
    closed = closes.cumsum(0)
    num_patches = state.num_patches[new.slots] + closed - (closed - closes.long())[new.begin]
    return Boundaries(closes, previous(next_begin, open_begin), since_start, num_patches, tails)


class BLTPass:
    """A `bytelatent.model.blt.BLTCache`: the state of a BLT during one pass over new bytes.

    Args:
        new: the new bytes; their ids come with `tail_TW`.
        found: the patches among them.
        attention: gives the attention of a stack to its KV cache.
        store: whether to update the state.
        num_padding: bytes of padding after the new ones.
    """

    def __init__(
        self,
        state: BLTDecodeState,
        new: NewPositions,
        found: Boundaries,
        tail_TW: Tensor,
        attention: Callable[..., Mask],
        settings: BLTSettings,
        store: bool,
        num_padding: int,
    ):
        self.state, self.new, self.store = state, new, store
        self.tail_TW = F.pad(tail_TW, (0, 0, 0, num_padding))
        self.closes = F.pad(found.closes, (0, num_padding))
        closing = found.closes.nonzero()[:, 0]
        self.patches = NewPositions(new.slots[closing], found.num_patches[closing] - 1)
        self.patch_position = self.patches.position
        self.encoder = attention(state.encoder, settings.encoder)
        self.decoder = attention(state.decoder, settings.decoder)
        self.global_transformer: Mask = PerDocument([])
        if len(closing):
            self.global_transformer = attention(state.patches, settings.global_transformer, self.patches, 0)
        closed = found.closes.cumsum(0)
        before = closed - found.closes.long()  # patches that close before each byte
        self._find_own_bytes(closing, before, found.begin)
        self._find_read_patches(torch.where(closed > before[new.begin], closed - 1, -1), num_padding)
        if store:
            open_begin = torch.where(found.closes, new.position + 1, found.begin)[new.last]
            self._find_open_bytes(open_begin)

    def _find_own_bytes(self, closing: Tensor, patch: Tensor, begin: Tensor) -> None:
        """Which bytes are in the patches that close: those of the state and new ones."""
        new, num_patches = self.new, len(closing)
        count_before = ((new.position - new.offset)[closing] - begin[closing]).clamp(min=0)
        self.is_begun = count_before > 0  # [P] whether its first bytes are in the state
        self.closing_slot = new.slots[closing]
        inner = torch.arange(int(count_before.max()) if num_patches else 0, device=patch.device)
        patch_before, inner = (inner < count_before[:, None]).nonzero(as_tuple=True)
        self.own_before = (self.closing_slot[patch_before], inner)
        is_in = patch < num_patches
        if num_patches:  # the next byte that closes a patch, if it is in the same run
            is_in &= new.begin == new.begin[closing[patch.clamp(max=num_patches - 1)]]
        self.own_new = is_in.nonzero()[:, 0]
        self.new_runs = ByteRanges.of(patch[self.own_new], num_patches)
        patch = torch.cat([patch_before, patch[self.own_new]])
        self.order = patch.argsort(stable=True) if len(patch_before) else None  # a patch's bytes side by side
        self.own = ByteRanges.of(patch if self.order is None else patch[self.order], num_patches)

    def _find_read_patches(self, read: Tensor, num_padding: int) -> None:
        """Which patch each byte attends to: one that closes, or the newest of its slot before."""
        new, num_patches = self.new, len(self.patch_position)
        has_before = self.state.num_patches[new.slot] > 0
        is_needed = num_patches == 0 or bool(has_before.any())  # there must be some patch
        self.num_before = len(new.slot) if is_needed else 0
        if self.num_before:
            before = torch.where(has_before, torch.arange(len(new.slot), device=read.device), -1)
            read = torch.where(read >= 0, read + self.num_before, before[new.line])
        self.read = ByteRanges.of(F.pad(read, (0, num_padding), value=-1), self.num_before + num_patches)

    def _find_open_bytes(self, begin: Tensor) -> None:
        """Which new bytes are in the open patches, which begin at `begin` [N], once all are read."""
        new = self.new
        count = new.position[new.last] + 1 - begin
        self.state.reserve(CacheCapacity(0, 0, int(count.max()) + 1))
        self.open = (new.position >= begin[new.line]).nonzero()[:, 0]
        line = new.line[self.open]
        self.open_target = (new.slots[self.open], new.position[self.open] - begin[line])
        has_any = torch.zeros_like(count, dtype=torch.bool).index_fill(0, line, True)
        self.open_runs = ByteRanges.of((has_any.cumsum(0) - 1)[line], int(has_any.sum()))
        self.open_slot = new.slot[has_any]
        self.continues = (begin < new.num_read)[has_any]  # its first bytes are in the state

    def pool(self, h_TD: Tensor) -> Tensor:
        state, pooled_PD = self.state, h_TD.new_zeros(len(self.patch_position), h_TD.shape[1])
        if len(pooled_PD):
            pooled_PD = pool_patches(h_TD[self.own_new], self.new_runs)
            before = state.open_max[self.closing_slot].to(pooled_PD.dtype)
            pooled_PD = torch.where(self.is_begun[:, None], pooled_PD.maximum(before), pooled_PD)
        if self.store and len(self.open_slot):
            highest = pool_patches(h_TD[self.open], self.open_runs).to(state.open_max.dtype)
            before = state.open_max[self.open_slot]
            state.open_max[self.open_slot] = torch.where(self.continues[:, None], highest.maximum(before), highest)
        return pooled_PD

    def own_bytes(self, layer: int, k_THE: Tensor, v_THE: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for x_THE, open_BMHE in ((k_THE, self.state.open_k[layer]), (v_THE, self.state.open_v[layer])):
            own = x_THE[self.own_new]
            found.append(own if self.order is None else torch.cat([open_BMHE[self.own_before], own])[self.order])
            if self.store:
                open_BMHE[self.open_target] = x_THE[self.open].to(open_BMHE.dtype)
        return found[0], found[1]

    def read_patches(self, layer: int, k_PKHE: Tensor, v_PKHE: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for x_PKHE, newest_BKHE in ((k_PKHE, self.state.patch_k[layer]), (v_PKHE, self.state.patch_v[layer])):
            before = newest_BKHE[self.new.slot[: self.num_before]].to(x_PKHE.dtype)
            found.append(torch.cat([before, x_PKHE]) if self.num_before else x_PKHE)
            if self.store and len(x_PKHE):
                newest_BKHE[self.patches.slot] = x_PKHE[self.patches.last].to(newest_BKHE.dtype)
        return found[0], found[1]
