"""The KV caches of sequences that are decoded, one in each of B slots.

ids -> byte LM ------------> entropies -> patch starts
 |      [KV cache]                              |
 +---> encoder -> open patch --patch closes--> global transformer -> newest patch
 |      [KV cache] [its bytes]                  [KV cache]            [its keys]
 +---------------------------> decoder <--------------------------------+
                                [KV cache] -> logits
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.device import on_device
from bytelatent.inference.settings import KVCacheNumbers
from bytelatent.kernels.quantized_heads import dequantize_heads, quantize_heads
from bytelatent.model import BLTModel, ByteLM, LanguageModel
from bytelatent.model.settings import StackSettings
from bytelatent.patching import Tail

# Shapes: B slots, L layers, R positions in a KV cache, J key/value heads, H heads, E head size, D local width, P
# patches, K keys per patch, M bytes of an open patch that fit, X and Y cross-attentions of encoder and decoder, W ids

SLOTS_SECOND = ("open_k", "open_v", "patch_k", "patch_v")  # fields whose second axis are the slots
BLOCK = 256  # positions, patches, bytes by which caches grow


@dataclass
class KVCache:
    """Keys and values of a stack by position: position p at index p % R.

    Attributes:
        scales: of keys and values in 8 bits, a scale per head and position, see `quantize_heads`.
        tables: all tensors, [L, B, R, J, ...].
        layers: those of each layer, [B, R, J, ...].
    """

    k: Tensor  # [L, B, R, J, E]
    v: Tensor  # [L, B, R, J, E]
    window: int | None  # positions seen, the own one included; None: all, and R grows
    scales: tuple[Tensor, ...] = ()  # [L, B, R, J] each, uint8

    def __post_init__(self) -> None:
        self.tables = (self.k, self.v, *self.scales)
        self.layers = list(zip(*(table.unbind() for table in self.tables), strict=True))

    @classmethod
    def empty(cls, stack: StackSettings, num_slots: int, like: Tensor, numbers: KVCacheNumbers = "full") -> "KVCache":
        shape = (stack.num_layers, num_slots, stack.window or BLOCK, stack.kv_heads, stack.head_dim)
        if numbers == "full":
            return cls(like.new_zeros(shape), like.new_zeros(shape), stack.window)
        k, v = (like.new_zeros(shape, dtype=torch.int8) for _ in "kv")
        k_scale, v_scale = (like.new_zeros(shape[:-1], dtype=torch.uint8) for _ in "kv")
        return cls(k, v, stack.window, (k_scale, v_scale))

    @property
    def size(self) -> int:
        return self.k.shape[2]

    def as_held(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Keys and values [..., J, E] as the tables hold them."""
        if not self.scales:
            return k.to(self.k.dtype), v.to(self.v.dtype)
        (k, k_scale), (v, v_scale) = quantize_heads(k), quantize_heads(v)
        return k, v, k_scale, v_scale

    def numbers(self, held: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [..., J, E] of what tables hold, which `as_held` gives back."""
        k, v, *scales = held
        if not scales:
            return k, v
        return dequantize_heads(k, scales[0], dtype), dequantize_heads(v, scales[1], dtype)

    def taken(self, slot: int, positions: int) -> "KVCache":
        """A copy of the first indices of a slot, for `DecodeState.put`."""
        here = slice(None), slice(slot, slot + 1), slice(0, positions)
        k, v, *scales = (table[here].clone() for table in self.tables)
        return KVCache(k, v, self.window, tuple(scales))

    def more_bytes(self, positions: int) -> int:
        """Memory that `reserve` would take."""
        each = sum(table.nbytes for table in self.tables) // self.size
        return max(positions - self.size, 0) * each if self.window is None else 0

    def reserve(self, positions: int) -> None:
        """Grow to hold `positions`, where there is no window."""
        if self.window is None and positions > self.size:
            more = _in_blocks(positions) - self.size
            self.k, self.v, *scales = (F.pad(table, (0, 0) * (table.dim() - 3) + (0, more)) for table in self.tables)
            self.scales = tuple(scales)
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

    def counts(self, slots: Sequence[int]) -> np.ndarray:
        """[N, 3] what N slots hold of what `CacheCapacity` counts."""
        counts = torch.stack([self.position, self.num_patches, self.open_count], dim=1)
        return counts.cpu().numpy()[list(slots)]

    def put(self, slots: Sequence[int], other: "DecodeState", sources: Sequence[int]) -> None:
        """Copy slots `sources` of another state of the same model into `slots`."""
        self.reserve(CacheCapacity(*other.counts(sources).max(0).tolist()))
        to, of = (on_device(torch.tensor(list(each)), self.position.device) for each in (slots, sources))
        for mine, theirs in zip(self._by_slot(), other._by_slot(), strict=True):
            sizes = map(min, mine.shape[1:], theirs.shape[1:])  # one may have grown more
            common = (slice(None), *(slice(size) for size in sizes))
            mine[common].index_copy_(0, to, theirs[common].index_select(0, of))

    def _by_slot(self) -> Iterator[Tensor]:
        """All tensors, with the slots as their first axis."""
        for name, value in vars(self).items():
            if isinstance(value, KVCache):
                yield from (table.transpose(0, 1) for table in value.tables)
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

    def put(self, slots: Sequence[int], other: DecodeState, sources: Sequence[int]) -> None:
        super().put(slots, other, sources)
        if isinstance(other, BLTDecodeState) and other.tails:
            self.tails = self.tails or [Tail() for _ in self.position]
            for slot, source in zip(slots, sources, strict=True):
                self.tails[slot] = other.tails[source]


def empty_state(
    model: BLTModel | LanguageModel, byte_lm: ByteLM | None, num_slots: int, numbers: KVCacheNumbers = "full"
) -> DecodeState:
    """The state of slots that have read nothing.

    Args:
        byte_lm: the entropy model, where the patching mode needs one.
        numbers: of the KV caches; the open patch and the newest one are always full.
    """
    like = next(model.parameters())
    zeros = torch.zeros(num_slots, dtype=torch.long, device=like.device)
    longest = 2  # ids that deciding about patches needs
    if isinstance(model, BLTModel) and model.settings.ngram_hash is not None:
        longest = max(longest, *model.settings.ngram_hash.sizes)
    since, num_patches, open_count, begin = (zeros.clone() for _ in range(4))
    counts = (zeros, zeros[:, None].repeat(1, longest), zeros.float(), since, num_patches, open_count, begin)
    if isinstance(model, LanguageModel):
        return DecodeState(*counts, KVCache.empty(model.settings, num_slots, like, numbers))
    settings, cross = model.settings, model.settings.cross_attention
    dim = settings.encoder.dim
    if cross is None:  # the states themselves, in place of keys, and no values
        open_k, patch_k = like.new_zeros(1, num_slots, BLOCK, 1, dim), like.new_zeros(1, num_slots, 1, 1, dim)
    else:
        heads = cross.num_heads, dim // cross.num_heads
        open_k = like.new_zeros(len(model.encoder.cross_attention), num_slots, BLOCK, *heads)
        patch_k = like.new_zeros(len(model.decoder.cross_attention), num_slots, cross.k, *heads)
    values = slice(0, None if cross is not None else 0)
    lm = None if byte_lm is None else (byte_lm.settings, num_slots, next(byte_lm.parameters()), numbers)
    return BLTDecodeState(
        *counts,
        byte_lm=None if lm is None else KVCache.empty(*lm),
        encoder=KVCache.empty(settings.encoder, num_slots, like, numbers),
        decoder=KVCache.empty(settings.decoder, num_slots, like, numbers),
        patches=KVCache.empty(settings.global_transformer, num_slots, like, numbers),
        open_k=open_k,
        open_v=torch.zeros_like(open_k[..., values]),
        open_max=like.new_zeros(num_slots, dim),
        patch_k=patch_k,
        patch_v=torch.zeros_like(patch_k[..., values]),
    )


def _in_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
