"""The model behind the routes: the scheduler, and what is read of texts between its steps."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bytelatent.blt import BLT
from bytelatent.inference import Decoder, prompt_bytes, prompt_ids
from bytelatent.inference.kv_cache import BLTDecodeState, DecodeState
from bytelatent.model import entropies, pack_rows
from bytelatent.patching import PatchSettings
from bytelatent.serving.answers import Plain
from bytelatent.serving.choices import ByteInfo
from bytelatent.serving.errors import ApiError
from bytelatent.serving.patches import own_settings, patch_entropies, patches_answer
from bytelatent.serving.scheduler import Job, QueueFull, Scheduler, Statistics, Stopping, Ticket, Update
from bytelatent.text.chat import DEFAULT_TEMPLATE
from bytelatent.vocab import BOS, OFFSET, decode, encode

Result = TypeVar("Result")

# Shapes: N ids of a text, T of a piece of it, V vocabulary

PIECE = 2048  # ids that the entropy model alone reads between two steps
NATS_PER_BIT = math.log(2)


class Backend:
    """
    Args:
        scheduler: of the model.
    """

    def __init__(self, blt: BLT, scheduler: Scheduler):
        self.blt, self.scheduler = blt, scheduler

    @property
    def context(self) -> int:
        return self.blt.context

    @property
    def places(self) -> int:
        """Texts that can be asked for at once."""
        return self.scheduler.places

    def statistics(self) -> Statistics:
        return self.scheduler.statistics()

    def ids_of(self, prompt: str | list[int]) -> Tensor:
        """The ids [N] of a prompt, BOS first.

        Raises:
            UserError: it holds half of a surrogate pair.
        """
        if isinstance(prompt, str):
            return prompt_ids(prompt)
        return torch.tensor(prompt if prompt[0] == BOS else [BOS, *prompt])

    def text_bytes(self, text: str) -> bytes:
        """
        Raises:
            UserError: it holds half of a surrogate pair.
        """
        return prompt_bytes(text)

    def bytes_of(self, ids: Tensor) -> bytes:
        """The bytes of a prompt, without special ids."""
        return decode(ids.numpy())

    def chat_prompt(self, messages: list[Plain]) -> tuple[Tensor, tuple[str, ...]]:
        """The ids of a chat [N] up to where the answer begins, and the texts that end it.

        Raises:
            UserError: the template refuses the messages.
        """
        template = self.blt.chat_template or DEFAULT_TEMPLATE
        return torch.from_numpy(template.ids(messages)), template.stops

    def submit(self, job: Job, on_update: Callable[[list[Update]], None]) -> Ticket:
        """
        Raises:
            ApiError: the queue is full, or the server is stopping.
            UserError: the job is not valid.
        """
        try:
            return self.scheduler.submit(job, on_update)
        except QueueFull as full:
            wait = {"Retry-After": str(math.ceil(full.retry_after_s))}
            raise ApiError(429, f"{full}", headers=wait) from None
        except Stopping as stopping:
            raise ApiError(503, f"{stopping}", headers={"Retry-After": "5"}) from None

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of a function that the engine's thread runs between two steps."""
        try:
            return await asyncio.wrap_future(self.scheduler.call(function))
        except Stopping as stopping:
            raise ApiError(503, f"{stopping}", headers={"Retry-After": "5"}) from None

    async def read_prompt(self, ids: Tensor, num_alternatives: int) -> list[ByteInfo]:
        """What the model predicts of each byte of a prompt; of special ids within it nothing is shown."""
        found: list[ByteInfo] = []
        async for new, log_p_TV in self._predictions(ScoredText(self.blt, ids)):
            top = log_p_TV.topk(max(num_alternatives, 1))
            values = log_p_TV.gather(1, new[:, None])[:, 0].tolist()
            for id_, value, *pair in zip(new.tolist(), values, top.indices.tolist(), top.values.tolist(), strict=True):
                if id_ >= OFFSET:
                    alternatives = list(zip(*pair, strict=True))[:num_alternatives]
                    found.append(ByteInfo(id_ - OFFSET, value, alternatives, False))
        return found

    async def _predictions(self, document: "ScoredText") -> AsyncIterator[tuple[Tensor, Tensor]]:
        """The ids of a document after its first [T], and their log-probabilities, float64 [T, V], piece by piece.

        Between the pieces others decode, and a task that is cancelled ends.
        """
        while (at := document.position) < len(document.ids) - 1:
            log_p_TV = await self.call(lambda: document.read(self.scheduler.prefill_chunk))
            yield document.ids[at + 1 : document.position + 1], log_p_TV

    async def patches(self, data: bytes, modes: Sequence[str], threshold: float | None, with_patches: bool) -> Plain:
        """The answer of `/v1/patches`.

        Raises:
            UserError: there is no such mode, or the model's patches have no threshold.
        """
        own = own_settings(self.blt, threshold)
        found = await self._entropies(data, own) if own.needs_entropies else None
        return await asyncio.to_thread(patches_answer, self.blt, data, modes, threshold, with_patches, found)

    async def _entropies(self, data: bytes, own: PatchSettings) -> Tensor:
        """Of the ids of a text [N], BOS first; a long one is read in pieces between which others decode."""
        ids = prompt_ids(data).to(self.blt.device)
        if own.reset_at_newline or len(ids) <= PIECE:
            return await self.call(lambda: patch_entropies(self.blt, own, pack_rows([ids])))
        byte_lm = self.blt.needed_entropy_model()
        assert byte_lm is not None
        decoder = Decoder(byte_lm, None, None)
        first, *others = ids.split(PIECE)
        state, logits = await self.call(lambda: decoder.prefill([first]))
        found = [entropies(logits)]
        for piece in others:
            slots = torch.zeros_like(piece)
            logits = await self.call(lambda piece=piece, slots=slots: decoder.extend(state, slots, piece))
            found.append(entropies(logits))
        return torch.cat(found)

    async def score(self, texts: Sequence[bytes], end: bool, each: bool) -> list[Plain]:
        """How well the model predicts texts, read in pieces of its context, as `blt eval` does.

        Args:
            end: whether the end of each text is predicted, too.
            each: whether the log-probability of each byte is there.
        """
        found: list[Plain] = []
        for group in _groups(texts, self.scheduler.prefill_chunk):
            if len(group) == 1 and len(group[0]) >= self.scheduler.prefill_chunk:
                found.append(await self._score_long(group[0], end, each))
                continue
            read = await self.call(lambda group=group: self.blt.read(group, context=self.blt.context, end=end))
            found += [
                _score(len(reading.data), int(reading.starts.sum()), reading.log_probabilities.double(), each)
                for reading in read
            ]
        return found

    async def _score_long(self, data: bytes, end: bool, each: bool) -> Plain:
        """The score of one text, as `BLT.read` has it."""
        ids, context = torch.from_numpy(encode(data)), self.blt.context
        values: list[Tensor] = []
        num_patches, size = 0, self.scheduler.prefill_chunk
        first = ScoredText(self.blt, ids[:2])
        await self.call(lambda: first.read(1))
        if context <= size:
            at = 0
            for rows in _batches(ids[:-1].split(context), size // context):
                log_p_TV, count = await self.call(lambda rows=rows: _read_rows(self.blt, rows))
                values.append(log_p_TV.gather(1, ids[at + 1 : at + 1 + len(log_p_TV), None])[:, 0])
                at, num_patches = at + len(log_p_TV), num_patches + count
            return _score(len(data), num_patches - first.first_closes, torch.cat(values)[: len(data) + end], each)
        for begin in range(0, len(ids) - 1, context):
            document = ScoredText(self.blt, ids[begin : begin + context + 1])
            async for new, log_p_TV in self._predictions(document):
                values.append(log_p_TV.gather(1, new[:, None])[:, 0])
            num_patches += document.num_patches
        return _score(len(data), num_patches - first.first_closes, torch.cat(values)[: len(data) + end], each)


class ScoredText:
    """Ids [N] that a model reads in pieces, all but the last one, which it only predicts.

    Attributes:
        position: ids that are read.
        first_closes: whether what was read first is whole patches.
    """

    def __init__(self, blt: BLT, ids: Tensor):
        self.ids, self.position, self.first_closes = ids, 0, False
        self._decoder = Decoder(blt.model, blt.patching, blt.needed_entropy_model())
        self._state: DecodeState | None = None

    @property
    def num_patches(self) -> int:
        """Of what is read."""
        assert isinstance(self._state, BLTDecodeState)
        return int(self._state.num_patches[0] + (self._state.open_count[0] > 0))

    def read(self, size: int) -> Tensor:
        """Log-probabilities of what follows each of the next ids, float64 [T, V]."""
        piece = self.ids[self.position : min(self.position + size, len(self.ids) - 1)].to(self._decoder.device)
        if self._state is None:
            self._state, logits_TV = self._decoder.prefill([piece])
            self.first_closes = bool(self._state.open_count[0] == 0)
        else:
            logits_TV = self._decoder.extend(self._state, torch.zeros_like(piece), piece)
        self.position += len(piece)
        return logits_TV.cpu().double().log_softmax(-1)


def _read_rows(blt: BLT, rows: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Log-probabilities of what follows each id of rows [T, V], float64, and the number of patches."""
    decoder = Decoder(blt.model, blt.patching, blt.needed_entropy_model())
    state, logits_TV = decoder.prefill(rows)
    assert isinstance(state, BLTDecodeState)
    return logits_TV.cpu().double().log_softmax(-1), int((state.num_patches + (state.open_count > 0)).sum())


def _batches(rows: Sequence[Tensor], size: int) -> Iterator[Sequence[Tensor]]:
    yield from (rows[at : at + size] for at in range(0, len(rows), size))


def _groups(texts: Sequence[bytes], size: int) -> Iterator[list[bytes]]:
    """The texts in groups that are read between two steps."""
    group: list[bytes] = []
    for data in texts:
        if group and sum(map(len, group)) + len(group) + len(data) >= size:
            yield group
            group = []
        group.append(data)
    if group:
        yield group


def _score(size: int, num_patches: int, values: Tensor, each: bool) -> Plain:
    """
    Args:
        values: log-probabilities, float64, of each byte and perhaps of the end.
    """
    total = float(values.sum())
    return {
        "bytes": size,
        "patches": num_patches,
        "log_probability": total,
        "bits_per_byte": -total / NATS_PER_BIT / size if size else None,
        "log_probabilities": values.tolist() if each else None,
    }
