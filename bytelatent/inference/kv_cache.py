"""How a layer's attention sees positions while decoding: it keeps keys and values, and looks at those kept before.

Each is handed to the model in place of a mask (`bytelatent.model.attention.Look`), and called once a layer, in order.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.state import SLACK, KeyValues, PatchKeys
from bytelatent.model.attention import Mask, attend

# Shapes: T entries (a row and a position each), B rows that they are of, Q of them in the row that has most, H heads,
# J key/value heads, E head size, R slots of a cache, S of them that may be seen, K = S + Q (of patches: keys of each),
# P patches


class Runs:
    """New positions of some rows, in runs: each run follows what its row has read.

    Several runs of a row know nothing of one another. The runs of a row stand together, and its row's positions are
    also laid out as [B, Q]: B rows that have any, Q positions at most, the rest filling up.

    Args:
        rows, position: [T] the row and the position of each; positions of a run follow one another.

    Attributes:
        turn: [T] which of its run's positions each one is.
        row: [B]
        num_read: [B] what each row has read before.
    """

    def __init__(self, rows: Tensor, position: Tensor):
        order = torch.arange(len(rows), device=rows.device)
        is_first, one = rows[1:] != rows[:-1], torch.ones_like(rows[:1], dtype=torch.bool)
        begins_row = torch.cat([one, is_first])
        begins_run = torch.cat([one, is_first | (position[1:] != position[:-1] + 1)])
        self.rows, self.position = rows, position
        self.begin = torch.where(begins_run, order, 0).cummax(0).values  # the place where each one's run begins
        self.turn = order - self.begin
        self._begins_row = begins_row

    @cached_property
    def _heads(self) -> Tensor:
        return self._begins_row.nonzero()[:, 0]

    @cached_property
    def line(self) -> Tensor:
        """[T] which of `row` each position belongs to."""
        return self._begins_row.cumsum(0) - 1

    @cached_property
    def row(self) -> Tensor:
        return self.rows[self._heads]

    @cached_property
    def num_read(self) -> Tensor:
        return self.position[self._heads]

    @cached_property
    def _number(self) -> Tensor:
        """[T] which of its row's positions each one is."""
        return torch.arange(len(self.rows), device=self.rows.device) - self._heads[self.line]

    @cached_property
    def _counts(self) -> Tensor:
        """[B] how many positions each row has."""
        return torch.bincount(self.line, minlength=1)

    @cached_property
    def size(self) -> int:
        """Q"""
        return int(self._counts.max())

    @cached_property
    def _place(self) -> Tensor | None:
        """[T] where each position lies in B * Q, where others fill up."""
        is_full = len(self.rows) == len(self.row) * self.size
        return None if is_full else self.line * self.size + self._number

    @cached_property
    def end(self) -> int:
        """More than any position."""
        return int(self.position.max()) + 1

    @cached_property
    def seen(self) -> Tensor:
        """[B, Q, Q] what each position sees of the others: its own run up to itself."""
        run_BQ, at_BQ = self.laid_out(self.begin, -1), self.laid_out(self.position)
        return (run_BQ[:, :, None] == run_BQ[:, None, :]) & (at_BQ[:, :, None] >= at_BQ[:, None, :])

    def laid_out(self, values: Tensor, fill: int = 0) -> Tensor:
        """[T, ...] -> [B, Q, ...]"""
        if self._place is not None:
            padded = values.new_full((len(self.row) * self.size, *values.shape[1:]), fill)
            padded[self._place] = values
            values = padded
        return values.unflatten(0, (len(self.row), self.size))

    def in_order(self, laid_out: Tensor) -> Tensor:
        """[B, Q, ...] -> [T, ...]"""
        values = laid_out.flatten(0, 1)
        return values if self._place is None else values[self._place]

    def newest(self, count: int) -> Tensor | slice:
        """The places of each row's newest positions, so many of them."""
        if self.size <= count:
            return slice(None)
        after = self._counts[self.line] - self._number  # itself and those that follow it in its row
        return (after <= count).nonzero()[:, 0]


class Cached:
    """New positions, which see what their rows' cache holds and what precedes them in their runs.

    Args:
        cache: of all rows.
        runs: the new positions.
        keep: whether the cache takes them; then each row has one run.
    """

    def __init__(self, cache: KeyValues, runs: Runs, keep: bool = True):
        self.cache, self.runs, self.keep, self.layer = cache, runs, keep, 0
        if keep:
            cache.make_room(runs.end)
            self.kept = runs.newest(cache.size)
            self.slots = (runs.rows[self.kept], runs.position[self.kept] % cache.size)
        self.num_slots = min(int(runs.num_read.max()), cache.size)
        # A slot holds the newest position that fell on it.
        newest_B1 = (runs.num_read - 1)[:, None]
        held_BS = newest_B1 - (newest_B1 - torch.arange(self.num_slots, device=newest_B1.device)) % cache.size
        seen_BQS = (held_BS >= 0)[:, None, :].expand(-1, runs.size, -1)
        seen_BQQ = runs.seen
        if cache.window is not None:
            at_BQ1 = runs.laid_out(runs.position)[:, :, None]
            seen_BQS = seen_BQS & (held_BS[:, None, :] > at_BQ1 - cache.window)
            seen_BQQ = seen_BQQ & (at_BQ1.mT > at_BQ1 - cache.window)
        self.seen_B1QK = torch.cat([seen_BQS, seen_BQQ], dim=-1)[:, None]

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        runs, layer = self.runs, self.layer
        self.layer += 1
        seen = []
        for new, kept_BRJE in ((k_TJE, self.cache.k[layer]), (v_TJE, self.cache.v[layer])):
            new = new.to(kept_BRJE.dtype)
            before = kept_BRJE[runs.row, : self.num_slots]
            seen.append(torch.cat([before, runs.laid_out(new)], dim=1).transpose(1, 2))
            if self.keep:
                kept_BRJE[self.slots] = new[self.kept]
        q = runs.laid_out(q_THE).transpose(1, 2)
        grouped = q_THE.shape[1] != k_TJE.shape[1]
        out = F.scaled_dot_product_attention(q, *seen, attn_mask=self.seen_B1QK, enable_gqa=grouped)
        return runs.in_order(out.transpose(1, 2))


class Keep:
    """Which keys and values of a stream a cache takes, layer by layer.

    They are the newest of each row, one after another in the stream, so they are copied as slices: that is less work
    for the host, and for the device, than indices.

    Args:
        begin: the place in the stream of each row's first one.
        position: its position.
        count: how many there are in each row.
    """

    def __init__(self, cache: KeyValues, begin: list[int], position: list[int], count: list[int]):
        self.cache, self.layer = cache, 0
        self.runs: list[tuple[int, slice, slice]] = []  # row, places, slots
        for row, (place, first, left) in enumerate(zip(begin, position, count, strict=True)):
            while left > 0:
                slot = first % cache.size
                size = min(left, cache.size - slot)
                self.runs.append((row, slice(place, place + size), slice(slot, slot + size)))
                place, first, left = place + size, first + size, left - size

    def __call__(self, k_TJE: Tensor, v_TJE: Tensor) -> None:
        k_BRJE, v_BRJE = self.cache.k[self.layer], self.cache.v[self.layer]
        for row, places, slots in self.runs:
            k_BRJE[row, slots] = k_TJE[places]
            v_BRJE[row, slots] = v_TJE[places]
        self.layer += 1

    def layers(self, k_LTJE: Tensor, v_LTJE: Tensor) -> None:
        """Those of all L layers at once."""
        for row, places, slots in self.runs:
            self.cache.k[:, row, slots] = k_LTJE[:, places]
            self.cache.v[:, row, slots] = v_LTJE[:, places]


class KeepPatchKeys:
    """What the decoder's cross-attentions see of patches, kept for the newest ones of each row, layer by layer.

    Args:
        row, number: [N] of the patches that are kept, at most SLACK of a row.
        place: [N] which of all patches they are.
    """

    def __init__(self, kept: PatchKeys, row: Tensor, number: Tensor, place: Tensor | slice):
        self.kept, self.slot, self.place = kept, (row, number % SLACK), place

    def __call__(self, layer: int, k_PKHE: Tensor, v_PKHE: Tensor) -> None:
        for kept, new in ((self.kept.k[layer], k_PKHE), (self.kept.v[layer], v_PKHE)):
            kept[self.slot] = new[self.place].to(kept.dtype)


@dataclass
class EachAlone:
    """The documents of a stream one after another, without a window or a mask: each costs what it costs alone.

    Attributes:
        sizes: positions of each document, in order.
    """

    sizes: list[int]

    @classmethod
    def of(cls, document: Tensor) -> "EachAlone":
        """Of a stream's [T] documents."""
        return cls(document.unique_consecutive(return_counts=True)[1].tolist())

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        grouped, found = q_THE.shape[1] != k_TJE.shape[1], []
        for parts in zip(*(x.split(self.sizes) for x in (q_THE, k_TJE, v_TJE)), strict=True):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in parts)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
            found.append(out[0].transpose(0, 1))
        return torch.cat(found)


@dataclass
class Kept:
    """Whole rows at once under a mask, the keys and values of some positions kept."""

    mask: Mask
    keep: Keep

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        self.keep(k_TJE, v_TJE)
        return attend(q_THE, k_TJE, v_TJE, self.mask)
