"""What the rows of a captured step remember, and how much there is room for."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.decoder import Decoder
from bytelatent.inference.state import BLOCK, SLACK, DecodeState, KeyValues
from bytelatent.model import BLTModel

# Shapes: B rows, D local width, L bytes an open patch may have, X and Y encoder's and decoder's cross-attentions,
# K keys a patch, H heads, E head size


@dataclass(frozen=True)
class Room:
    """What there is room for in a row."""

    positions: int = BLOCK
    patches: int = BLOCK
    open_bytes: int = BLOCK


@dataclass
class FastState:
    """What the rows remember: as `DecodeState`, but only what is newest, since nothing is taken back."""

    position: Tensor  # [B] ids read
    tail: Tensor  # [B, W] the newest ids, the last one last
    previous_entropy: Tensor  # [B] nats
    since_start: Tensor  # [B]
    byte_lm: KeyValues | None
    encoder: KeyValues | None
    decoder: KeyValues | None
    patches: KeyValues | None
    num_patches: Tensor  # [B] closed
    open_count: Tensor  # [B] bytes of the open patch
    open_k: Tensor | None  # [X, B, L, H, E]
    open_v: Tensor | None
    open_max: Tensor | None  # [B, D]
    patch_k: Tensor | None  # [Y, B, K, H, E] of the patch that each row reads
    patch_v: Tensor | None
    encoded: Tensor | None  # [B, D] the encoder's state of the newest byte

    @classmethod
    def empty(cls, decoder: Decoder, num_rows: int, open_bytes: int = BLOCK) -> "FastState":
        like = decoder.empty(num_rows)
        zeros = torch.zeros(num_rows, dtype=torch.long, device=decoder.device)
        open_k = open_v = open_max = patch_k = patch_v = encoded = None
        if isinstance(decoder.model, BLTModel):
            assert like.open_bytes is not None
            assert like.patch_keys is not None
            layers, _, _, heads, size = like.open_bytes.k.shape
            open_k, open_v = (like.open_bytes.k.new_zeros(layers, num_rows, open_bytes, heads, size) for _ in "kv")
            open_max, encoded = (like.open_bytes.h.new_zeros(num_rows, like.open_bytes.h.shape[2]) for _ in "mx")
            layers, _, _, keys, heads, size = like.patch_keys.k.shape
            patch_k, patch_v = (like.patch_keys.k.new_zeros(layers, num_rows, keys, heads, size) for _ in "kv")
        return cls(
            zeros.clone(),
            zeros[:, None].repeat(1, max(decoder.tail, 2)),  # `decide` asks for two
            zeros.float(),
            zeros.clone(),
            like.byte_lm,
            like.encoder,
            like.decoder,
            like.patches,
            zeros.clone(),
            zeros.clone(),
            open_k,
            open_v,
            open_max,
            patch_k,
            patch_v,
            encoded,
        )

    def make_room(self, room: Room) -> None:
        for cache in (self.byte_lm, self.encoder, self.decoder):
            if cache is not None:
                cache.make_room(room.positions)
        if self.patches is not None:
            self.patches.make_room(room.patches)
        if self.open_k is not None and self.open_v is not None:
            more = (0, 0, 0, 0, 0, room.open_bytes - self.open_k.shape[2])
            self.open_k, self.open_v = F.pad(self.open_k, more), F.pad(self.open_v, more)

    def put(self, row: int, other: DecodeState, source: int) -> None:
        """Take over a row of another state; tables must have room for it."""
        at = int(other.position[source])
        here, position = torch.tensor([source], device=self.position.device), other.position[source : source + 1]
        history = other.history
        back = torch.arange(-self.tail.shape[1], 0, device=self.position.device)
        self.position[row] = at
        self.tail[row] = history.ids[source, (at + back) % history.ids.shape[1]]
        self.previous_entropy[row] = other.last(history.entropies, here, position)[0]
        self.since_start[row] = other.last(history.since_start, here, position)[0]
        for mine, theirs in (
            (self.byte_lm, other.byte_lm),
            (self.encoder, other.encoder),
            (self.decoder, other.decoder),
            (self.patches, other.patches),
        ):
            if mine is not None and theirs is not None:
                size = min(mine.size, theirs.size)
                mine.k[:, row, :size], mine.v[:, row, :size] = theirs.k[:, source, :size], theirs.v[:, source, :size]
        if other.open_bytes is None or other.patch_keys is None:
            return
        assert self.open_k is not None
        assert self.open_v is not None
        assert self.open_max is not None
        assert self.patch_k is not None
        assert self.patch_v is not None
        num_patches = int(other.last(history.num_patches, here, position))
        begin = int(other.last(history.patch_start, here, position))
        self.num_patches[row], self.open_count[row] = num_patches, at - begin
        ring, slot = other.open_bytes, torch.arange(begin, at, device=self.position.device) % other.open_bytes.size
        if at > begin:
            self.open_k[:, row, : at - begin], self.open_v[:, row, : at - begin] = (
                ring.k[:, source, slot],
                ring.v[:, source, slot],
            )
            self.open_max[row] = ring.h[source, slot].amax(0)
        newest = (num_patches - 1) % SLACK
        self.patch_k[:, row], self.patch_v[:, row] = (
            other.patch_keys.k[:, source, newest],
            other.patch_keys.v[:, source, newest],
        )
