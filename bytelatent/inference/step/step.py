"""The decode step: it draws one byte in every slot, reads it, and leaves the next one's logits.

Shapes are fixed and nothing waits for the host. A slot is idle (no sequence), reads (draws a byte and reads it), or
waits: its patch is closed, but the global transformer has not run for it yet. With many slots some close a patch in
each step, and its matrices would be read each time; so it runs once a quorum of slots wants it, and slots may wait a
step or two. Their bytes do not depend on it.

The decoder need not wait for the entropy model. On a GPU it reads a byte beside it, as if the patch stayed open, which
is so most times; where it closed, the decoder reads the byte once more, with the new patch.

Nor need other slots wait for the global transformer: it may run beside their next byte (`beside`). Then a slot always
waits for the step after the one that closes its patch, and in a step no slot both reads a byte and has its patch read,
so that the two sides write to no slot in common.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import BLTDecodeState, CacheCapacity, DecodeState, KVCache
from bytelatent.inference.sampling import SamplingSlots
from bytelatent.inference.step.cuda_graph import SideStream, has_conditions, run_if
from bytelatent.inference.step.packed_weights import BLTWeights, ByteLMWeights, StackWeights
from bytelatent.inference.step.patching import append, choose, decide, store_patch
from bytelatent.inference.step.prefill import PrefillDecoder
from bytelatent.inference.step.sampling import StepBuffers, draw
from bytelatent.kernels.decode_attention import decode_attention
from bytelatent.kernels.decode_cross_attention import (
    append_patch_byte,
    decoder_cross_attention_step,
    encoder_cross_attention_step,
)
from bytelatent.kernels.hash_embed import hash_embed
from bytelatent.kernels.launch import overlapped
from bytelatent.kernels.skinny_linear import Squares, skinny_linear
from bytelatent.model import ByteLM
from bytelatent.vocab import BOS, NEWLINE, VOCAB_SIZE

# Shapes: B slots, C slots whose patch closes, D local width, G global width, X and Y encoder's and decoder's
# cross-attentions, K keys per patch, H heads, E head size, M new ids or patches, V vocabulary


@dataclass(frozen=True)
class QueryPositions:
    """Which positions a stack reads; see `decode_attention`."""

    position: Tensor
    slot: Tensor  # -1: nothing is read
    run: Tensor | None = None  # one number, 0: the kernels do nothing
    side: int = 0  # which of the sides that run at once; each has a scratch of its own


class ByteLMStep:
    """The step of a byte LM, over its own state.

    Args:
        like: another step, whose weights this one shares.
    """

    state: DecodeState

    def __init__(self, decoder: Decoder, num_slots: int, max_closing: int = 1, like: "ByteLMStep | None" = None):
        self.decoder = decoder
        self.state = decoder.empty(num_slots)
        self.sampling = SamplingSlots.empty(num_slots, decoder.device)
        self.buffers = StepBuffers.empty(num_slots, min(max_closing, num_slots), decoder.device)
        self.logits_BV = torch.zeros(num_slots, VOCAB_SIZE, device=decoder.device)
        self.byte_lm = decoder.byte_lm_weights if isinstance(decoder, PrefillDecoder) else like and like.byte_lm
        lm = decoder.model if isinstance(decoder.model, ByteLM) else decoder.byte_lm
        if lm is not None and self.byte_lm is None:
            self.byte_lm = ByteLMWeights.of(lm)

    def reserve(self, room: CacheCapacity) -> None:
        """Grow the state, so that this much fits in each slot."""
        self.state.reserve(room)
        for stack in self._stacks():
            stack.reserve(max(room.positions, room.patches))

    def _stacks(self) -> list[StackWeights]:
        return [self.byte_lm.stack] if self.byte_lm is not None else []

    def addresses(self) -> list[int]:
        """Where the tensors are that a step sharing its weights may replace."""
        return [stack.rotary.data_ptr() for stack in self._stacks()]

    @torch.inference_mode()
    def __call__(self) -> None:
        """One step."""
        draw(self.logits_BV, self.sampling, self.state.position, self.buffers)
        append(self.state, self.buffers)
        self.logits_BV.copy_(self._read_byte_lm(self.buffers.ids, QueryPositions(self.buffers.at, self.buffers.slot)))

    def _read_byte_lm(self, ids_M: Tensor, at: QueryPositions) -> Any:
        """The byte LM's logits [M, V] of what follows each id; None where nothing needs them."""
        cache = self.state.byte_lm
        if self.byte_lm is None or cache is None:
            return None
        squares = Squares()
        x_MD = self._stack(self.byte_lm.stack, F.embedding(ids_M, self.byte_lm.embedding), cache, at, squares)
        out = self.logits_BV.new_empty(len(ids_M), VOCAB_SIZE)
        return skinny_linear(x_MD, self.byte_lm.output, eps=self.byte_lm.stack.eps, squares=squares, out=out)

    def newest_logits(self) -> Tensor:
        """What comes next in each slot, [B, V], a copy: of slots that a step went by, what they held."""
        return torch.where(self.buffers.is_held[:, None], self.buffers.held, self.logits_BV)

    def outcome(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the step drew: ids [B], -1 for none, their log-probabilities, and whether they begin patches."""
        return self.buffers.drawn, self.buffers.log_probability, self.buffers.starts

    def _stack(self, stack: StackWeights, x_MD: Tensor, cache: KVCache, at: QueryPositions, squares: Squares) -> Tensor:
        for layer in range(len(stack.blocks)):
            x_MD = self._block(stack, layer, x_MD, cache, at, squares)
        return x_MD

    def _block(
        self, stack: StackWeights, layer: int, x_MD: Tensor, cache: KVCache, at: QueryPositions, squares: Squares
    ) -> Tensor:
        """A block, which writes over its states; their squares are read and left."""
        weights, eps, (k, v, *scales) = stack.blocks[layer], stack.eps, cache.layers[layer]
        given: dict[str, Any] = {"squares": squares, "run": at.run}
        qkv = weights.finished(skinny_linear(x_MD, weights.qkv, eps=eps, **given), eps)
        found = decode_attention(
            qkv,
            k,
            v,
            at.position,
            stack.rotary,
            scales=scales,
            heads=stack.settings.num_heads,
            window=cache.window,
            row_B=at.slot,
            run=at.run,
            **stack.launch(len(at.position), at.side),
        )
        x_MD = skinny_linear(found, weights.output, residual_MN=x_MD, out=x_MD, **given)
        hidden = skinny_linear(x_MD, weights.gate_up, gated=True, eps=eps, **given)
        return skinny_linear(hidden, weights.down, residual_MN=x_MD, out=x_MD, **given)


class BLTStep(ByteLMStep):
    """The step of a BLT.

    Args:
        max_closing: slots for which a step runs the global transformer at most.
        quorum: the share of working slots that must have closed a patch before it runs.
        beside: whether it runs beside the other slots' next byte. Not for models without the decoder's cross-attention.
    """

    state: BLTDecodeState

    def __init__(
        self,
        decoder: Decoder,
        num_slots: int,
        max_closing: int,
        quorum: float = 0.0,
        like: "BLTStep | None" = None,
        beside: bool = False,
    ):
        super().__init__(decoder, num_slots, max_closing, like)
        model: Any = decoder.model
        assert decoder.patching is not None, "a BLT needs patching settings"
        self.patching = decoder.patching
        weights = decoder.blt_weights if isinstance(decoder, PrefillDecoder) else like and like.blt
        self.blt = BLTWeights.of(model) if weights is None else weights
        self.quorum = quorum
        self.beside = beside and bool(self.blt.decoder_cross)
        self.can_wait = self.beside or quorum > 0 or max_closing < num_slots
        self.assumes_open = decoder.device.type == "cuda" and has_conditions()
        self.side, self.closing_side = SideStream(decoder.device, "byte LM"), SideStream(decoder.device, "closing")
        self.encoded_BD = torch.zeros_like(self.state.open_max)  # the encoder's state of the newest byte
        self.closed_BV = torch.zeros_like(self.logits_BV)  # the logits of slots whose patch was read
        self.powers = None
        if model.encoder.ngram_hash is not None:
            self.powers = model.encoder.ngram_hash.powers(decoder.device)

    def _stacks(self) -> list[StackWeights]:
        return [*super()._stacks(), self.blt.encoder, self.blt.middle, self.blt.decoder]

    @torch.inference_mode()
    def __call__(self) -> None:
        state, buffers = self.state, self.buffers
        torch.eq(state.open_count, 0, out=buffers.starts)
        draw(self.logits_BV, self.sampling, state.position, buffers)
        append(state, buffers)
        if self.beside:
            self._read_beside()
        else:
            self._read()

    def _read(self) -> None:
        """Read the newest bytes, then the patches that they close."""
        state, buffers = self.state, self.buffers
        with self.side.beside():
            lm_logits = self._read_byte_lm(*self._line())
        encoded_BD = self._encode()
        if self.can_wait:
            encoded_BD = self._encoded_of_all(encoded_BD)
        if self.assumes_open:
            self._decode_newest(encoded_BD, buffers.slot, self.logits_BV, closes=False)
        self.side.join()
        with overlapped(False):  # it comes after two kernels
            decide(lm_logits, self.patching, state, buffers)
        choose(state, buffers, self.quorum, self.assumes_open)
        if self.assumes_open:
            run_if(buffers.run, lambda: self._close(encoded_BD))
        else:
            self._close(encoded_BD)

    def _read_beside(self) -> None:
        """Read the newest bytes, and beside them the patches that closed before."""
        state, buffers = self.state, self.buffers
        buffers.wants.copy_(buffers.is_waiting)
        choose(state, buffers, self.quorum, decoded=True)
        before_BD = self.encoded_BD.clone()

        def close() -> None:
            self._read_patches()
            self._decode_newest(before_BD, buffers.decodes, self.closed_BV, side=1)

        with self.closing_side.beside():
            run_if(buffers.run, close)
        with self.side.beside():
            lm_logits = self._read_byte_lm(*self._line())
        self._decode_newest(self._encoded_of_all(self._encode()), buffers.slot, self.logits_BV, closes=False)
        self.side.join()
        with overlapped(False):
            decide(lm_logits, self.patching, state, buffers)
        self.closing_side.join()
        self._take_closed()
        buffers.is_waiting.copy_(buffers.wants)

    def _encoded_of_all(self, encoded_BD: Tensor) -> Tensor:
        """The encoder's states of all slots' newest bytes, those of slots that read none included."""
        return torch.where(self.buffers.reads[:, None], encoded_BD, self.encoded_BD, out=self.encoded_BD)

    def _take_closed(self) -> None:
        """Take the logits of the slots whose patch was read."""
        torch.where(self.buffers.decodes[:, None] >= 0, self.closed_BV, self.logits_BV, out=self.logits_BV)

    def _line(self) -> tuple[Tensor, QueryPositions]:
        """The newest ids and their positions as the entropy model reads them: its context may be reset at newlines."""
        state, buffers = self.state, self.buffers
        if not self.patching.reset_at_newline:
            return buffers.ids, QueryPositions(buffers.at, buffers.slot)
        is_newline = buffers.ids == NEWLINE
        state.context_begin.copy_(torch.where(is_newline & buffers.reads, buffers.at, state.context_begin))
        at = buffers.at - state.context_begin
        return torch.where(is_newline, BOS, buffers.ids), QueryPositions(at, buffers.slot)

    def _encode(self) -> Tensor:
        """The encoder's states of the newest bytes, [B, D]; the bytes are added to the open patches."""
        state, buffers, weights = self.state, self.buffers, self.blt
        at = QueryPositions(buffers.at, buffers.slot)
        model: Any = self.decoder.model
        if self.powers is None:
            x_BD = F.embedding(buffers.ids, model.encoder.embedding.weight)
        else:
            tables = model.encoder.ngram_hash.tables.weight
            x_BD = hash_embed(state.tail, buffers.at, self.powers, tables, model.encoder.embedding.weight)
        squares, first = Squares(), len(weights.encoder.blocks) - max(len(weights.encoder_cross), 1)
        for layer in range(len(weights.encoder.blocks)):
            x_BD = self._block(weights.encoder, layer, x_BD, state.encoder, at, squares)
            cross = layer - first
            if cross >= 0 and not weights.encoder_cross:
                self._append_state(x_BD)
            elif cross >= 0:
                key_value = weights.encoder_cross[cross].key_value
                kv = skinny_linear(x_BD, key_value, eps=weights.encoder.eps, squares=squares)
                kv = kv.unflatten(1, (-1, state.open_k.shape[-1]))
                pooled = {"h_BD": x_BD, "pooled_BD": state.open_max} if cross == 0 else {}
                append_patch_byte(kv, state.open_k[cross], state.open_v[cross], buffers.count, **pooled)
        return x_BD

    def _append_state(self, x_BD: Tensor) -> None:
        """Add states of bytes to the open patches, in place of keys and values."""
        open_BMD, count_B = self.state.open_k[0, :, :, 0], self.buffers.count
        slot_B = torch.arange(len(x_BD), device=x_BD.device)
        at_B, reads_B1 = count_B.clamp(min=0), (count_B >= 0).unsqueeze(1)
        open_BMD[slot_B, at_B] = torch.where(reads_B1, x_BD.to(open_BMD.dtype), open_BMD[slot_B, at_B])

    def _joined(self, count_C: Tensor, row_C: Tensor) -> Tensor:
        """The states of closed patches' last bytes side by side, as `bytelatent.model.blt.joined_states`."""
        open_BMD, size = self.state.open_k[0, :, :, 0], self.blt.settings.joined_bytes
        index_CK = count_C.unsqueeze(1) - torch.arange(size, 0, -1, device=count_C.device)
        found_CKD = open_BMD[row_C.clamp(min=0).unsqueeze(1), index_CK.clamp(min=0)]
        return torch.where((index_CK >= 0).unsqueeze(2), found_CKD, 0.0).flatten(1)

    def _of_slots(self, closing_C: Tensor) -> tuple[Tensor, Tensor]:
        """[B] whether a slot is among the closing ones, and which of them it is."""
        slot_B1 = torch.arange(len(self.encoded_BD), device=closing_C.device).unsqueeze(1)
        is_it_BC = closing_C == slot_B1
        return is_it_BC.any(1), is_it_BC.int().argmax(1)

    def _store(self, found: Tensor, closing_C: Tensor) -> None:
        """Store what `_patches` gives for the newest closed patches of slots."""
        state = self.state
        if self.blt.decoder_cross:
            store_patch(found, state.patch_k, state.patch_v, closing_C)
            return
        closes_B, which_B = self._of_slots(closing_C)
        added_BD = state.patch_k[0, :, 0, 0]
        added_BD.copy_(torch.where(closes_B.unsqueeze(1), found[which_B], added_BD))

    def _close(self, encoded_BD: Tensor) -> None:
        """Run the global transformer for the chosen slots; compute the logits that are still to come."""
        buffers = self.buffers
        if buffers.run.is_cuda or bool(buffers.run):  # a CPU knows
            self._read_patches()
        if self.assumes_open and len(encoded_BD) > 1:  # others have theirs
            self._decode_newest(encoded_BD, buffers.decodes, self.closed_BV)
            self._take_closed()
        else:
            self._decode_newest(encoded_BD, buffers.decodes, self.logits_BV)

    def _read_patches(self) -> None:
        """Run the global transformer for the chosen slots, and store what the decoder reads of their patches."""
        state, buffers = self.state, self.buffers
        slot = buffers.closing
        pooled_CD = state.open_max if len(state.open_max) == 1 else state.open_max[slot.clamp(min=0)]
        bytes_of = {"count_C": buffers.closing_count, "row_C": slot}
        at = QueryPositions(buffers.number, slot, run=None if self.assumes_open else buffers.run)
        self._store(self._patches(pooled_CD, bytes_of, at), slot)

    def _decode_newest(
        self, encoded_BD: Tensor, slot: Tensor, out_BV: Tensor, closes: bool = True, side: int = 0
    ) -> None:
        """The logits of what follows the newest byte of slots [B], with their newest closed patch.

        Args:
            out_BV: where they go; those of other slots may be any.
            closes: whether the slots among `closing` have closed a patch with this byte; otherwise none has.
        """
        state, buffers, weights, eps = self.state, self.buffers, self.blt, self.blt.decoder.eps
        x_BD = encoded_BD
        if not self.blt.decoder_cross:
            takes_B = buffers.reads_patch
            if self.blt.settings.added_to == "closing":
                takes_B = self._of_slots(buffers.closing)[0] if closes else torch.zeros_like(takes_B)
            x_BD = x_BD + torch.where(takes_B.unsqueeze(1), state.patch_k[0, :, 0, 0], 0.0)
        heads, size = state.patch_k.shape[-2:]
        squares, at = Squares(), QueryPositions(buffers.at, slot, side=side)
        adds: dict[str, Any] = {"residual_scale": 2.0, "squares": squares}
        for layer in range(len(weights.decoder.blocks)):
            if layer < len(weights.decoder_cross):
                cross, patch = weights.decoder_cross[layer], (state.patch_k[layer], state.patch_v[layer])
                q = skinny_linear(x_BD, cross.query, eps=eps, squares=squares).view(-1, heads, size)
                found = decoder_cross_attention_step(q, *patch, buffers.reads_patch, row_T=slot)
                out = x_BD if layer > 0 else None  # the encoder's states are read again
                x_BD = skinny_linear(found.flatten(1), cross.output, residual_MN=x_BD, out=out, **adds)
            x_BD = self._block(weights.decoder, layer, x_BD, state.decoder, at, squares)
        skinny_linear(x_BD, weights.output, eps=eps, squares=squares, out=out_BV)

    def _patches(self, pooled_CD: Tensor, bytes_of: dict[str, Tensor], at: QueryPositions) -> Tensor:
        """Keys and values of closed patches for the decoder's cross-attentions, [C*K, Y*2*H*E].

        Args:
            pooled_CD: the maximum of the encoder's states over each patch's bytes.
            bytes_of: which bytes each patch has, as `encoder_cross_attention_step` takes it.
            at: the patches' numbers.
        """
        state, weights, run = self.state, self.blt, at.run
        dim, k = weights.encoder.settings.dim, weights.settings.states_per_patch
        heads, size = state.open_k.shape[-2:]
        if weights.pooled_to_queries is None:
            q_QD = self._joined(**bytes_of)
        else:
            q_QD = skinny_linear(pooled_CD, weights.pooled_to_queries, run=run).view(-1, dim)  # Q = C*K
        squares = Squares()
        for layer, cross in enumerate(weights.encoder_cross):
            q = skinny_linear(q_QD, cross.query, eps=weights.encoder.eps, squares=squares, run=run)
            found = encoder_cross_attention_step(
                q.view(-1, k, heads, size), state.open_k[layer], state.open_v[layer], **bytes_of, run=run
            )
            given: dict[str, Any] = {"residual_MN": q_QD, "residual_scale": 2.0, "out": q_QD}
            q_QD = skinny_linear(found.view(-1, dim), cross.output, **given, squares=squares, run=run)
        x_CG, squares = q_QD.view(-1, k * dim), Squares()
        if weights.projection is not None:
            x_CG = skinny_linear(x_CG, weights.projection, squares=squares, run=run)
        x_CG = self._stack(weights.middle, x_CG, state.patches, at, squares)
        if weights.patch_to_keys is None:
            return skinny_linear(x_CG, weights.patch_key_values, eps=weights.decoder.eps, squares=squares, run=run)
        keys = skinny_linear(x_CG, weights.patch_to_keys, run=run).view(-1, dim)
        return skinny_linear(keys, weights.patch_key_values, eps=weights.decoder.eps, run=run)
