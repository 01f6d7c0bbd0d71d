"""Attention of new positions of slots over their KV caches, in plain PyTorch, and the storing of whole prompts.

With a KV cache in 8 bits all of it attends to keys and values as the cache holds them, new ones too. So what a position
sees does not depend on which positions were read together with it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.kv_cache import KVCache
from bytelatent.model.attention import Mask

# Shapes: T new positions, N of the slots have any of them, Q of them in the slot that has most, L layers, B slots, R
# positions in a KV cache, S of them that are attended to, J key/value heads, H heads, E head size


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
        new, cache, layer = self.new, self.cache, self.cache.layers[self.layer]
        held = cache.as_held(k_TJE, v_TJE)
        before = cache.numbers([table[new.slot, : self.num_seen] for table in layer], k_TJE.dtype)
        seen = [
            torch.cat([old, new.padded(x_TJE)], dim=1).transpose(1, 2)
            for old, x_TJE in zip(before, cache.numbers(held, k_TJE.dtype), strict=True)
        ]
        if self.store:
            for table, x_TJ in zip(layer, held, strict=True):
                table[self.target] = x_TJ[self.stored]
        self.layer += 1
        q = new.padded(q_THE).transpose(1, 2)
        grouped = q_THE.shape[1] != k_TJE.shape[1]
        out = F.scaled_dot_product_attention(q, *seen, attn_mask=self.seen_N1QK, enable_gqa=grouped)
        return new.unpadded(out.transpose(1, 2))


class StoreNewest:
    """Stores the newest keys and values of whole sequences in a KV cache, layer by layer.

    They are copied as slices, on a GPU as indices where there are many: each slice is work for the host, which takes
    longer there than the copy.

    Attributes:
        most_slices: by type of device; elsewhere any.
    """

    most_slices: ClassVar[dict[str, int]] = {"cuda": 4}

    def __init__(self, cache: KVCache, new: NewPositions):
        slots, counts = new.slot.tolist(), new.count.tolist()
        cache.reserve(max(counts, default=0))
        self.cache, self.layer = cache, 0
        slices: list[tuple[int, slice, slice]] = []  # slot, in the stream, in the cache
        begin = 0
        newest = [True] * len(slots) if new.is_newest_run is None else new.is_newest_run.tolist()
        for slot, count, is_newest_run in zip(slots, counts, newest, strict=True):
            at = max(count - cache.size, 0) if is_newest_run else count
            while at < count:
                index = at % cache.size
                size = min(count - at, cache.size - index)
                slices.append((slot, slice(begin + at, begin + at + size), slice(index, index + size)))
                at += size
            begin += count
        self.parts: list[tuple[Any, Any, Any]] = list(slices)
        if len(slices) > self.most_slices.get(cache.k.device.type, len(slices)):
            sizes = [source.stop - source.start for _, source, _ in slices]
            arrays = (
                np.repeat([slot for slot, _, _ in slices], sizes),
                np.concatenate([np.arange(source.start, source.stop) for _, source, _ in slices]),
                np.concatenate([np.arange(target.start, target.stop) for _, _, target in slices]),
            )
            slot_M, source_M, target_M = torch.from_numpy(np.stack(arrays)).to(cache.k.device)
            self.parts = [(slot_M, source_M, target_M)]

    def __call__(self, k_TJE: Tensor, v_TJE: Tensor) -> None:
        for table, x_TJ in zip(self.cache.layers[self.layer], self.cache.as_held(k_TJE, v_TJE), strict=True):
            for slot, source, target in self.parts:
                table[slot, target] = x_TJ[source]
        self.layer += 1

    def all_layers(self, k_LTJE: Tensor, v_LTJE: Tensor) -> None:
        """The keys and values of all L layers at once."""
        for table, x_LTJ in zip(self.cache.tables, self.cache.as_held(k_LTJE, v_LTJE), strict=True):
            for slot, source, target in self.parts:
                table[:, slot, target] = x_LTJ[:, source]


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
        cache = self.store.cache
        k_TJE, v_TJE = cache.numbers(cache.as_held(k_TJE, v_TJE), k_TJE.dtype)
        self.store(k_TJE, v_TJE)
        return self.mask.attend(q_THE, k_TJE, v_TJE)
