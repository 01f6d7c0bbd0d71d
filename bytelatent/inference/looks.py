"""How a layer's attention sees positions while decoding: it keeps keys and values, and looks at those kept before.

Each is handed to the model in place of a mask (`bytelatent.model.attention.Look`), and called once a layer, in order.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.state import KeyValues
from bytelatent.model.attention import Mask, attend

# Shapes: T entries (a row and a position each), H heads, J key/value heads, E head size, R slots of a cache


class Cached:
    """New positions of some rows, which see what their rows' cache holds up to them.

    Args:
        cache: takes the new keys and values.
        rows: [T] the cache's row of each entry.
        position: [T] its position; new positions of a row follow one another.
        newest: the highest position of all.
    """

    def __init__(self, cache: KeyValues, rows: Tensor, position: Tensor, newest: int):
        self.cache, self.rows, self.layer = cache, rows, 0
        self.slot = position % cache.size
        num_slots = min(newest + 1, cache.size)
        slots = torch.arange(num_slots, device=rows.device)
        # A slot holds the newest position that fell on it; those of the row's later entries are written, too.
        last = torch.zeros(int(rows.max()) + 1, dtype=position.dtype, device=rows.device)
        last = last.scatter_reduce(0, rows, position, "amax")[rows][:, None]
        held = last - (last - slots) % cache.size
        seen = (held >= 0) & (held <= position[:, None])
        if cache.window is not None:
            seen &= held > position[:, None] - cache.window
        self.seen_T1R, self.num_slots = seen[:, None, None, :], num_slots

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        k_BRJE, v_BRJE = self.cache.k[self.layer], self.cache.v[self.layer]
        k_BRJE[self.rows, self.slot] = k_TJE.to(k_BRJE.dtype)
        v_BRJE[self.rows, self.slot] = v_TJE.to(v_BRJE.dtype)
        self.layer += 1
        k, v = (kept[self.rows, : self.num_slots].transpose(1, 2) for kept in (k_BRJE, v_BRJE))
        q = q_THE[:, :, None]
        grouped = q_THE.shape[1] != k_TJE.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen_T1R, enable_gqa=grouped)[:, :, 0]


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


@dataclass
class Kept:
    """Whole rows at once under a mask, the keys and values of some positions kept."""

    mask: Mask
    keep: Keep

    def attend(self, q_THE: Tensor, k_TJE: Tensor, v_TJE: Tensor) -> Tensor:
        self.keep(k_TJE, v_TJE)
        return attend(q_THE, k_TJE, v_TJE, self.mask)
