"""Several bytes of every row a step: the local models draft them, the whole model verifies the draft in one pass.

Encoder and decoder are a tenth of the model. They draft past the border of a patch with what the newest closed one told
them; then the byte LM reads the draft at once, the global transformer runs for all patches that close in it at once,
and the decoder reads it again, with the patches that each byte should have seen.

Every byte is drawn by the random number of its place in the text, drafted or not. So a drafted byte is right where the
model's logits would have drawn the same; the bytes are those of plain decoding, with any settings of sampling. What a
row read beyond its last right byte is rewritten by the next step, as are caches; nothing else is changed before the
draft is verified.

Source: arXiv 2605.08044 for drafts by the local models; drawing twice by one number is this project's.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import SLACK, BLTState, Room
from bytelatent.inference.step.decisions import Flags, append, choose, decide, draw, store_patch
from bytelatent.inference.step.step import BLTStep
from bytelatent.kernels.decode_cross_attention import append_patch_byte
from bytelatent.vocab import VOCAB_SIZE

# Shapes: B rows, S bytes a step, N patches of a row that may close in a step, D local width, V vocabulary

LONGEST = SLACK  # bytes a step: as many can be taken back
# What `append` and `decide` write of BLTState
SCALARS = ("position", "tail", "previous_entropy", "since_start", "open_count")
DRAWING = ("drawn", "seen", "utf8", "remaining")  # of SamplingSlots, what drawing writes


@dataclass
class _Patches:
    """The patches that close in a draft."""

    upto_SB: Tensor  # how many close in each row up to a byte, the byte included
    exists_BN: Tensor  # bool
    begin_BN: Tensor  # where the bytes of each begin among the open ones and those of the draft
    count_BN: Tensor  # how many they are


class DraftedStep(BLTStep):
    """A step of up to `size` bytes.

    Args:
        size: bytes a step, 2 to LONGEST: one that is drawn for sure, and a draft.
        patches: that may close in a row in a step. A row goes no further than the byte before one more would close.
    """

    def __init__(self, decoder: Decoder, num_rows: int, size: int, patches: int | None = None):
        assert 2 <= size <= LONGEST, f"{size} bytes a step"
        super().__init__(decoder, num_rows, num_rows)
        self.size, self.most = size, min(patches or size, size)
        empty = [Flags.empty(num_rows, num_rows, decoder.device) for _ in range(2 * size - 2)]
        self.right = [self.flags, *empty[: size - 1]]  # what is drawn by the whole model
        self.draft = [self.flags, *empty[size - 1 :]]  # what is drawn by the local ones; the first byte is sure
        for flags in self.right:
            flags.is_active, flags.is_waiting = self.flags.is_active, self.flags.is_waiting
        for flags in self.draft[2:]:
            flags.is_active = self.draft[1].is_active
        self.sampling_ahead = replace(self.sampling, **{name: getattr(self.sampling, name).clone() for name in DRAWING})
        self.ahead = self._state_ahead()  # as if the draft were right
        self.draft_logits_BV = torch.zeros_like(self.logits_BV)
        shape = self.state.patch_k.shape
        self.patch_k, self.patch_v = (  # those that bytes of a draft may read: the row's own, then the N that close
            self.state.patch_k.new_zeros(shape[0], num_rows, 1 + self.most, *shape[2:]) for _ in "kv"
        )

    def reserve(self, room: Room) -> None:
        super().reserve(room)
        self.ahead = self._state_ahead()

    def outcome(self) -> tuple[Tensor, Tensor]:
        return (
            torch.stack([flags.drawn for flags in self.right]),
            torch.stack([flags.log_probability for flags in self.right]),
        )

    @torch.no_grad()
    def __call__(self) -> None:
        """One step; rows do not wait."""
        state = self.state
        draw(self.logits_BV, self.sampling, state.position, self.flags)
        encoded, kept = self._draft()
        reads_SB = torch.stack([flags.reads for flags in self.draft])
        ids_BS = torch.stack([flags.ids for flags in self.draft], dim=1)
        lm_logits_SBV = self._read_byte_lm(ids_BS.flatten(), self.flags.at, self.flags.row, self.size)
        if lm_logits_SBV is None:
            lm_logits_SBV = [None] * self.size
        else:
            lm_logits_SBV = lm_logits_SBV.unflatten(0, (-1, self.size)).transpose(0, 1).contiguous()
        patches = self._lay_out(lm_logits_SBV, reads_SB)
        self._close_all(patches, torch.stack([of[0] for of in kept], dim=1), reads_SB)
        logits_BSV = self._read_again(torch.stack(encoded, dim=1), patches, reads_SB)
        self._verify(patches, logits_BSV)
        self._read_what_is_right(lm_logits_SBV, kept, logits_BSV)

    def _draft(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Let the local models read and draw; the encoder's states, and what open patches would take, of each byte."""
        state, ahead = self.state, self.ahead
        self._go_back()
        for name in DRAWING:
            getattr(self.sampling_ahead, name).copy_(getattr(self.sampling, name))
        self.draft[1].is_active.copy_(self.flags.reads)
        patch = state.patch_k, state.patch_v
        encoded, kept = [], []
        for number, flags in enumerate(self.draft):
            if number > 0:
                draw(self.draft_logits_BV, self.sampling_ahead, ahead.position, flags)
            append(ahead, flags)
            kept.append([])
            encoded.append(self._encode(ahead, flags, kept[-1]))
            if number < self.size - 1:
                x_BD = encoded[-1].clone()
                self._decode(x_BD, flags.at, flags.row, patch, flags.row, flags.reads_patch, self.draft_logits_BV)
        return encoded, kept

    def _lay_out(self, lm_logits_SBV: Any, reads_SB: Tensor) -> _Patches:
        """Decide where patches close if the draft is right."""
        self._go_back()
        for flags, lm_logits_BV in zip(self.draft, lm_logits_SBV, strict=True):
            append(self.ahead, flags)
            decide(lm_logits_BV, self.patching, self.ahead, flags)
        closes_SB = torch.stack([flags.wants for flags in self.draft]) & reads_SB
        upto_SB, most = closes_SB.cumsum(0), self.most
        # Where each patch ends, [B, 1 + N + 1]: first nothing, last what is more than there is room for.
        place_SB = torch.where(closes_SB, upto_SB, most + 1).clamp(max=most + 1)
        size_SB = torch.stack([flags.count for flags in self.draft]) + 1
        end = torch.zeros_like(upto_SB[0])[:, None].repeat(1, most + 2).scatter(1, place_SB.T, size_SB.T)
        begin_BN, end_BN = end[:, :most], end[:, 1 : most + 1]
        exists_BN = end_BN > 0
        return _Patches(upto_SB, exists_BN, begin_BN, torch.where(exists_BN, end_BN - begin_BN, 0))

    def _close_all(self, patches: _Patches, h_BSD: Tensor, reads_SB: Tensor) -> None:
        """Run the global transformer for all of them, and let the decoder read them."""
        state, most = self.state, self.most
        row_B = torch.arange(len(h_BSD), device=h_BSD.device)
        every_N = torch.arange(most, device=h_BSD.device)
        before_BS = (patches.upto_SB - torch.stack([flags.wants for flags in self.draft]).long()).T
        is_of_BNS = (before_BS[:, None] == every_N[:, None]) & reads_SB.T[:, None]
        pooled_BND = h_BSD[:, None].masked_fill(~is_of_BNS[..., None], -torch.inf).amax(2)
        begun_BN = (state.open_count > 0)[:, None] & (every_N == 0)
        pooled_BND = torch.where(begun_BN[..., None], pooled_BND.maximum(state.open_max[:, None]), pooled_BND)
        pooled_BND = pooled_BND.masked_fill(~patches.exists_BN[..., None], 0)  # no patch may be no number
        bytes_of = {
            "count_C": patches.count_BN.flatten(),
            "begin_C": patches.begin_BN.flatten(),
            "row_C": row_B.repeat_interleave(most, output_size=len(row_B) * most),
        }
        run = patches.exists_BN.any().int()[None]
        row = torch.where(patches.exists_BN[:, 0], row_B, -1)
        place_BN = torch.where(patches.exists_BN, row_B[:, None] * (1 + most) + 1 + every_N, -1)
        self.patch_k[:, :, 0], self.patch_v[:, :, 0] = state.patch_k, state.patch_v
        if not run.is_cuda and not bool(run):  # a CPU may as well look
            return
        kv = self._patches(pooled_BND.flatten(0, 1), bytes_of, state.num_patches, row, run, most)
        tables = self.patch_k.flatten(1, 2), self.patch_v.flatten(1, 2)
        store_patch(kv, *tables, place_BN.flatten())

    def _read_again(self, encoded_BSD: Tensor, patches: _Patches, reads_SB: Tensor) -> Tensor:
        """The logits of what follows each byte of the draft, [B, S, V]."""
        rows, most = len(encoded_BSD), self.most
        upto_BS, reads_BS = patches.upto_SB.T, reads_SB.T
        first = torch.arange(rows, device=upto_BS.device)[:, None] * (1 + most)
        patch_row = (first + upto_BS.clamp(max=most)).flatten()
        reads_patch = ((self.state.num_patches[:, None] + upto_BS > 0) & reads_BS).flatten()
        x_BSD = encoded_BSD.masked_fill(~reads_BS[..., None], 0)  # what is not read may be anything
        tables = self.patch_k.flatten(1, 2), self.patch_v.flatten(1, 2)
        logits = self.logits_BV.new_empty(rows * self.size, VOCAB_SIZE)
        at, row = self.flags.at, self.flags.row
        self._decode(x_BSD.flatten(0, 1), at, row, tables, patch_row, reads_patch, logits, self.size)
        return logits.unflatten(0, (rows, self.size))

    def _verify(self, patches: _Patches, logits_BSV: Tensor) -> None:
        """Draw as long as it is what was drafted, and no more patches close than there was room for."""
        drawn_SB = torch.stack([flags.drawn for flags in self.draft])
        expected_SB = torch.where(patches.upto_SB <= self.most, drawn_SB, -1)
        logits_SBV = logits_BSV.transpose(0, 1).contiguous()
        for number in range(1, self.size):
            logits_BV, expected_B = logits_SBV[number - 1], expected_SB[number]
            draw(logits_BV, self.sampling, self.state.position, self.right[number], expected_B)
        self.flags.is_waiting.zero_()  # those that drew another one: they draw it in the next step

    def _read_what_is_right(self, lm_logits_SBV: Any, kept: list[list[Tensor]], logits_BSV: Tensor) -> None:
        """Remember the bytes that are right, as a plain step does."""
        state = self.state
        position, num_patches = state.position.clone(), state.num_patches.clone()
        for flags, lm_logits_BV, (h_BD, *kvs) in zip(self.right, lm_logits_SBV, kept, strict=True):
            append(state, flags)
            decide(lm_logits_BV, self.patching, state, flags)
            for layer, kv in enumerate(kvs):
                pooled = {"h_BD": h_BD, "pooled_BD": state.open_max} if layer == 0 else {}
                append_patch_byte(kv, state.open_k[layer], state.open_v[layer], flags.count, **pooled)
            choose(state, flags, 0.0, decoded=False)
        row_B = torch.arange(len(position), device=position.device)
        newest = state.num_patches - num_patches
        for of_row, table in ((state.patch_k, self.patch_k), (state.patch_v, self.patch_v)):
            of_row.copy_(table[:, row_B, newest])
        last = state.position - position - 1
        self.logits_BV.copy_(torch.where((last >= 0)[:, None], logits_BSV[row_B, last.clamp(min=0)], self.logits_BV))

    def _state_ahead(self) -> BLTState:
        """The state with the rows' tables, and numbers of its own."""
        own = (*SCALARS, "open_max")
        return replace(self.state, **{name: getattr(self.state, name).clone() for name in own})

    def _go_back(self) -> None:
        """Let what is ahead begin where the rows are."""
        for name in SCALARS:
            getattr(self.ahead, name).copy_(getattr(self.state, name))
