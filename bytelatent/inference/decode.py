"""Reading with a memory: whole prompts in one packed pass, then new ids, a few for each row at a time.

`Decoder.prefill` and `Decoder.extend` give the logits of the full forward pass at every position; the second costs what
the new ids cost. The global transformer runs for those of them that close a patch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference.looks import Cached, Keep, Kept
from bytelatent.inference.state import HISTORY, SLACK, DecodeState, KeyValues
from bytelatent.kernels.patch_attention import attend_to_own_bytes, pool_patches, runs_of
from bytelatent.model import BLTModel, ByteLM, PatchedStream, Stream, add_patches, entropies, pack_rows
from bytelatent.model.attention import Look, build_mask
from bytelatent.model.patch_attention import GatherBytes, ReadPatches
from bytelatent.model.settings import StackSettings
from bytelatent.patching import PatchSettings, PatchState, Tail, next_starts, step

# Shapes: T entries (a row and a position each), N ids of a tail, P patches, X cross-attentions of the encoder


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

        found = None
        if self.byte_lm is not None:
            assert state.byte_lm is not None
            assert self._reads_byte_lm is not None
            look = kept(state.byte_lm, self.byte_lm.settings)
            found = entropies(self._reads_byte_lm.logits(stream.ids, position, look))
            state.history.entropies[here] = found[newest]
        assert self.patching is not None
        starts = next_starts(stream.ids, found, position, self.patching)
        batch = self._with_patches(stream, starts)
        self._remember_patches(state, batch, found, starts, newest)
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
        self._keep_bytes(state, [h[open_bytes] for h in states], rows[open_bytes], position[open_bytes], most)
        owner, number = batch.patch_document[closed], batch.patch_position[closed]
        recent = (number >= num_patches[owner] - SLACK).nonzero()[:, 0]
        self._keep_patch_keys(state, patches_PG[closed[recent]], owner[recent], number[recent])
        keys_PKD = decoder.keys(patches_PG).to(states[-1].dtype)
        h_TD = decoder.states(
            states[-1],
            position,
            kept(state.decoder, shapes.decoder),
            self._read_patches(decoder, keys_PKD, batch.read),
        )
        return state, decoder.logits(h_TD[last] if last_only else h_TD[rows >= 0])

    def _padded(self, stream: Stream) -> Stream:
        """The stream as it is read."""
        return stream

    def _with_patches(self, stream: Stream, starts: Tensor) -> PatchedStream:
        return add_patches(stream, starts, history=stream.position)

    def _embed(self, batch: PatchedStream) -> Tensor:
        assert isinstance(self.model, BLTModel)
        return self.model.encoder.embed(batch)

    def _read_patches(self, decoder: Any, keys_PKD: Tensor, read: Tensor) -> Callable[[int, Tensor], Tensor]:
        """The decoder's cross-attentions, by their number."""
        runs = runs_of(read, len(keys_PKD))
        return lambda layer, h_TD: decoder.cross_attention[layer](h_TD, keys_PKD, runs)

    def _look(self, stack: StackSettings, document: Tensor, position: Tensor, keep: Keep) -> Look:
        """How a stack's layers see the positions of a whole stream, and what they keep of it."""
        return Kept(build_mask(document, stack.window), keep)

    @torch.no_grad()
    def read_byte_lm(self, state: DecodeState, rows: Tensor, ids: Tensor, position: Tensor) -> Tensor:
        """Let only the byte LM read an id of some rows, ahead of the rest; its logits, float32 [T, V].

        Args:
            rows, ids, position: [T]; positions follow on one another from call to call.
        """
        assert self.byte_lm is not None
        assert state.byte_lm is not None
        newest = int(position.max())
        state.byte_lm.make_room(newest + 1)
        return self.byte_lm.logits(ids, position, Cached(state.byte_lm, rows, position, newest))

    @torch.no_grad()
    def extend(self, state: DecodeState, rows: Tensor, ids: Tensor, found: Tensor | None = None) -> Tensor:
        """Read new ids.

        Args:
            rows: [T] the row of each new id; ids of a row stand in order, one after another.
            ids: [T]
            found: [T] entropies in nats, where the byte LM has read the ids already.

        Returns:
            Logits, float32 [T, V].
        """
        order = torch.arange(len(rows), device=rows.device)
        is_first = torch.cat([torch.ones_like(rows[:1], dtype=torch.bool), rows[1:] != rows[:-1]])
        turn = order - torch.where(is_first, order, 0).cummax(0).values  # which of its row's new ids it is
        position = state.position[rows] + turn
        newest = int(position.max())
        state.history.ids[rows, position % HISTORY] = ids
        state.position = state.position.index_add(0, rows, torch.ones_like(rows))
        if isinstance(self.model, ByteLM):
            assert state.byte_lm is not None
            state.byte_lm.make_room(newest + 1)
            return self.model.logits(ids, position, Cached(state.byte_lm, rows, position, newest))
        if found is None and self.byte_lm is not None:
            found = entropies(self.read_byte_lm(state, rows, ids, position))
        elif found is None:
            found = torch.zeros(len(rows), device=rows.device)
        begin, closes = self._decide(state, rows, position, turn, ids, found)

        encoder, decoder = self.model.encoder, self.model.decoder
        assert state.encoder is not None
        assert state.decoder is not None
        assert state.patch_keys is not None
        state.encoder.make_room(newest + 1)
        state.decoder.make_room(newest + 1)
        back = torch.arange(1 - self.tail, 1, device=rows.device)
        tail = state.history.ids[rows[:, None], (position[:, None] + back) % HISTORY]
        embedded = encoder.embed_last(tail, position)
        states = encoder.byte_states(embedded, position, Cached(state.encoder, rows, position, newest))
        self._keep_bytes(state, states, rows, position, int((position - begin).max()) + 1)
        closing = closes.nonzero()[:, 0]
        if len(closing):
            self._close(state, rows[closing], begin[closing], position[closing])
        read = state.history.num_patches[rows, position % HISTORY] - 1
        kept = state.patch_keys
        k_YTKHE, v_YTKHE = (part[:, rows, read % SLACK] for part in (kept.k, kept.v))
        own = runs_of(torch.where(read >= 0, order, -1), len(rows))

        def read_patches(layer: int, h_TD: Tensor) -> Tensor:
            cross = decoder.cross_attention[layer]
            assert isinstance(cross, ReadPatches)
            return cross.read(h_TD, k_YTKHE[layer], v_YTKHE[layer], own)

        look = Cached(state.decoder, rows, position, newest)
        return decoder.logits(decoder.states(states[-1], position, look, read_patches))

    def _decide(
        self, state: DecodeState, rows: Tensor, position: Tensor, turn: Tensor, ids: Tensor, found: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For each entry the start of the patch that it is in, and whether it closes that patch."""
        assert self.patching is not None
        history = state.history
        begin, closes = torch.empty_like(position), torch.empty_like(position, dtype=torch.bool)
        history.entropies[rows, position % HISTORY] = found
        for number in range(int(turn.max()) + 1):  # each needs what was decided before it
            now = (turn == number).nonzero()[:, 0]
            row, at = rows[now], position[now]
            before = PatchState(
                position=at,
                previous_id=state.last(history.ids, row, at),
                previous_entropy=state.last(history.entropies, row, at),
                since_start=state.last(history.since_start, row, at),
                tails=[state.tails[r][a] for r, a in zip(*_lists(row, at), strict=True)] if state.tails else [],
            )
            after, starts = step(before, ids[now], found[now], self.patching)
            if state.tails:
                for r, a, tail in zip(*_lists(row, at), after.tails, strict=True):
                    state.tails[r][a + 1 :] = [tail]
            begin[now], closes[now] = state.last(history.patch_start, row, at), starts
            history.since_start[row, at % HISTORY] = after.since_start
            history.patch_start[row, at % HISTORY] = torch.where(starts, at + 1, begin[now])
            history.num_patches[row, at % HISTORY] = state.last(history.num_patches, row, at) + starts
        return begin, closes

    def _close(self, state: DecodeState, rows: Tensor, begin: Tensor, end: Tensor) -> None:
        """Run the global transformer for the patches [P] of `rows` that hold the positions `begin` to `end`."""
        assert isinstance(self.model, BLTModel)
        assert state.open_bytes is not None
        assert state.patches is not None
        kept, encoder = state.open_bytes, self.model.encoder
        size = end - begin + 1
        offset = torch.arange(int(size.max()), device=rows.device)
        patch, inner = (offset < size[:, None]).nonzero(as_tuple=True)
        row, slot = rows[patch], (begin[patch] + inner) % kept.size
        h_TD = kept.h[row, slot]
        runs = runs_of(patch, len(rows))
        patches_PKD = encoder.queries(pool_patches(h_TD, runs))
        for layer, cross in enumerate(encoder.cross_attention):
            assert isinstance(cross, GatherBytes)
            k, v = kept.k[layer][row, slot], kept.v[layer][row, slot]
            patches_PKD = cross.add(patches_PKD, attend_to_own_bytes(cross.queries(patches_PKD), k, v, runs))
        number = state.history.num_patches[rows, end % HISTORY] - 1
        newest = int(number.max())
        state.patches.make_room(newest + 1)
        look = Cached(state.patches, rows, number, newest)
        self._keep_patch_keys(state, self.model.global_transformer(patches_PKD, number, look), rows, number)

    def _keep_bytes(
        self, state: DecodeState, states: list[Tensor], rows: Tensor, position: Tensor, longest: int
    ) -> None:
        """Keep the encoder's states of bytes [T]; `longest` bytes are in the longest open patch."""
        assert isinstance(self.model, BLTModel)
        assert state.open_bytes is not None
        state.open_bytes.make_room(longest + SLACK, state.position)
        kept = state.open_bytes
        here = (rows, position % kept.size)
        kept.h[here] = states[0].to(kept.h.dtype)
        for layer, (cross, h_TD) in enumerate(zip(self.model.encoder.cross_attention, states, strict=True)):
            assert isinstance(cross, GatherBytes)
            k, v = cross.keys_values(h_TD)
            kept.k[layer][here], kept.v[layer][here] = k.to(kept.k.dtype), v.to(kept.v.dtype)

    def _remember_patches(
        self, state: DecodeState, batch: PatchedStream, found: Tensor | None, starts: Tensor, newest: Tensor
    ) -> None:
        """Fill the history of the places `newest` of a stream."""
        assert self.patching is not None
        position, index = batch.position, torch.arange(len(starts), device=starts.device)
        without_limit = self.patching.model_copy(update={"max_patch_length": None})
        natural = next_starts(batch.ids, found, position, without_limit)
        values = {
            "since_start": torch.where(natural, 0, index + 1 - _begin(natural, position)),
            "patch_start": torch.where(starts, position + 1, position[_begin(starts, position)]),
            "num_patches": batch.patch_position[batch.patch] + starts,
        }
        here = (batch.document[newest], position[newest] % HISTORY)
        for name, value in values.items():
            getattr(state.history, name)[here] = value[newest]
        if self.patching.mode == "bpe":
            state.tails = [[Tail()] for _ in state.position]
            for row, tails in enumerate(state.tails):  # padding is in no row
                for i in batch.ids[batch.document == row].tolist():
                    tails.append(tails[-1].read(i, str(self.patching.tokenizer)))

    def _keep_patch_keys(self, state: DecodeState, patches_PG: Tensor, rows: Tensor, number: Tensor) -> None:
        assert isinstance(self.model, BLTModel)
        assert state.patch_keys is not None
        kept, decoder = state.patch_keys, self.model.decoder
        keys_PKD = decoder.keys(patches_PG).to(kept.k.dtype)
        for layer, cross in enumerate(decoder.cross_attention):
            assert isinstance(cross, ReadPatches)
            k, v = cross.keys_values(keys_PKD)
            kept.k[layer][rows, number % SLACK], kept.v[layer][rows, number % SLACK] = k, v


def _begin(starts: Tensor, position: Tensor) -> Tensor:
    """For each place of a stream the place where its patch begins, where `starts` says it of the id after each."""
    follows = torch.cat([torch.zeros_like(starts[:1]), starts[:-1]])
    index = torch.arange(len(starts), device=starts.device)
    return torch.where((position == 0) | follows, index, 0).cummax(0).values


def _lists(*values: Tensor) -> list[list[int]]:
    return [value.tolist() for value in values]
