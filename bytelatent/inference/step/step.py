"""One byte of every row: drawn, read, and the next one's logits. Shapes are fixed and nothing asks the host.

A row is at rest (no sequence), reads (draws a byte and reads it), or waits: its patch is closed, but the global
transformer has not run for it yet. With many rows some close a patch in each step, and its matrices would be read each
time; so it runs once a quorum of rows wants it, and rows may wait a step or two. They are what they are without the
waiting.

The decoder need not wait for the byte LM. On a GPU it reads a byte beside it, as if the patch stayed open, which most
times it does; where it closed, the decoder reads the byte once more, with the new patch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.inference.decoder import Decoder, State
from bytelatent.inference.kv_cache import BLTState, KVCache, Room
from bytelatent.inference.sampling import SamplingSlots
from bytelatent.inference.step.cuda_graph import Side, has_conditions, where
from bytelatent.inference.step.decisions import Flags, append, choose, decide, draw, store_patch
from bytelatent.inference.step.packed_weights import BlockWeights, BLTWeights, ByteLMWeights, StackWeights
from bytelatent.inference.step.prefill import FastDecoder
from bytelatent.kernels.decode_attention import decode_attention
from bytelatent.kernels.decode_cross_attention import (
    append_patch_byte,
    decoder_cross_attention_step,
    encoder_cross_attention_step,
)
from bytelatent.kernels.hash_embed import hash_embed
from bytelatent.kernels.launch import overlapped
from bytelatent.kernels.skinny_linear import skinny_linear
from bytelatent.model import ByteLM
from bytelatent.vocab import VOCAB_SIZE

# Shapes: B rows, C places for rows that close a patch, D local width, G global width, L bytes an open patch may have,
# X and Y encoder's and decoder's cross-attentions, K keys a patch, H heads, E head size, V vocabulary


class ByteLMStep:
    """The step of a byte LM, over its own state."""

    state: State

    def __init__(self, decoder: Decoder, num_slots: int, places: int = 1):
        self.decoder = decoder
        self.state = decoder.empty(num_slots)
        self.sampling = SamplingSlots.empty(num_slots, decoder.device)
        self.flags = Flags.empty(num_slots, min(places, num_slots), decoder.device)
        self.logits_BV = torch.zeros(num_slots, VOCAB_SIZE, device=decoder.device)
        self.byte_lm = decoder.byte_lm_weights if isinstance(decoder, FastDecoder) else None
        lm = decoder.model if isinstance(decoder.model, ByteLM) else decoder.byte_lm
        if lm is not None and self.byte_lm is None:
            self.byte_lm = ByteLMWeights.of(lm)

    def reserve(self, room: Room) -> None:
        """Grow the state; no slot may come to as much as there is room for."""
        self.state.reserve(room)
        for stack in self._stacks():
            stack.reserve(max(room.positions, room.patches))

    def _stacks(self) -> list[StackWeights]:
        return [self.byte_lm.stack] if self.byte_lm is not None else []

    @torch.no_grad()
    def __call__(self) -> None:
        """One step."""
        state, flags = self.state, self.flags
        draw(self.logits_BV, self.sampling, state.position, flags)
        append(state, flags)
        self.logits_BV.copy_(self._read_byte_lm(flags.ids, flags.at, flags.row))

    def _read_byte_lm(self, ids_M: Tensor, position: Tensor, row: Tensor, new: int = 1) -> Any:
        """The byte LM's logits [M, V] of what follows `new` ids of each slot; None where nothing needs them."""
        cache = self.state.byte_lm
        if self.byte_lm is None or cache is None:
            return None
        x_MD = F.embedding(ids_M, self.byte_lm.embedding)
        x_MD = self._stack(self.byte_lm.stack, x_MD, cache, position, row, new=new)
        out = self.logits_BV.new_empty(len(ids_M), VOCAB_SIZE)
        return skinny_linear(x_MD, self.byte_lm.output, eps=self._eps(self.byte_lm.stack), out=out)

    def outcome(self) -> tuple[Tensor, Tensor]:
        """What the step drew: ids [S, B], -1 for none, of S bytes one after another, and their log-probabilities."""
        return self.flags.drawn[None], self.flags.log_probability[None]

    def _stack(
        self,
        stack: StackWeights,
        x_MD: Tensor,
        cache: KVCache,
        position: Tensor,
        row: Tensor,
        run: Tensor | None = None,
        new: int = 1,
    ) -> Tensor:
        for layer, block in enumerate(stack.blocks):
            x_MD = self._block(stack, block, x_MD, cache, layer, position, row, run, new)
        return x_MD

    def _block(
        self,
        stack: StackWeights,
        weights: BlockWeights,
        x_MD: Tensor,
        cache: KVCache,
        layer: int,
        position: Tensor,
        row: Tensor,
        run: Tensor | None = None,
        new: int = 1,
    ) -> Tensor:
        settings, eps = stack.settings, self._eps(stack)
        qkv = skinny_linear(x_MD, weights.qkv, eps=eps, run=run)
        found = decode_attention(
            qkv,
            *cache.layers[layer],
            position,
            stack.rotary,
            heads=settings.num_heads,
            window=cache.window,
            new=new,
            row_B=row,
            run=run,
            **stack.launch(len(position), new),
        )
        x_MD = skinny_linear(found, weights.output, residual_MN=x_MD, out=x_MD, run=run)
        hidden = skinny_linear(x_MD, weights.gate_up, gated=True, eps=eps, run=run)
        return skinny_linear(hidden, weights.down, residual_MN=x_MD, out=x_MD, run=run)

    def _eps(self, stack: StackWeights) -> float:
        return stack.settings.norm_eps


class BLTStep(ByteLMStep):
    """The step of a BLT.

    Args:
        places: slots for which a step runs the global transformer at most.
        quorum: the share of working slots that must have closed a patch before it runs.
    """

    state: BLTState

    def __init__(self, decoder: Decoder, num_slots: int, places: int, quorum: float = 0.0):
        super().__init__(decoder, num_slots, places)
        model: Any = decoder.model
        assert decoder.patching is not None, "a BLT needs patching settings"
        self.patching = decoder.patching
        weights = decoder.blt_weights if isinstance(decoder, FastDecoder) else None
        self.blt = BLTWeights.of(model) if weights is None else weights
        self.quorum = quorum
        self.can_wait = quorum > 0 or places < num_slots
        self.assumes_open = decoder.device.type == "cuda" and has_conditions()
        self.side = Side(decoder.device)
        self.encoded_BD = torch.zeros_like(self.state.open_max)  # the encoder's state of the newest byte
        self.powers = None
        if model.encoder.ngram_hash is not None:
            self.powers = model.encoder.ngram_hash.powers(decoder.device)

    def _stacks(self) -> list[StackWeights]:
        return [*super()._stacks(), self.blt.encoder, self.blt.middle, self.blt.decoder]

    @torch.no_grad()
    def __call__(self) -> None:
        state, flags = self.state, self.flags
        draw(self.logits_BV, self.sampling, state.position, flags)
        append(state, flags)
        with self.side.beside():
            lm_logits = self._read_byte_lm(flags.ids, flags.at, flags.row)
        encoded_BD = self._encode(state, flags)
        if self.can_wait:
            torch.where(flags.reads[:, None], encoded_BD, self.encoded_BD, out=self.encoded_BD)
            encoded_BD = self.encoded_BD
        if self.assumes_open:
            self._decode_newest(encoded_BD, flags.row)
        self.side.join()
        with overlapped(False):  # it comes after two kernels
            decide(lm_logits, self.patching, state, flags)
        choose(state, flags, self.quorum, self.assumes_open)
        if self.assumes_open:
            where(flags.run, lambda: self._close(encoded_BD))
        else:
            self._close(encoded_BD)

    def _encode(self, state: BLTState, flags: Flags, kept: list[Tensor] | None = None) -> Tensor:
        """The encoder's states of the newest bytes, [B, D]; the bytes are put into the open patches.

        Args:
            kept: is given what the open patches took: the state, [B, D], then each cross-attention's keys and values.
        """
        weights = self.blt
        model: Any = self.decoder.model
        if self.powers is None:
            x_BD = F.embedding(flags.ids, model.encoder.embedding.weight)
        else:
            tables = model.encoder.ngram_hash.tables.weight
            x_BD = hash_embed(state.tail, flags.at, self.powers, tables, model.encoder.embedding.weight)
        first = len(weights.encoder.blocks) - len(weights.encoder_cross)
        for layer, block in enumerate(weights.encoder.blocks):
            x_BD = self._block(weights.encoder, block, x_BD, state.encoder, layer, flags.at, flags.row)
            if layer >= first:
                place = layer - first
                kv = skinny_linear(x_BD, weights.encoder_cross[place].key_value, eps=self._eps(weights.encoder))
                kv = kv.unflatten(1, (-1, state.open_k.shape[-1]))
                pooled = {"h_BD": x_BD, "pooled_BD": state.open_max} if place == 0 else {}
                append_patch_byte(kv, state.open_k[place], state.open_v[place], flags.count, **pooled)
                if kept is not None:
                    kept += [x_BD.clone(), kv] if place == 0 else [kv]
        return x_BD

    def _close(self, encoded_BD: Tensor) -> None:
        """Run the global transformer for the patches that are chosen; the logits that are still to come."""
        state, flags = self.state, self.flags
        row = flags.closing
        if flags.run.is_cuda or bool(flags.run):  # a CPU may as well look
            pooled_CD = state.open_max if len(state.open_max) == 1 else state.open_max[row.clamp(min=0)]
            bytes_of = {"count_C": flags.closing_count, "row_C": row}
            kv = self._patches(pooled_CD, bytes_of, flags.number, row, None if self.assumes_open else flags.run)
            store_patch(kv, state.patch_k, state.patch_v, row)
        if self.assumes_open and len(encoded_BD) > 1:  # others have theirs
            before_BV = self.logits_BV.clone()
            self._decode_newest(encoded_BD, flags.goes_on)
            torch.where(flags.goes_on[:, None] >= 0, self.logits_BV, before_BV, out=self.logits_BV)
        else:
            self._decode_newest(encoded_BD, flags.goes_on)

    def _decode_newest(self, encoded_BD: Tensor, row: Tensor) -> None:
        """The logits of what comes after the newest byte of rows, [B], which read their newest closed patch."""
        state, flags = self.state, self.flags
        patch, x_BD = (state.patch_k, state.patch_v), encoded_BD.clone()  # which becomes what the decoder makes of it
        self._decode(x_BD, flags.at, row, patch, row, flags.reads_patch, self.logits_BV)

    def _patches(
        self,
        pooled_CD: Tensor,
        bytes_of: dict[str, Tensor],
        number: Tensor,
        row: Tensor,
        run: Tensor | None,
        new: int = 1,
    ) -> Tensor:
        """What the decoder's cross-attentions read of closed patches, [C*K, Y*2*H*E].

        Args:
            pooled_CD: the highest of the encoder's states over each patch's bytes.
            bytes_of: which bytes each patch has, as `encoder_cross_attention_step` takes it.
            number, row: of the first of `new` patches that follow one another in a row; see `decode_attention`.
        """
        state, weights = self.state, self.blt
        dim, k = weights.encoder.settings.dim, weights.settings.cross_attention.k
        heads, size = state.open_k.shape[-2:]
        q_QD = skinny_linear(pooled_CD, weights.pooled_to_queries, run=run).view(-1, dim)  # Q = C*K
        for layer, cross in enumerate(weights.encoder_cross):
            q = skinny_linear(q_QD, cross.query, eps=self._eps(weights.encoder), run=run)
            found = encoder_cross_attention_step(
                q.view(-1, k, heads, size), state.open_k[layer], state.open_v[layer], **bytes_of, run=run
            )
            given: dict[str, Any] = {"residual_MN": q_QD, "residual_scale": 2.0, "out": q_QD}
            q_QD = skinny_linear(found.view(-1, dim), cross.output, **given, run=run)
        x_CG = q_QD.view(-1, k * dim)
        if weights.projection is not None:
            x_CG = skinny_linear(x_CG, weights.projection, run=run)
        x_CG = self._stack(weights.middle, x_CG, state.patches, number, row, run, new)
        keys = skinny_linear(x_CG, weights.patch_to_keys, run=run).view(-1, dim)
        return skinny_linear(keys, weights.patch_key_values, eps=self._eps(weights.decoder), run=run)

    def _decode(
        self,
        x_MD: Tensor,
        position: Tensor,
        row: Tensor,
        patch: tuple[Tensor, Tensor],
        patch_row: Tensor,
        reads_patch: Tensor,
        out: Tensor,
        new: int = 1,
    ) -> None:
        """The logits of what comes after bytes, into `out` [M, V].

        Args:
            x_MD: the encoder's states of `new` bytes of each row, one after another.
            position, row: of the first of them; see `decode_attention`.
            patch: keys and values of patches, [Y, rows, K, H, E].
            patch_row, reads_patch: [M] which of them each byte reads, and whether it reads one yet.
        """
        state, weights = self.state, self.blt
        heads, size = patch[0].shape[-2:]
        for layer, block in enumerate(weights.decoder.blocks):
            if layer < len(weights.decoder_cross):
                cross = weights.decoder_cross[layer]
                q = skinny_linear(x_MD, cross.query, eps=self._eps(weights.decoder)).view(-1, heads, size)
                found = decoder_cross_attention_step(q, patch[0][layer], patch[1][layer], reads_patch, row_B=patch_row)
                x_MD = skinny_linear(found.flatten(1), cross.output, residual_MN=x_MD, residual_scale=2.0, out=x_MD)
            x_MD = self._block(weights.decoder, block, x_MD, state.decoder, layer, position, row, new=new)
        skinny_linear(x_MD, weights.output, eps=self._eps(weights.decoder), out=out)
