"""What decoding remembers: for each row (a sequence) all that its next byte depends on.

Everything is kept by position, in rings or in growing tables, and read relative to `position`. So to take bytes back,
as after a draft that was wrong, is to lower `position`: what lies beyond it is never looked at and is written anew.

                 ids -> byte LM ------------> entropies -> patch starts
                  |      [ring of keys]                        |
                  +---> encoder -> open bytes --patch closes--> global transformer -> patch keys
                  |      [ring]     [ring]                       [growing]              [ring]
                  +---------------------------> decoder <--------------------------------+
                                                 [ring] -> logits
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from bytelatent.model import BLTModel, BLTSettings, ByteLM
from bytelatent.model.settings import StackSettings
from bytelatent.patching import Tail

# Shapes: B rows, L layers, R positions in a ring, J key/value heads, E head size, C patches that there is room for,
# M bytes of open patches that there is room for, X and Y encoder's and decoder's cross-attentions, K keys a patch

SLACK = 16  # positions more than a window, so that as many can be taken back
BLOCK = 256  # positions, patches, bytes by which tables grow
TABLES = ("byte_lm", "encoder", "decoder", "patches")
HISTORY = 64  # positions whose ids and patches are remembered; more than the longest n-gram and SLACK together


@dataclass
class KeyValues:
    """Keys and values by position: position p at slot p % R."""

    k: Tensor  # [L, B, R, J, E]
    v: Tensor  # [L, B, R, J, E]
    window: int | None  # positions seen, the own one included; None: all, and R grows

    def __post_init__(self) -> None:
        self.layers = list(zip(self.k.unbind(), self.v.unbind(), strict=True))  # the same by layer

    @classmethod
    def empty(cls, stack: StackSettings, num_rows: int, like: Tensor) -> "KeyValues":
        size = BLOCK if stack.window is None else stack.window + SLACK
        shape = (stack.num_layers, num_rows, size, stack.kv_heads, stack.head_dim)
        return cls(like.new_zeros(shape), like.new_zeros(shape), stack.window)

    @property
    def size(self) -> int:
        return self.k.shape[2]

    def make_room(self, positions: int) -> None:
        """Let there be room for so many positions, where there is no window."""
        if self.window is None and positions > self.size:
            more = -(-positions // BLOCK) * BLOCK - self.size
            self.k, self.v = _longer(self.k, more), _longer(self.v, more)
            self.__post_init__()


@dataclass
class OpenBytes:
    """The encoder's states of the newest bytes, from which a patch's state is made once it closes; in a ring."""

    h: Tensor  # [B, M, D] after the first layer that patches look at
    k: Tensor  # [X, B, M, H, E]
    v: Tensor  # [X, B, M, H, E]

    @property
    def size(self) -> int:
        return self.h.shape[1]

    def make_room(self, num_bytes: int, position: Tensor) -> None:
        """Let there be room for an open patch of so many bytes, in rows that have read `position` [B] ids."""
        while num_bytes > self.size:
            old = torch.arange(self.size, device=position.device)
            newest = (position - 1).clamp(min=0)[:, None]
            held = newest - (newest - old) % self.size  # [B, M] the position whose state each slot holds
            slot, row = held % (2 * self.size), torch.arange(len(position), device=position.device)[:, None]
            for name in ("h", "k", "v"):
                before = getattr(self, name)
                axis = 1 if name == "h" else 2
                after = torch.cat([torch.zeros_like(before)] * 2, dim=axis)
                if name == "h":
                    after[row, slot] = before
                else:
                    after[:, row, slot] = before
                setattr(self, name, after)


@dataclass
class PatchKeys:
    """Keys and values of the newest closed patches for the decoder's cross-attention: patch p at slot p % SLACK."""

    k: Tensor  # [Y, B, SLACK, K, H, E]
    v: Tensor  # [Y, B, SLACK, K, H, E]


@dataclass
class History:
    """What was known once each of the newest positions had been read: position p at slot p % HISTORY."""

    ids: Tensor  # [B, HISTORY] the id that was read
    entropies: Tensor  # [B, HISTORY] nats, about the id that follows
    since_start: Tensor  # [B, HISTORY] ids since the rule itself last started a patch
    patch_start: Tensor  # [B, HISTORY] position where the patch of the id that follows begins
    num_patches: Tensor  # [B, HISTORY] closed patches


@dataclass
class DecodeState:
    """All of it, for B rows."""

    position: Tensor  # [B] ids read
    history: History
    byte_lm: KeyValues | None  # where the rule asks the byte LM, or the byte LM itself is what decodes
    encoder: KeyValues | None  # this and the next four: of a BLT
    decoder: KeyValues | None
    patches: KeyValues | None
    open_bytes: OpenBytes | None
    patch_keys: PatchKeys | None
    tails: list[list[Tail]] = field(default_factory=list)  # of the rule `bpe`, for each row after 0, 1, ... ids

    @classmethod
    def empty(cls, model: BLTModel | ByteLM, byte_lm: ByteLM | None, num_rows: int) -> "DecodeState":
        """Rows that have read nothing."""
        some = next(model.parameters())
        zeros = torch.zeros(num_rows, dtype=torch.long, device=some.device)
        by_position = [torch.zeros(num_rows, HISTORY, dtype=torch.long, device=some.device) for _ in range(5)]
        history = History(*by_position)
        history.entropies = history.entropies.float()
        if isinstance(model, ByteLM):
            own = KeyValues.empty(model.settings, num_rows, some)
            return cls(zeros, history, own, None, None, None, None, None)
        settings = model.settings
        inner = None
        if byte_lm is not None:
            inner = KeyValues.empty(byte_lm.settings, num_rows, next(byte_lm.parameters()))
        return cls(
            zeros,
            history,
            inner,
            KeyValues.empty(settings.encoder, num_rows, some),
            KeyValues.empty(settings.decoder, num_rows, some),
            KeyValues.empty(settings.global_transformer, num_rows, some),
            _open_bytes(settings, num_rows, some),
            _patch_keys(settings, num_rows, some),
        )

    def last(self, values: Tensor, rows: Tensor, position: Tensor) -> Tensor:
        """What `values`, one of the history's, said before `position` [T] of `rows` [T]; zero at a document's start."""
        found = values[rows, (position - 1) % HISTORY]
        return torch.where(position > 0, found, torch.zeros_like(found))

    def rewind(self, row: int, position: int) -> None:
        """Take back what a row has read beyond `position`; at most SLACK ids."""
        self.position[row] = position

    def put(self, row: int, other: "DecodeState", other_row: int) -> None:
        """Copy a row of another state of the same model into this one."""
        for mine, theirs in ((getattr(self, name), getattr(other, name)) for name in TABLES):
            if mine is not None:
                mine.make_room(theirs.size)
        if self.open_bytes is not None and other.open_bytes is not None:
            self.open_bytes.make_room(other.open_bytes.size, self.position)
            other.open_bytes.make_room(self.open_bytes.size, other.position)
        _copy_row(self, row, other, other_row)
        if other.tails:
            self.tails = self.tails or [[Tail()] for _ in self.position]
            self.tails[row] = list(other.tails[other_row])


def _copy_row(mine: Any, row: int, other: Any, other_row: int) -> None:
    for part in fields(mine):
        here, there = getattr(mine, part.name), getattr(other, part.name)
        if isinstance(here, KeyValues | OpenBytes | PatchKeys | History):
            _copy_row(here, row, there, other_row)
        elif isinstance(here, Tensor):
            axis = _row_axis(mine, part.name)
            to, source = here.select(axis, row), there.select(axis, other_row)
            if source.shape != to.shape:  # tables that have grown differently
                room = tuple(slice(0, min(a, b)) for a, b in zip(to.shape, source.shape, strict=True))
                to, source = to[room], source[room]
            to.copy_(source)


def _row_axis(owner: Any, name: str) -> int:
    by_layer = isinstance(owner, KeyValues | PatchKeys) or (isinstance(owner, OpenBytes) and name != "h")
    return 1 if by_layer else 0


def _open_bytes(settings: BLTSettings, num_rows: int, like: Tensor) -> OpenBytes:
    encoder, cross = settings.encoder, settings.cross_attention
    num_layers = encoder.num_layers if cross.all_layers_encoder else 1
    shape = (num_layers, num_rows, BLOCK, cross.num_heads, encoder.dim // cross.num_heads)
    return OpenBytes(like.new_zeros(num_rows, BLOCK, encoder.dim), like.new_zeros(shape), like.new_zeros(shape))


def _patch_keys(settings: BLTSettings, num_rows: int, like: Tensor) -> PatchKeys:
    decoder, cross = settings.decoder, settings.cross_attention
    num_layers = decoder.num_layers if cross.all_layers_decoder else 1
    shape = (num_layers, num_rows, SLACK, cross.k, cross.num_heads, decoder.dim // cross.num_heads)
    return PatchKeys(like.new_zeros(shape), like.new_zeros(shape))


def _longer(values: Tensor, more: int) -> Tensor:
    """[L, B, R, J, E] with `more` slots at the end of R."""
    return torch.cat([values, values.new_zeros(*values.shape[:2], more, *values.shape[3:])], dim=2)
