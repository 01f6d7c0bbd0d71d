"""The KV caches of sequences that are decoded, one in each of B slots, and attention over them.

ids -> byte LM ------------> entropies -> patch starts
 |      [KV cache]                              |
 +---> encoder -> open patch --patch closes--> global transformer -> newest patch
 |      [KV cache] [its bytes]                  [KV cache]            [its keys]
 +---------------------------> decoder <--------------------------------+
                                [KV cache] -> logits
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.model import BLTModel, ByteLM, LanguageModel
from bytelatent.model.attention import Mask
from bytelatent.model.settings import StackSettings
from bytelatent.patching import Tail

# Shapes: B slots, T new positions, N of the slots have any of them, Q of them in the slot that has most, L layers,
# R positions in a KV cache, S of them that are attended to, J key/value heads, H heads, E head size, D local width, P
# patches, K keys per patch, M bytes of an open patch that fit, X and Y cross-attentions of encoder and decoder, W ids

SLOTS_SECOND = ("open_k", "open_v", "patch_k", "patch_v")  # fields whose second axis are the slots
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
        shape = (stack.num_layers, num_slots, stack.window or BLOCK, stack.kv_heads, stack.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape), stack.window)

    @property
    def size(self) -> int:
        return self.k.shape[2]

    def taken(self, slot: int, positions: int) -> "KVCache":
        """A copy of the first indices of a slot, for `DecodeState.put`."""
        here = slice(None), slice(slot, slot + 1), slice(0, positions)
        return KVCache(self.k[here].clone(), self.v[here].clone(), self.window)

    def more_bytes(self, positions: int) -> int:
        """Memory that `reserve` would take."""
        each = (self.k.nbytes + self.v.nbytes) // self.size
        return max(positions - self.size, 0) * each if self.window is None else 0

    def reserve(self, positions: int) -> None:
        """Grow to hold `positions`, where there is no window."""
        if self.window is None and positions > self.size:
            more = (0, 0, 0, 0, 0, _in_blocks(positions) - self.size)
            self.k, self.v = F.pad(self.k, more), F.pad(self.v, more)
            self.__post_init__()


@dataclass(frozen=True)
class CacheCapacity:
    """How much fits in a slot."""

    positions: int = BLOCK
    patches: int = BLOCK
    open_bytes: int = BLOCK


@dataclass
class DecodeState:
    """Decoding state of a byte LM or a token LM for the sequences in B slots."""

    position: Tensor  # [B] ids read
    tail: Tensor  # [B, W] the newest ids, the last one last
    previous_entropy: Tensor  # [B] nats, of the id that follows
    since_start: Tensor  # [B] ids since the patching mode itself last started a patch
    num_patches: Tensor  # [B] closed patches
    open_count: Tensor  # [B] bytes of the open patch
    context_begin: Tensor  # [B] position at which the entropy model's context was reset
    byte_lm: KVCache | None  # of a BLT's entropy model, where the patching mode needs one

    def caches(self) -> list[KVCache]:
        """The KV caches by position in the text."""
        return [self.byte_lm] if self.byte_lm is not None else []

    def reserve(self, room: CacheCapacity) -> None:
        """Grow, so that this much fits in each slot."""
        for cache in self.caches():
            cache.reserve(room.positions)

    def more_bytes(self, room: CacheCapacity) -> int:
        """Memory that `reserve` would take for KV caches."""
        return sum(cache.more_bytes(room.positions) for cache in self.caches())

    def put(self, slot: int, other: "DecodeState", source: int) -> None:
        """Copy slot `source` of another state of the same model into a slot."""
        counts = torch.stack([other.position[source], other.num_patches[source], other.open_count[source]]).tolist()
        self.reserve(CacheCapacity(*counts))
        for mine, theirs in zip(self._by_slot(), other._by_slot(), strict=True):
            target, given = mine[slot], theirs[source]
            if target.shape != given.shape:  # one has grown more
                common = tuple(slice(0, min(sizes)) for sizes in zip(target.shape, given.shape, strict=True))
                target, given = target[common], given[common]
            target.copy_(given)

    def _by_slot(self) -> Iterator[Tensor]:
        """All tensors, with the slots as their first axis."""
        for name, value in vars(self).items():
            if isinstance(value, KVCache):
                yield from (value.k.transpose(0, 1), value.v.transpose(0, 1))
            elif isinstance(value, Tensor):
                yield value.transpose(0, 1) if name in SLOTS_SECOND else value

    def taken(self, slot: int) -> Self:
        """A copy of one slot with no room to spare: for `put`, not to be read on from."""
        counts = torch.stack([self.position[slot], self.num_patches[slot], self.open_count[slot]]).tolist()
        num_read, num_patches, num_open = counts

        def copied(name: str, value: Any) -> Any:
            if isinstance(value, KVCache):
                return value.taken(slot, num_patches if name == "patches" else num_read)
            if name in SLOTS_SECOND:
                here = value[:, slot : slot + 1]
                return (here[:, :, :num_open] if name.startswith("open") else here).clone()
            if isinstance(value, Tensor):
                return value[slot : slot + 1].clone()
            return [value[slot]] if value else value

        return replace(self, **{name: copied(name, value) for name, value in vars(self).items()})

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._by_slot())


@dataclass
class BLTDecodeState(DecodeState):
    """Decoding state of a BLT for the sequences in B slots."""

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
        return [*super().caches(), self.encoder, self.decoder]

    def reserve(self, room: CacheCapacity) -> None:
        super().reserve(room)
        self.patches.reserve(room.patches)
        if room.open_bytes > self.open_k.shape[2]:
            more = (0, 0, 0, 0, 0, _in_blocks(room.open_bytes) - self.open_k.shape[2])
            self.open_k, self.open_v = F.pad(self.open_k, more), F.pad(self.open_v, more)

    def more_bytes(self, room: CacheCapacity) -> int:
        return super().more_bytes(room) + self.patches.more_bytes(room.patches)

    def put(self, slot: int, other: DecodeState, source: int) -> None:
        super().put(slot, other, source)
        if isinstance(other, BLTDecodeState) and other.tails:
            self.tails = self.tails or [Tail() for _ in self.position]
            self.tails[slot] = other.tails[source]


def empty_state(model: BLTModel | LanguageModel, byte_lm: ByteLM | None, num_slots: int) -> DecodeState:
    """The state of slots that have read nothing.

    Args:
        byte_lm: the entropy model, where the patching mode needs one.
    """
    like = next(model.parameters())
    zeros = torch.zeros(num_slots, dtype=torch.long, device=like.device)
    longest = 2  # ids that deciding about patches needs
    if isinstance(model, BLTModel) and model.settings.ngram_hash is not None:
        longest = max(longest, *model.settings.ngram_hash.sizes)
    since, num_patches, open_count, begin = (zeros.clone() for _ in range(4))
    counts = (zeros, zeros[:, None].repeat(1, longest), zeros.float(), since, num_patches, open_count, begin)
    if isinstance(model, LanguageModel):
        return DecodeState(*counts, KVCache.empty(model.settings, num_slots, like))
    settings, cross = model.settings, model.settings.cross_attention
    dim = settings.encoder.dim
    if cross is None:  # the states themselves, in place of keys, and no values
        open_k, patch_k = like.new_zeros(1, num_slots, BLOCK, 1, dim), like.new_zeros(1, num_slots, 1, 1, dim)
    else:
        heads = cross.num_heads, dim // cross.num_heads
        open_k = like.new_zeros(len(model.encoder.cross_attention), num_slots, BLOCK, *heads)
        patch_k = like.new_zeros(len(model.decoder.cross_attention), num_slots, cross.k, *heads)
    values = slice(0, None if cross is not None else 0)
    return BLTDecodeState(
        *counts,
        byte_lm=None if byte_lm is None else KVCache.empty(byte_lm.settings, num_slots, next(byte_lm.parameters())),
        encoder=KVCache.empty(settings.encoder, num_slots, like),
        decoder=KVCache.empty(settings.decoder, num_slots, like),
        patches=KVCache.empty(settings.global_transformer, num_slots, like),
        open_k=open_k,
        open_v=torch.zeros_like(open_k[..., values]),
        open_max=like.new_zeros(num_slots, dim),
        patch_k=patch_k,
        patch_v=torch.zeros_like(patch_k[..., values]),
    )


class NewPositions:
    """New positions of some slots, in runs: each run follows what its slot has read.

    Several runs of a slot do not see one another. The runs of a slot lie side by side. Its positions are also padded to
    [N, Q].

    Args:
        slots, position: [T] the slot and the position of each; positions of a run follow one another.
        begins: [T] bool, where runs begin, if some begin at position 0 again. Then N counts runs, and `slot` holds a
            slot once for each of its runs. A cache takes the newest run of each slot.

    Attributes:
        begin: [T] index where each one's run begins.
        offset: [T] positions of its run before each one.
        slot: [N] the slots that have new positions.
        line: [T] which of `slot` each position belongs to.
        number: [T] positions of its slot before each one.
        count: [N] positions of each slot.
        last: [N] the index of each slot's last position.
        num_read: [N] positions that each slot has read before.
    """

    def __init__(self, slots: Tensor, position: Tensor, begins: Tensor | None = None):
        index = torch.arange(len(slots), device=slots.device)
        is_first, one = slots[1:] != slots[:-1], torch.ones_like(slots[:1], dtype=torch.bool)
        begins_slot = torch.cat([one, is_first]) if begins is None else begins
        begins_run = torch.cat([one, is_first | (position[1:] != position[:-1] + 1)]) if begins is None else begins
        first_N = begins_slot.nonzero()[:, 0]
        self.slots, self.position = slots, position
        self.begin = torch.where(begins_run, index, 0).cummax(0).values
        self.offset = index - self.begin
        self.slot, self.num_read = slots[first_N], position[first_N]
        self.line = begins_slot.cumsum(0) - 1
        self.number = index - first_N[self.line]
        self.count = torch.bincount(self.line)
        self.last = self.count.cumsum(0) - 1
        self.is_newest_run = None if begins is None else torch.cat([self.slot[1:] != self.slot[:-1], one])  # [N]

    @cached_property
    def size(self) -> int:
        """Q"""
        return int(self.count.max())

    @cached_property
    def _padded_index(self) -> Tensor | None:
        """[T] where each position lies in N * Q; None where nothing is padded."""
        is_full = len(self.slots) == len(self.slot) * self.size
        return None if is_full else self.line * self.size + self.number

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
        if self.size <= count and self.is_newest_run is None:
            return slice(None)
        after = self.count[self.line] - self.number  # itself and those that follow it in its slot
        found = after <= count
        if self.is_newest_run is not None:
            found &= self.is_newest_run[self.line]
        return found.nonzero()[:, 0]


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
    """

    def __init__(self, cache: KVCache, new: NewPositions):
        slots, counts = new.slot.tolist(), new.count.tolist()
        cache.reserve(max(counts, default=0))
        self.cache, self.layer = cache, 0
        self.slices: list[tuple[int, slice, slice]] = []  # slot, in the stream, in the cache
        begin = 0
        newest = [True] * len(slots) if new.is_newest_run is None else new.is_newest_run.tolist()
        for slot, count, is_newest_run in zip(slots, counts, newest, strict=True):
            at = max(count - cache.size, 0) if is_newest_run else count
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


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
