"""The KV caches of sequences that are decoded, one in each of B slots, and attention over them.

ids -> byte LM ------------> entropies -> patch starts
 |      [KV cache]                              |
 +---> encoder -> open patch --patch closes--> global transformer -> newest patch
 |      [KV cache] [its bytes]                  [KV cache]            [its keys]
 +---------------------------> decoder <--------------------------------+
                                [KV cache] -> logits
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.kernels.patch_attention import ByteRanges
from bytelatent.kernels.patch_pooling import pool_patches
from bytelatent.model import BLTModel, ByteLM
from bytelatent.model.attention import Mask
from bytelatent.model.settings import StackSettings
from bytelatent.patching import Tail

# Shapes: B slots, T new positions, N of the slots have any of them, Q of them in the slot that has most, L layers,
# R positions in a KV cache, S of them that are attended to, J key/value heads, H heads, E head size, D local width, P
# patches, K keys per patch, M bytes of an open patch that fit, X and Y cross-attentions of encoder and decoder, W ids

SLACK = 16  # positions more than a window, so that as many drafted bytes may be overwritten
BLOCK = 256  # positions, patches, bytes by which caches grow


@dataclass
class KVCache:
    """Keys and values of a stack by position: position p at index p % R."""

    k: Tensor  # [L, B, R, J, E]
    v: Tensor  # [L, B, R, J, E]
    window: int | None  # positions seen, the own one included; None: all, and R grows

    def __post_init__(self) -> None:
        self.layers = list(zip(self.k.unbind(), self.v.unbind(), strict=True))

    @classmethod
    def empty(cls, stack: StackSettings, num_slots: int, like: Tensor) -> "KVCache":
        size = BLOCK if stack.window is None else stack.window + SLACK
        shape = (stack.num_layers, num_slots, size, stack.kv_heads, stack.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape), stack.window)

    @property
    def size(self) -> int:
        return self.k.shape[2]

    def reserve(self, positions: int) -> None:
        """Grow to hold `positions`, where there is no window."""
        if self.window is None and positions > self.size:
            more = (0, 0, 0, 0, 0, _in_blocks(positions) - self.size)
            self.k, self.v = F.pad(self.k, more), F.pad(self.v, more)
            self.__post_init__()


@dataclass(frozen=True)
class Room:
    """How much fits in a slot."""

    positions: int = BLOCK
    patches: int = BLOCK
    open_bytes: int = BLOCK


@dataclass
class DecodeState:
    """What both kinds of models remember of the sequences in B slots."""

    position: Tensor  # [B] ids read
    tail: Tensor  # [B, W] the newest ids, the last one last
    previous_entropy: Tensor  # [B] nats, of the id that follows
    since_start: Tensor  # [B] ids since the patching mode itself last started a patch
    num_patches: Tensor  # [B] closed patches
    open_count: Tensor  # [B] bytes of the open patch

    def caches(self) -> list[KVCache]:
        """The KV caches by position in the text."""
        raise NotImplementedError

    def reserve(self, room: Room) -> None:
        """Grow, so that this much fits in each slot."""
        for cache in self.caches():
            cache.reserve(room.positions)

    def put(self, slot: int, other: "DecodeState", source: int) -> None:
        """Copy slot `source` of another state of the same model into a slot."""
        counts = torch.stack([other.position[source], other.num_patches[source], other.open_count[source]]).tolist()
        self.reserve(Room(*counts))
        for (mine, axis), (theirs, _) in zip(self._tensors(), other._tensors(), strict=True):
            target, given = mine.select(axis, slot), theirs.select(axis, source)
            if target.shape != given.shape:  # one has grown more
                common = tuple(slice(0, min(sizes)) for sizes in zip(target.shape, given.shape, strict=True))
                target, given = target[common], given[common]
            target.copy_(given)

    def _tensors(self) -> list[tuple[Tensor, int]]:
        """Everything that a slot holds, and the axis of the slots."""
        counts = (self.position, self.tail, self.previous_entropy, self.since_start, self.num_patches, self.open_count)
        return [(count, 0) for count in counts] + [(part, 1) for cache in self.caches() for part in (cache.k, cache.v)]


@dataclass
class ByteLMState(DecodeState):
    """The state of a byte LM."""

    byte_lm: KVCache

    def caches(self) -> list[KVCache]:
        return [self.byte_lm]


@dataclass
class BLTState(DecodeState):
    """The state of a BLT."""

    byte_lm: KVCache | None  # of the entropy model, where the patching mode needs one
    encoder: KVCache
    decoder: KVCache
    patches: KVCache  # of the global transformer, by number of the patch
    open_k: Tensor  # [X, B, M, H, E] of the open patch's bytes, for the encoder's cross-attentions
    open_v: Tensor  # [X, B, M, H, E]
    open_max: Tensor  # [B, D] the maximum of their states
    patch_k: Tensor  # [Y, B, K, H, E] of the newest closed patch, for the decoder's cross-attentions
    patch_v: Tensor  # [Y, B, K, H, E]
    tails: list[Tail] = field(default_factory=list)  # of the patching mode `bpe`, one per slot

    def caches(self) -> list[KVCache]:
        return [cache for cache in (self.byte_lm, self.encoder, self.decoder) if cache is not None]

    def reserve(self, room: Room) -> None:
        super().reserve(room)
        self.patches.reserve(room.patches)
        if room.open_bytes > self.open_k.shape[2]:
            more = (0, 0, 0, 0, 0, _in_blocks(room.open_bytes) - self.open_k.shape[2])
            self.open_k, self.open_v = F.pad(self.open_k, more), F.pad(self.open_v, more)

    def put(self, slot: int, other: DecodeState, source: int) -> None:
        super().put(slot, other, source)
        assert isinstance(other, BLTState)
        if other.tails:
            self.tails = self.tails or [Tail() for _ in self.position]
            self.tails[slot] = other.tails[source]

    def _tensors(self) -> list[tuple[Tensor, int]]:
        by_layer = (self.patches.k, self.patches.v, self.open_k, self.open_v, self.patch_k, self.patch_v)
        return [*super()._tensors(), *((part, 1) for part in by_layer), (self.open_max, 0)]


def empty_state(model: BLTModel | ByteLM, byte_lm: ByteLM | None, num_slots: int) -> ByteLMState | BLTState:
    """The state of slots that have read nothing.

    Args:
        byte_lm: the entropy model, where the patching mode needs one.
    """
    like = next(model.parameters())
    zeros = torch.zeros(num_slots, dtype=torch.long, device=like.device)
    longest = 2  # ids that deciding about patches needs
    if isinstance(model, BLTModel) and model.settings.ngram_hash is not None:
        longest = max(longest, *model.settings.ngram_hash.sizes)
    counts = (zeros, zeros[:, None].repeat(1, longest), zeros.float(), zeros.clone(), zeros.clone(), zeros.clone())
    if isinstance(model, ByteLM):
        return ByteLMState(*counts, KVCache.empty(model.settings, num_slots, like))
    settings, cross = model.settings, model.settings.cross_attention
    head_dim = settings.encoder.dim // cross.num_heads
    num_encoder, num_decoder = len(model.encoder.cross_attention), len(model.decoder.cross_attention)
    lm_like = like if byte_lm is None else next(byte_lm.parameters())
    return BLTState(
        *counts,
        byte_lm=None if byte_lm is None else KVCache.empty(byte_lm.settings, num_slots, lm_like),
        encoder=KVCache.empty(settings.encoder, num_slots, like),
        decoder=KVCache.empty(settings.decoder, num_slots, like),
        patches=KVCache.empty(settings.global_transformer, num_slots, like),
        open_k=like.new_zeros(num_encoder, num_slots, BLOCK, cross.num_heads, head_dim),
        open_v=like.new_zeros(num_encoder, num_slots, BLOCK, cross.num_heads, head_dim),
        open_max=like.new_zeros(num_slots, settings.encoder.dim),
        patch_k=like.new_zeros(num_decoder, num_slots, cross.k, cross.num_heads, head_dim),
        patch_v=like.new_zeros(num_decoder, num_slots, cross.k, cross.num_heads, head_dim),
    )


class NewPositions:
    """New positions of some slots, in runs: each run follows what its slot has read.

    Several runs of a slot do not see one another. The runs of a slot lie side by side. Its positions are also padded to
    [N, Q].

    Args:
        slots, position: [T] the slot and the position of each; positions of a run follow one another.

    Attributes:
        begin: [T] index where each one's run begins.
        offset: [T] positions of its run before each one.
        slot: [N] the slots that have new positions.
        num_read: [N] positions that each of them has read before.
    """

    def __init__(self, slots: Tensor, position: Tensor):
        index = torch.arange(len(slots), device=slots.device)
        is_first, one = slots[1:] != slots[:-1], torch.ones_like(slots[:1], dtype=torch.bool)
        self._begins_slot = torch.cat([one, is_first])
        begins_run = torch.cat([one, is_first | (position[1:] != position[:-1] + 1)])
        self.slots, self.position = slots, position
        self.begin = torch.where(begins_run, index, 0).cummax(0).values
        self.offset = index - self.begin

    @cached_property
    def _first(self) -> Tensor:
        """[N] the index of each slot's first position."""
        return self._begins_slot.nonzero()[:, 0]

    @cached_property
    def line(self) -> Tensor:
        """[T] which of `slot` each position belongs to."""
        return self._begins_slot.cumsum(0) - 1

    @cached_property
    def slot(self) -> Tensor:
        return self.slots[self._first]

    @cached_property
    def num_read(self) -> Tensor:
        return self.position[self._first]

    @cached_property
    def _number(self) -> Tensor:
        """[T] positions of its slot before each one."""
        return torch.arange(len(self.slots), device=self.slots.device) - self._first[self.line]

    @cached_property
    def count(self) -> Tensor:
        """[N] positions of each slot."""
        return torch.bincount(self.line)

    @cached_property
    def last(self) -> Tensor:
        """[N] the index of each slot's last position."""
        return self.count.cumsum(0) - 1

    @cached_property
    def size(self) -> int:
        """Q"""
        return int(self.count.max())

    @cached_property
    def _padded_index(self) -> Tensor | None:
        """[T] where each position lies in N * Q; None where nothing is padded."""
        is_full = len(self.slots) == len(self.slot) * self.size
        return None if is_full else self.line * self.size + self._number

    @cached_property
    def seen(self) -> Tensor:
        """[N, Q, Q] what each position sees of the others: its own run up to itself."""
        run_NQ, at_NQ = self.padded(self.begin, -1), self.padded(self.position)
        return (run_NQ[:, :, None] == run_NQ[:, None, :]) & (at_NQ[:, :, None] >= at_NQ[:, None, :])

    def padded(self, values: Tensor, fill: int = 0) -> Tensor:
        """[T, ...] -> [N, Q, ...]"""
        if self._padded_index is not None:
            padded = values.new_full((len(self.slot) * self.size, *values.shape[1:]), fill)
            padded[self._padded_index] = values
            values = padded
        return values.unflatten(0, (len(self.slot), self.size))

    def unpadded(self, padded: Tensor) -> Tensor:
        """[N, Q, ...] -> [T, ...]"""
        values = padded.flatten(0, 1)
        return values if self._padded_index is None else values[self._padded_index]

    def newest(self, count: int) -> Tensor | slice:
        """The indices of the newest `count` positions of each slot."""
        if self.size <= count:
            return slice(None)
        after = self.count[self.line] - self._number  # itself and those that follow it in its slot
        return (after <= count).nonzero()[:, 0]


class StepAttention:
    """New positions attend to their slots' KV cache and to what precedes them in their runs.

    Args:
        store: whether the cache takes their keys and values; then each slot has one run.
    """

    def __init__(self, cache: KVCache, new: NewPositions, store: bool = True):
        self.cache, self.new, self.store, self.layer = cache, new, store, 0
        if store:
            cache.reserve(int(new.position.max()) + 1)
            self.stored = new.newest(cache.size)
            self.target = (new.slots[self.stored], new.position[self.stored] % cache.size)
        self.num_seen = min(int(new.num_read.max()), cache.size)
        # An index holds the newest of the positions that map to it.
        newest_N1 = (new.num_read - 1)[:, None]
        held_NS = newest_N1 - (newest_N1 - torch.arange(self.num_seen, device=newest_N1.device)) % cache.size
        seen_NQS = (held_NS >= 0)[:, None, :].expand(-1, new.size, -1)
        seen_NQQ = new.seen
        if cache.window is not None:
            at_NQ1 = new.padded(new.position)[:, :, None]
            seen_NQS = seen_NQS & (held_NS[:, None, :] > at_NQ1 - cache.window)
            seen_NQQ = seen_NQQ & (at_NQ1.mT > at_NQ1 - cache.window)
        self.seen_N1QK = torch.cat([seen_NQS, seen_NQQ], dim=-1)[:, None]

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        new, seen = self.new, []
        for x_TJE, cache_BRJE in zip((k_TJE, v_TJE), self.cache.layers[self.layer], strict=True):
            x_TJE = x_TJE.to(cache_BRJE.dtype)
            before = cache_BRJE[new.slot, : self.num_seen]
            seen.append(torch.cat([before, new.padded(x_TJE)], dim=1).transpose(1, 2))
            if self.store:
                cache_BRJE[self.target] = x_TJE[self.stored]
        self.layer += 1
        q = new.padded(q_THE).transpose(1, 2)
        grouped = q_THE.shape[1] != k_TJE.shape[1]
        out = F.scaled_dot_product_attention(q, *seen, attn_mask=self.seen_N1QK, enable_gqa=grouped)
        return new.unpadded(out.transpose(1, 2))


class StoreNewest:
    """Stores the newest keys and values of whole sequences in a KV cache, layer by layer.

    They are copied as slices: that is less work for the host, and for the device, than indices.

    Args:
        slots, counts: the sequences' slots and numbers of positions, which lie one after another in the stream.
    """

    def __init__(self, cache: KVCache, slots: list[int], counts: list[int]):
        cache.reserve(max(counts, default=0))
        self.cache, self.layer = cache, 0
        self.slices: list[tuple[int, slice, slice]] = []  # slot, in the stream, in the cache
        begin = 0
        for slot, count in zip(slots, counts, strict=True):
            at = max(count - cache.size, 0)
            while at < count:
                index = at % cache.size
                size = min(count - at, cache.size - index)
                self.slices.append((slot, slice(begin + at, begin + at + size), slice(index, index + size)))
                at += size
            begin += count

    def __call__(self, k_TJE: Tensor, v_TJE: Tensor) -> None:
        k_BRJE, v_BRJE = self.cache.layers[self.layer]
        for slot, source, target in self.slices:
            k_BRJE[slot, target] = k_TJE[source]
            v_BRJE[slot, target] = v_TJE[source]
        self.layer += 1

    def all_layers(self, k_LTJE: Tensor, v_LTJE: Tensor) -> None:
        """The keys and values of all L layers at once."""
        for slot, source, target in self.slices:
            self.cache.k[:, slot, target] = k_LTJE[:, source]
            self.cache.v[:, slot, target] = v_LTJE[:, source]


@dataclass
class PerDocument:
    """Causal attention over documents one by one, without a window or a mask: each costs what it costs alone."""

    counts: list[int]  # positions of each document, in order

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        grouped, found = q_THE.shape[1] != k_TJE.shape[1], []
        for parts in zip(*(x.split(self.counts) for x in (q_THE, k_TJE, v_TJE)), strict=True):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            found.append(out[0].transpose(0, 1))
        return torch.cat(found)


@dataclass
class PromptAttention:
    """Whole sequences under a mask; the KV cache takes their newest keys and values."""

    mask: Mask
    store: StoreNewest

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        self.store(k_TJE, v_TJE)
        return self.mask.attend(q_THE, k_TJE, v_TJE)


class BLTPass:
    """A `bytelatent.model.blt.BLTCache`: the state of a BLT during one pass over new bytes.

    Args:
        new: the new bytes; their ids come with `tail_TW`.
        closes, begin: [T] whether each byte is the last of its patch, and the position where its patch begins.
        patches: the patches that close.
        encoder, global_transformer, decoder: attention of the stacks.
        store: whether the state takes what later bytes need.
        num_padding: bytes after the new ones that stand for nothing.
    """

    def __init__(
        self,
        state: BLTState,
        new: NewPositions,
        tail_TW: Tensor,
        closes: Tensor,
        begin: Tensor,
        patches: NewPositions,
        encoder: Mask,
        global_transformer: Mask,
        decoder: Mask,
        store: bool,
        num_padding: int = 0,
    ):
        self.state, self.new, self.patches, self.store = state, new, patches, store
        self.encoder, self.global_transformer, self.decoder = encoder, global_transformer, decoder
        self.tail_TW = F.pad(tail_TW, (0, 0, 0, num_padding))
        self.patch_position = patches.position
        closing = closes.nonzero()[:, 0]
        self._find_own_bytes(closing, closes, begin)
        closed = closes.cumsum(0)
        before = (closed - closes.long())[new.begin]
        self._find_read_patches(torch.where(closed > before, closed - 1, -1), num_padding)
        if store:
            open_begin = torch.where(closes, new.position + 1, begin)[new.last]  # [N] of the patch that is open now
            self._find_open_bytes(open_begin)

    def _find_own_bytes(self, closing: Tensor, closes: Tensor, begin: Tensor) -> None:
        """Which bytes are in the patches that close: remembered ones and new ones."""
        new, num_patches = self.new, len(closing)
        first = (new.position - new.offset)[closing]
        count_before = (first - begin[closing]).clamp(min=0)
        self.is_begun = count_before > 0  # [P] whether its first bytes are remembered
        self.closing_slot = new.slots[closing]
        inner = torch.arange(int(count_before.max()) if num_patches else 0, device=closes.device)
        patch_before, inner = (inner < count_before[:, None]).nonzero(as_tuple=True)
        self.own_before = (self.closing_slot[patch_before], inner)
        patch = closes.cumsum(0) - closes.long()
        is_in = patch < num_patches
        if num_patches:  # the next byte that closes a patch, if it is in the same run
            is_in &= new.begin == new.begin[closing[patch.clamp(max=num_patches - 1)]]
        self.own_new = is_in.nonzero()[:, 0]
        self.new_runs = ByteRanges.of(patch[self.own_new], num_patches)
        patch = torch.cat([patch_before, patch[self.own_new]])
        self.order = patch.argsort(stable=True) if len(patch_before) else None  # a patch's bytes side by side
        self.own = ByteRanges.of(patch if self.order is None else patch[self.order], num_patches)

    def _find_read_patches(self, read: Tensor, num_padding: int) -> None:
        """Which patch each byte reads: one that closes, or the newest of its slot before."""
        new, state = self.new, self.state
        has_before = state.num_patches[new.slot] > 0
        is_needed = not len(self.patch_position) or bool(has_before.any())  # some patch there must be to read
        self.num_before = len(new.slot) if is_needed else 0
        if self.num_before:
            before = torch.where(has_before, torch.arange(len(new.slot), device=read.device), -1)
            read = torch.where(read >= 0, read + self.num_before, before[new.line])
        num_patches = self.num_before + len(self.patch_position)
        self.read: ByteRanges = ByteRanges.of(F.pad(read, (0, num_padding), value=-1), num_patches)

    def _find_open_bytes(self, begin: Tensor) -> None:
        """Which new bytes are in an open patch once all are read."""
        new, state = self.new, self.state
        count = new.position[new.last] + 1 - begin
        state.reserve(Room(0, 0, int(count.max()) + 1))
        self.open = (new.position >= begin[new.line]).nonzero()[:, 0]
        line = new.line[self.open]
        self.open_target = (new.slots[self.open], new.position[self.open] - begin[line])
        has_any = torch.zeros_like(count, dtype=torch.bool).index_fill(0, line, True)
        number = has_any.cumsum(0) - 1
        self.open_runs = ByteRanges.of(number[line], int(has_any.sum()))
        self.open_slot = new.slot[has_any]
        self.goes_on = (begin < new.num_read)[has_any]  # its first bytes are remembered

    def pool(self, h_TD: Tensor) -> Tensor:
        state, pooled_PD = self.state, h_TD.new_zeros(len(self.patch_position), h_TD.shape[1])
        if len(pooled_PD):
            pooled_PD = pool_patches(h_TD[self.own_new], self.new_runs)
            before = state.open_max[self.closing_slot].to(pooled_PD.dtype)
            pooled_PD = torch.where(self.is_begun[:, None], pooled_PD.maximum(before), pooled_PD)
        if self.store and len(self.open_slot):
            highest = pool_patches(h_TD[self.open], self.open_runs).to(state.open_max.dtype)
            before = state.open_max[self.open_slot]
            state.open_max[self.open_slot] = torch.where(self.goes_on[:, None], highest.maximum(before), highest)
        return pooled_PD

    def own_bytes(self, layer: int, k_THE: Tensor, v_THE: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state
        k, v = k_THE[self.own_new], v_THE[self.own_new]
        if self.order is not None:
            k_before, v_before = state.open_k[layer][self.own_before], state.open_v[layer][self.own_before]
            k, v = torch.cat([k_before, k])[self.order], torch.cat([v_before, v])[self.order]
        if self.store:
            state.open_k[layer][self.open_target] = k_THE[self.open].to(state.open_k.dtype)
            state.open_v[layer][self.open_target] = v_THE[self.open].to(state.open_v.dtype)
        return k, v

    def read_patches(self, layer: int, k_PKHE: Tensor, v_PKHE: Tensor) -> tuple[Tensor, Tensor]:
        state, new, patches = self.state, self.new, self.patches
        k, v = k_PKHE, v_PKHE
        if self.num_before:
            k = torch.cat([state.patch_k[layer][new.slot].to(k.dtype), k])
            v = torch.cat([state.patch_v[layer][new.slot].to(v.dtype), v])
        if self.store and len(self.patch_position):
            state.patch_k[layer][patches.slot] = k_PKHE[patches.last].to(state.patch_k.dtype)
            state.patch_v[layer][patches.slot] = v_PKHE[patches.last].to(state.patch_v.dtype)
        return k, v


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
