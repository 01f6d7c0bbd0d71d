"""Reading with a memory: whole prompts in one packed pass, then new ids, any number for each row at a time.

`Decoder.prefill`, `Decoder.extend` and `Decoder.branch` give the logits of the full forward pass at every position; the
last two cost what the new ids cost. The global transformer runs for those of them that close a patch.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference.boundaries import Boundaries, boundaries
from bytelatent.inference.kv_cache import Cached, EachAlone, Keep, KeepPatchKeys, Kept, Runs
from bytelatent.inference.state import HISTORY, SLACK, DecodeState, KeyValues
from bytelatent.kernels.patch_attention import ByteRanges, encoder_cross_attention
from bytelatent.kernels.patch_pooling import pool_patches
from bytelatent.model import BLTModel, ByteLM, PatchedStream, Stream, add_patches, entropies, pack_rows
from bytelatent.model.attention import Look, build_mask
from bytelatent.model.patch_attention import DecoderCrossAttention, EncoderCrossAttention
from bytelatent.model.settings import StackSettings
from bytelatent.patching import PatchSettings

# Shapes: T ids (a row and a position each), B rows, P patches, K states a patch, D local width, G global width,
# V vocabulary

Keys = tuple[Tensor, Tensor]  # keys and values of bytes [T, H, E] or of patches [P, K, H, E]


class Decoder:
    """A BLT or a byte LM, read with a memory.

    Args:
        patching: the rule, of a BLT.
        byte_lm: gives the entropies, where the rule needs them.
    """

    def __init__(self, model: BLTModel | ByteLM, patching: PatchSettings | None, byte_lm: ByteLM | None):
        self.model = model
        self.patching = patching
        self.byte_lm = byte_lm if patching is not None and patching.needs_entropies else None
        self.device = next(model.parameters()).device
        self._reads: Any = model  # what reads whole prompts
        self._reads_byte_lm: Any = self.byte_lm
        self.tail = 1  # ids that n-grams reach back, the newest one included
        if isinstance(model, BLTModel) and model.settings.ngram_hash is not None:
            self.tail = max(model.settings.ngram_hash.sizes)
        if self.tail > HISTORY - SLACK:
            raise UserError(f"ngram_hash.sizes: {self.tail} is too long to decode; at most {HISTORY - SLACK}")

    def empty(self, num_rows: int) -> DecodeState:
        """The state of rows that have read nothing."""
        return DecodeState.empty(self.model, self.byte_lm, num_rows)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor], last_only: bool = False) -> tuple[DecodeState, Tensor]:
        """Read whole prompts at once.

        Args:
            prompts: ids of each row, BOS first; any lengths but zero.
            last_only: whether only the logits of each prompt's last id are wanted.

        Returns:
            The state, and the logits [T, V] of all prompts' ids, one prompt after another; or of the last ones [B, V].
        """
        stream = self._padded(pack_rows([prompt.to(self.device) for prompt in prompts]))
        rows, position = stream.document, stream.position
        length = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = max(len(prompt) for prompt in prompts)
        state = self.empty(len(prompts))
        state.position = length

        def newest_of(size: int) -> Tensor:
            """The places of each row's newest ids."""
            return ((rows >= 0) & (position >= length[rows] - size)).nonzero()[:, 0]

        sizes = [len(prompt) for prompt in prompts]
        begins = [sum(sizes[:row]) for row in range(len(sizes))]

        def kept(cache: KeyValues, stack: StackSettings) -> Look:
            """A mask of the stream that keeps the newest positions of each row."""
            cache.make_room(longest)
            count = [min(size, cache.size) for size in sizes]
            first = [size - kept for size, kept in zip(sizes, count, strict=True)]
            place = [begin + at for begin, at in zip(begins, first, strict=True)]
            return self._look(stack, rows, position, Keep(cache, place, first, count))

        newest = newest_of(HISTORY)
        here = (rows[newest], position[newest] % HISTORY)
        state.history.ids[here] = stream.ids[newest]
        if isinstance(self.model, ByteLM):
            assert state.byte_lm is not None
            logits = self._reads.logits(stream.ids, position, kept(state.byte_lm, self.model.settings))
            logits = logits[rows >= 0] if len(rows) > int(length.sum()) else logits
            return state, logits[length.cumsum(0) - 1] if last_only else logits

        found = torch.zeros(len(rows), device=self.device)
        if self.byte_lm is not None:
            assert state.byte_lm is not None
            assert self._reads_byte_lm is not None
            look = kept(state.byte_lm, self.byte_lm.settings)
            found = entropies(self._reads_byte_lm.logits(stream.ids, position, look))
            state.history.entropies[here] = found[newest]
        assert self.patching is not None
        runs = Runs(rows, position)
        decided = boundaries(self.patching, state, runs, stream.ids, found)
        decided.keep(state, runs, newest)
        starts = decided.closes
        batch = self._with_patches(stream, starts)
        last = length.cumsum(0) - 1
        is_closed = batch.patch_document >= 0
        is_closed[batch.patch[last]] = starts[last]
        closed = is_closed.nonzero()[:, 0]

        shapes = self.model.settings
        encoder, middle, decoder = self._reads.encoder, self._reads.global_transformer, self._reads.decoder
        assert state.encoder is not None
        assert state.patches is not None
        assert state.decoder is not None
        states = encoder.byte_states(self._embed(batch), position, kept(state.encoder, shapes.encoder))
        patches_PKD = encoder.patch_states(states, batch)
        every = torch.arange(len(prompts), device=self.device)
        num_patches = state.last(state.history.num_patches, every, length)
        state.patches.make_room(int(batch.patch_position.max()) + 1)
        first = batch.patch[torch.tensor(begins, device=self.device)].tolist()
        keep = Keep(state.patches, first, [0] * len(prompts), num_patches.tolist())
        look = self._look(shapes.global_transformer, batch.patch_document, batch.patch_position, keep)
        patches_PG = middle(patches_PKD, batch.patch_position, look)

        patch_start = state.last(state.history.patch_start, every, length)
        open_bytes = ((rows >= 0) & (position >= patch_start[rows])).nonzero()[:, 0]
        most = int((length - patch_start).max())
        opened = [h[open_bytes] for h in states]
        runs = Runs(rows[open_bytes], position[open_bytes])
        self._keep_bytes(state, runs, opened[0], self._byte_keys(opened), most)
        owner, number = batch.patch_document[closed], batch.patch_position[closed]
        recent = (number >= num_patches[owner] - SLACK).nonzero()[:, 0]
        assert state.patch_keys is not None
        keep_keys = KeepPatchKeys(state.patch_keys, owner[recent], number[recent], closed[recent])
        keys_PKD = decoder.keys(patches_PG).to(states[-1].dtype)
        h_TD = decoder.states(
            states[-1],
            position,
            kept(state.decoder, shapes.decoder),
            self._read_patches(decoder, keys_PKD, batch.read, keep_keys),
        )
        return state, decoder.logits(h_TD[last] if last_only else h_TD[rows >= 0])

    def _padded(self, stream: Stream) -> Stream:
        """The stream as it is read."""
        return stream

    def _with_patches(self, stream: Stream, starts: Tensor) -> PatchedStream:
        return add_patches(stream, starts)

    def _embed(self, batch: PatchedStream) -> Tensor:
        assert isinstance(self.model, BLTModel)
        return self.model.encoder.embed(batch)

    def _read_patches(
        self, decoder: Any, keys_PKD: Tensor, read: Tensor, keep: KeepPatchKeys
    ) -> Callable[[int, Tensor], Tensor]:
        """The decoder's cross-attentions, by their number."""
        runs = ByteRanges.of(read, len(keys_PKD))

        def read_patches(layer: int, h_TD: Tensor) -> Tensor:
            cross = decoder.cross_attention[layer]
            k_PKHE, v_PKHE = cross.keys_values(keys_PKD)
            keep(layer, k_PKHE, v_PKHE)
            return cross.read(h_TD, k_PKHE, v_PKHE, runs)

        return read_patches

    def _look(self, stack: StackSettings, document: Tensor, position: Tensor, keep: Keep) -> Look:
        """How a stack's layers see the positions of a whole stream, and what they keep of it."""
        if stack.window is None and document.device.type != "cuda":  # where there is no kernel that leaves pairs out
            return Kept(EachAlone.of(document), keep)
        return Kept(build_mask(document, stack.window), keep)

    @torch.no_grad()
    def extend(self, state: DecodeState, rows: Tensor, ids: Tensor) -> Tensor:
        """Read new ids.

        Args:
            state: goes on to what follows them.
            rows: [T] the row of each new id; ids of a row stand in order, one after another.
            ids: [T]

        Returns:
            Logits, float32 [T, V].
        """
        order = torch.arange(len(rows), device=rows.device)
        is_first = torch.cat([torch.ones_like(rows[:1], dtype=torch.bool), rows[1:] != rows[:-1]])
        turn = order - torch.where(is_first, order, 0).cummax(0).values
        logits = self._read(state, Runs(rows, state.position[rows] + turn), ids, keep=True)
        state.position = state.position.index_add(0, rows, torch.ones_like(rows))
        return logits

    @torch.no_grad()
    def branch(self, state: DecodeState, rows: Sequence[int], texts: Sequence[Tensor]) -> Tensor:
        """Read texts in one pass, each as if it alone followed what its row has read, and forget them.

        Args:
            state: stays as it is.
            rows: the row of each text; those of a row stand together.
            texts: ids of each, one at least.

        Returns:
            Logits of all texts' ids, one text after another, float32 [T, V].
        """
        stream = pack_rows([text.to(self.device) for text in texts])
        row = torch.tensor(rows, device=self.device)[stream.document]
        return self._read(state, Runs(row, state.position[row] + stream.position), stream.ids, keep=False)

    def _read(self, state: DecodeState, runs: Runs, ids: Tensor, keep: bool) -> Tensor:
        """Logits, float32 [T, V], of new ids [T]; `keep`: whether the state takes what later ids need of them."""
        rows, position = runs.rows, runs.position
        newest = runs.newest(HISTORY)
        here = (rows[newest], position[newest] % HISTORY)
        if isinstance(self.model, ByteLM):
            assert state.byte_lm is not None
            logits = self.model.logits(ids, position, Cached(state.byte_lm, runs, keep))
            if keep:
                state.history.ids[here] = ids[newest]
            return logits
        assert self.patching is not None
        assert state.patches is not None
        found = torch.zeros(len(rows), device=rows.device)
        if self.byte_lm is not None:
            assert state.byte_lm is not None
            found = entropies(self.byte_lm.logits(ids, position, Cached(state.byte_lm, runs, keep)))
        decided = boundaries(self.patching, state, runs, ids, found)
        states = self._encode(state, runs, ids, keep)
        bytes_ = self._byte_keys(states)
        closing = decided.closes.nonzero()[:, 0]
        patches, keys = Runs(rows[closing], decided.num_patches[closing] - 1), []
        if len(closing):
            patches_PKD = self._patch_states(state, runs, decided, closing, states[0], bytes_)
            look = Cached(state.patches, patches, keep)
            keys = self._patch_keys(self.model.global_transformer(patches_PKD, patches.position, look))
        logits = self._decode(state, runs, states[-1], decided.new_patch(runs), keys, keep)
        if keep:
            state.history.ids[here], state.history.entropies[here] = ids[newest], found[newest]
            decided.keep(state, runs, newest)
            self._keep_bytes(state, runs, states[0], bytes_, int((position - decided.begin).max()) + 1)
            newest = patches.newest(SLACK)
            assert state.patch_keys is not None
            keep_keys = KeepPatchKeys(state.patch_keys, patches.rows[newest], patches.position[newest], newest)
            for layer, (k_PKHE, v_PKHE) in enumerate(keys):
                keep_keys(layer, k_PKHE, v_PKHE)
        return logits

    def _encode(self, state: DecodeState, runs: Runs, ids: Tensor, keep: bool) -> list[Tensor]:
        """The encoder's states of new ids, as `LocalEncoder.byte_states` gives them."""
        assert isinstance(self.model, BLTModel)
        assert state.encoder is not None
        place = torch.arange(len(ids), device=ids.device)[:, None]
        back = torch.arange(self.tail - 1, -1, -1, device=ids.device)
        remembered = state.history.ids[runs.rows[:, None], (runs.position[:, None] - back) % HISTORY]
        tail = torch.where(back <= runs.turn[:, None], ids[(place - back).clamp(min=0)], remembered)
        embedded = self.model.encoder.embed_last(tail, runs.position)
        return self.model.encoder.byte_states(embedded, runs.position, Cached(state.encoder, runs, keep))

    def _patch_states(
        self, state: DecodeState, runs: Runs, decided: Boundaries, closing: Tensor, h_TD: Tensor, bytes_: list[Keys]
    ) -> Tensor:
        """The K states, [P, K, D], of the patches that the new ids `closing` [P] close.

        Args:
            h_TD, bytes_: of the new ids; those of earlier ids in these patches are remembered.
        """
        assert isinstance(self.model, BLTModel)
        assert state.open_bytes is not None
        kept, encoder = state.open_bytes, self.model.encoder
        begin, first = decided.begin[closing], (runs.position - runs.turn)[closing]
        offset = torch.arange(max(int((first - begin).max()), 0), device=begin.device)
        patch_before, inner = (offset < (first - begin)[:, None]).nonzero(as_tuple=True)
        before = (runs.rows[closing][patch_before], (begin[patch_before] + inner) % kept.size)
        patch = decided.closes.cumsum(0) - decided.closes.long()
        last = closing[patch.clamp(max=len(closing) - 1)]  # the next id that closes a patch, if it is in the same run
        new = ((patch < len(closing)) & (runs.begin == runs.begin[last])).nonzero()[:, 0]

        patch = torch.cat([patch_before, patch[new]])
        order = patch.argsort(stable=True)  # a patch's bytes side by side
        own = ByteRanges.of(patch[order], len(closing))
        patches_PKD = encoder.queries(pool_patches(torch.cat([kept.h[before], h_TD[new]])[order], own))
        for layer, (cross, (k, v)) in enumerate(zip(encoder.cross_attention, bytes_, strict=True)):
            assert isinstance(cross, EncoderCrossAttention)
            k, v = torch.cat([kept.k[layer][before], k[new]])[order], torch.cat([kept.v[layer][before], v[new]])[order]
            patches_PKD = cross.add(patches_PKD, encoder_cross_attention(cross.queries(patches_PKD), k, v, own))
        return patches_PKD

    def _decode(
        self, state: DecodeState, runs: Runs, h_TD: Tensor, read: Tensor, keys: list[Keys], keep: bool
    ) -> Tensor:
        """Logits, float32 [T, V], from the encoder's states of new ids.

        Args:
            read: [T] which of the new patches each id reads; -1: the newest that its row had closed before.
            keys: of the new patches, if there are any.
        """
        assert isinstance(self.model, BLTModel)
        assert state.decoder is not None
        assert state.patch_keys is not None
        kept, decoder = state.patch_keys, self.model.decoder
        num_patches = state.last(state.history.num_patches, runs.row, state.position[runs.row])
        before = (runs.row, (num_patches - 1) % SLACK)
        closed_before = torch.where(num_patches > 0, torch.arange(len(runs.row), device=read.device), -1)[runs.line]
        num_keys = len(runs.row) + (len(keys[0][0]) if keys else 0)
        reads = ByteRanges.of(torch.where(read >= 0, read + len(runs.row), closed_before), num_keys)

        def read_patches(layer: int, h_TD: Tensor) -> Tensor:
            cross = decoder.cross_attention[layer]
            assert isinstance(cross, DecoderCrossAttention)
            k, v = kept.k[layer][before], kept.v[layer][before]
            if keys:
                k, v = torch.cat([k, keys[layer][0]]), torch.cat([v, keys[layer][1]])
            return cross.read(h_TD, k, v, reads)

        look = Cached(state.decoder, runs, keep)
        return decoder.logits(decoder.states(h_TD, runs.position, look, read_patches))

    def _byte_keys(self, states: list[Tensor]) -> list[Keys]:
        """What each cross-attention of the encoder sees of bytes, from their states."""
        assert isinstance(self.model, BLTModel)
        layers = cast(list[EncoderCrossAttention], self.model.encoder.cross_attention)
        return [cross.keys_values(h_TD) for cross, h_TD in zip(layers, states, strict=True)]

    def _patch_keys(self, patches_PG: Tensor) -> list[Keys]:
        """What each cross-attention of the decoder sees of patches."""
        assert isinstance(self.model, BLTModel)
        keys_PKD = self.model.decoder.keys(patches_PG)
        layers = cast(list[DecoderCrossAttention], self.model.decoder.cross_attention)
        return [cross.keys_values(keys_PKD) for cross in layers]

    def _keep_bytes(self, state: DecodeState, runs: Runs, h_TD: Tensor, bytes_: list[Keys], longest: int) -> None:
        """Keep the encoder's states of bytes [T]; `longest` bytes are in the longest patch."""
        assert state.open_bytes is not None
        kept = state.open_bytes
        kept.make_room(longest + SLACK, state.position)
        newest = runs.newest(kept.size)
        here = (runs.rows[newest], runs.position[newest] % kept.size)
        kept.h[here] = h_TD[newest].to(kept.h.dtype)
        for layer, (k, v) in enumerate(bytes_):
            kept.k[layer][here], kept.v[layer][here] = k[newest].to(kept.k.dtype), v[newest].to(kept.v.dtype)
