"""Speculative decoding: the local models draft several bytes of each slot, the whole model verifies them in one pass.

Encoder and decoder are a tenth of the model. They draft past the end of a patch with the keys and values of the newest
closed one. Then the entropy model reads the draft at once, the global transformer runs at once for all patches that
close in it, and the decoder reads the draft again, with the patches that each byte should attend to.

Each byte is drawn by the random number of its place in the text, drafted or not. So a drafted byte is right where the
model's logits would have drawn the same one; the bytes are those of plain decoding, with any sampling settings. Cache
entries after the last right byte are overwritten by the next step; nothing else changes before the draft is verified.

A slot with a constraint draws one byte per step: the host decides what may follow it.

Source: arXiv 2605.08044 for drafts by the local models; drawing twice by one number is this project's.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import SLACK, BLTDecodeState, CacheCapacity
from bytelatent.inference.settings import MAX_DRAFT_LENGTH
from bytelatent.inference.step.patching import append, choose, decide, store_patch
from bytelatent.inference.step.sampling import StepBuffers, draw
from bytelatent.inference.step.step import BLTStep, QueryPositions
from bytelatent.kernels.decode_cross_attention import append_patch_byte
from bytelatent.vocab import VOCAB_SIZE

# Shapes: B slots, S bytes per step, N patches of a slot that may close in a step, D local width, V vocabulary

assert MAX_DRAFT_LENGTH <= SLACK, "a KV cache with a window could not take that many bytes back"
SCALARS = ("position", "tail", "previous_entropy", "since_start", "open_count")  # that `append`, `decide` write
DRAWING = ("drawn", "seen", "utf8", "remaining", "constraint")  # that `draw` writes of SamplingSlots


@dataclass
class _Patches:
    """The patches that close in a draft."""

    upto_SB: Tensor  # number that close in each slot up to a byte, the byte included
    exists_BN: Tensor  # bool
    begin_BN: Tensor  # where the bytes of each begin among the open ones and those of the draft
    count_BN: Tensor  # number of its bytes


class DraftedStep(BLTStep):
    """A step of up to `size` bytes per slot.

    Args:
        size: bytes per step, 2 or more: one that is certain, and a draft.
        max_patches: that may close in a slot in a step. A slot stops before the byte that would close one more.
    """

    def __init__(
        self,
        decoder: Decoder,
        num_slots: int,
        size: int,
        max_patches: int | None = None,
        like: BLTStep | None = None,
    ):
        super().__init__(decoder, num_slots, num_slots, like=like)
        self.size, self.max_patches = size, min(max_patches or size, size)
        empty = [StepBuffers.empty(num_slots, num_slots, decoder.device) for _ in range(2 * size - 2)]
        self.verified = [self.buffers, *empty[: size - 1]]  # what the whole model draws
        self.draft = [self.buffers, *empty[size - 1 :]]  # what the local models draw; the first byte is certain
        for buffers in self.verified:
            buffers.is_active, buffers.is_waiting = self.buffers.is_active, self.buffers.is_waiting
        for buffers in self.draft[2:]:
            buffers.is_active = self.draft[1].is_active
        self.draft_sampling = replace(self.sampling, **{name: getattr(self.sampling, name).clone() for name in DRAWING})
        self.draft_state = self._copied_state()  # as if the draft were right
        self.draft_logits_BV = torch.zeros_like(self.logits_BV)
        shape = self.state.patch_k.shape
        self.patch_k, self.patch_v = (  # that bytes of a draft may read: of the slot's newest patch, then of the N
            self.state.patch_k.new_zeros(shape[0], num_slots, 1 + self.max_patches, *shape[2:]) for _ in "kv"
        )

    def reserve(self, room: CacheCapacity) -> None:
        super().reserve(room)
        self.draft_state = self._copied_state()

    def outcome(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.stack([buffers.drawn for buffers in self.verified]),
            torch.stack([buffers.log_probability for buffers in self.verified]),
            torch.stack([buffers.starts for buffers in self.verified]),
        )

    def drawn_from(self, logits_BV: Tensor) -> Tensor:
        return torch.cat([logits_BV[None], self.drafted_logits_SBV[: self.size - 1]])

    @torch.no_grad()
    def __call__(self) -> None:
        """One step; slots do not wait."""
        draw(self.logits_BV, self.sampling, self.state.position, self.buffers)
        encoded, parts = self._draft()
        reads_SB = torch.stack([one.reads for one in self.draft])
        ids_BS = torch.stack([one.ids for one in self.draft], dim=1)
        lm_logits_SBV = self._read_byte_lm(
            ids_BS.flatten(), QueryPositions(self.buffers.at, self.buffers.slot, self.size)
        )
        if lm_logits_SBV is None:
            lm_logits_SBV = [None] * self.size
        else:
            lm_logits_SBV = lm_logits_SBV.unflatten(0, (-1, self.size)).transpose(0, 1).contiguous()
        patches = self._find_patches(lm_logits_SBV, reads_SB)
        self._close_all(patches, torch.stack([h_BD for h_BD, *_ in parts], dim=1), reads_SB)
        logits_BSV = self._read_again(torch.stack(encoded, dim=1), patches, reads_SB)
        self._verify(patches, logits_BSV)
        self._read_verified(lm_logits_SBV, parts, logits_BSV)

    def _draft(self) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Let the local models read and draw.

        Returns:
            Of each byte the encoder's states, and what it would add to the open patches.
        """
        self._reset_draft_state()
        for name in DRAWING:
            getattr(self.draft_sampling, name).copy_(getattr(self.sampling, name))
        self.draft[1].is_active.copy_(self.buffers.reads)
        patch = self.state.patch_k, self.state.patch_v
        encoded: list[Tensor] = []
        parts: list[list[Tensor]] = []
        for number, buffers in enumerate(self.draft):
            if number > 0:
                draw(self.draft_logits_BV, self.draft_sampling, self.draft_state.position, buffers)
            append(self.draft_state, buffers)
            parts.append([])
            encoded.append(self._encode(self.draft_state, buffers, parts[-1]))
            if number < self.size - 1:
                x_BD = encoded[-1].clone()
                at = QueryPositions(buffers.at, buffers.slot)
                self._decode(x_BD, at, patch, buffers.slot, buffers.reads_patch, self.draft_logits_BV)
        return encoded, parts

    def _find_patches(self, lm_logits_SBV: Any, reads_SB: Tensor) -> _Patches:
        """Decide where patches close if the draft is right."""
        self._reset_draft_state()
        for buffers, lm_logits_BV in zip(self.draft, lm_logits_SBV, strict=True):
            append(self.draft_state, buffers)
            decide(lm_logits_BV, self.patching, self.draft_state, buffers)
        closes_SB = torch.stack([buffers.wants for buffers in self.draft]) & reads_SB
        upto_SB, most = closes_SB.cumsum(0), self.max_patches
        # Where each patch ends, [B, 1 + N + 1]: first nothing, last what is more than there is room for.
        number_SB = torch.where(closes_SB, upto_SB, most + 1).clamp(max=most + 1)
        size_SB = torch.stack([buffers.count for buffers in self.draft]) + 1
        end = torch.zeros_like(upto_SB[0])[:, None].repeat(1, most + 2).scatter(1, number_SB.T, size_SB.T)
        begin_BN, end_BN = end[:, :most], end[:, 1 : most + 1]
        exists_BN = end_BN > 0
        return _Patches(upto_SB, exists_BN, begin_BN, torch.where(exists_BN, end_BN - begin_BN, 0))

    def _close_all(self, patches: _Patches, h_BSD: Tensor, reads_SB: Tensor) -> None:
        """Run the global transformer for all of them, and store the decoder's keys and values of them."""
        state, most = self.state, self.max_patches
        slot_B = torch.arange(len(h_BSD), device=h_BSD.device)
        every_N = torch.arange(most, device=h_BSD.device)
        before_BS = (patches.upto_SB - torch.stack([buffers.wants for buffers in self.draft]).long()).T
        is_of_BNS = (before_BS[:, None] == every_N[:, None]) & reads_SB.T[:, None]
        pooled_BND = h_BSD[:, None].masked_fill(~is_of_BNS[..., None], -torch.inf).amax(2)
        begun_BN = (state.open_count > 0)[:, None] & (every_N == 0)
        pooled_BND = torch.where(begun_BN[..., None], pooled_BND.maximum(state.open_max[:, None]), pooled_BND)
        pooled_BND = pooled_BND.masked_fill(~patches.exists_BN[..., None], 0)  # no patch may be no number
        bytes_of = {
            "count_C": patches.count_BN.flatten(),
            "begin_C": patches.begin_BN.flatten(),
            "row_C": slot_B.repeat_interleave(most, output_size=len(slot_B) * most),
        }
        run = patches.exists_BN.any().int()[None]
        slot = torch.where(patches.exists_BN[:, 0], slot_B, -1)
        target_BN = torch.where(patches.exists_BN, slot_B[:, None] * (1 + most) + 1 + every_N, -1)
        self.patch_k[:, :, 0], self.patch_v[:, :, 0] = state.patch_k, state.patch_v
        if not run.is_cuda and not bool(run):  # a CPU knows
            return
        kv = self._patches(pooled_BND.flatten(0, 1), bytes_of, QueryPositions(state.num_patches, slot, most, run))
        store_patch(kv, self.patch_k.flatten(1, 2), self.patch_v.flatten(1, 2), target_BN.flatten())

    def _read_again(self, encoded_BSD: Tensor, patches: _Patches, reads_SB: Tensor) -> Tensor:
        """The logits of what follows each byte of the draft, [B, S, V]."""
        num_slots, most = len(encoded_BSD), self.max_patches
        upto_BS, reads_BS = patches.upto_SB.T, reads_SB.T
        first = torch.arange(num_slots, device=upto_BS.device)[:, None] * (1 + most)
        patch_row = (first + upto_BS.clamp(max=most)).flatten()
        reads_patch = ((self.state.num_patches[:, None] + upto_BS > 0) & reads_BS).flatten()
        x_BSD = encoded_BSD.masked_fill(~reads_BS[..., None], 0)  # what is not read may be anything
        patch = self.patch_k.flatten(1, 2), self.patch_v.flatten(1, 2)
        logits = self.logits_BV.new_empty(num_slots * self.size, VOCAB_SIZE)
        at = QueryPositions(self.buffers.at, self.buffers.slot, self.size)
        self._decode(x_BSD.flatten(0, 1), at, patch, patch_row, reads_patch, logits)
        return logits.unflatten(0, (num_slots, self.size))

    def _verify(self, patches: _Patches, logits_BSV: Tensor) -> None:
        """Draw as long as it is what was drafted, and no more patches close than there is room for."""
        drawn_SB = torch.stack([buffers.drawn for buffers in self.draft])
        expected_SB = torch.where(patches.upto_SB <= self.max_patches, drawn_SB, -1)
        self.drafted_logits_SBV = logits_SBV = logits_BSV.transpose(0, 1).contiguous()
        for number in range(1, self.size):
            logits_BV, expected_B = logits_SBV[number - 1], expected_SB[number]
            draw(logits_BV, self.sampling, self.state.position, self.verified[number], expected_B)
        self.buffers.is_waiting.zero_()  # those that drew another one: they draw it in the next step

    def _read_verified(self, lm_logits_SBV: Any, parts: list[list[Tensor]], logits_BSV: Tensor) -> None:
        """Update the state to the last right byte, as a plain step does."""
        state = self.state
        position, num_patches = state.position.clone(), state.num_patches.clone()
        for buffers, lm_logits_BV, (h_BD, *kvs) in zip(self.verified, lm_logits_SBV, parts, strict=True):
            torch.eq(state.open_count, 0, out=buffers.starts)
            append(state, buffers)
            decide(lm_logits_BV, self.patching, state, buffers)
            for layer, kv in enumerate(kvs):
                pooled = {"h_BD": h_BD, "pooled_BD": state.open_max} if layer == 0 else {}
                append_patch_byte(kv, state.open_k[layer], state.open_v[layer], buffers.count, **pooled)
            choose(state, buffers, 0.0, decoded=False)
        slot_B = torch.arange(len(position), device=position.device)
        newest = state.num_patches - num_patches
        for of_slot, table in ((state.patch_k, self.patch_k), (state.patch_v, self.patch_v)):
            of_slot.copy_(table[:, slot_B, newest])
        last = state.position - position - 1
        self.logits_BV.copy_(torch.where((last >= 0)[:, None], logits_BSV[slot_B, last.clamp(min=0)], self.logits_BV))

    def _copied_state(self) -> BLTDecodeState:
        """The state with the same caches, and numbers of its own."""
        own = (*SCALARS, "open_max")
        return replace(self.state, **{name: getattr(self.state, name).clone() for name in own})

    def _reset_draft_state(self) -> None:
        for name in SCALARS:
            getattr(self.draft_state, name).copy_(getattr(self.state, name))
