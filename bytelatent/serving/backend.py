"""The model behind the routes: the scheduler, and what is read of texts between its steps."""

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from bytelatent.blt import BLT, TextReading
from bytelatent.inference import Decoder, prompt_bytes, prompt_ids
from bytelatent.model import entropies
from bytelatent.patching import PatchSettings
from bytelatent.serving.answers import Plain
from bytelatent.serving.choices import ByteInfo
from bytelatent.serving.errors import ApiError
from bytelatent.serving.patches import own_settings, patches_answer
from bytelatent.serving.scheduler import Job, QueueFull, Scheduler, Statistics, Stopping, Ticket, Update
from bytelatent.text.chat import DEFAULT_TEMPLATE
from bytelatent.vocab import BOS, OFFSET, decode

Result = TypeVar("Result")

# Shapes: N ids of a text, V vocabulary

PIECE = 2048  # ids that are read between two steps, so that streams do not wait
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

    def text_of(self, ids: Tensor) -> str:
        """The text of a prompt."""
        return decode(ids.numpy()).decode("utf-8", "replace")

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

        def read() -> list[ByteInfo]:
            row = ids[None].to(self.blt.device)
            with torch.no_grad():
                log_p_NV = self.blt.logits(row)[0].double().log_softmax(-1)
            found = log_p_NV[:-1].gather(1, row[0, 1:, None])[:, 0].tolist()
            top = log_p_NV[:-1].topk(max(num_alternatives, 1))
            tops = [
                list(zip(*pair, strict=True)) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            each = zip(ids[1:].tolist(), found, tops, strict=True)
            return [
                ByteInfo(id_ - OFFSET, value, alternatives[:num_alternatives], False)
                for id_, value, alternatives in each
                if id_ >= OFFSET
            ]

        return await self.call(read)

    async def patches(self, data: bytes, modes: Sequence[str], threshold: float | None, with_patches: bool) -> Plain:
        """The answer of `/v1/patches`.

        Raises:
            UserError: there is no such mode, or the model's patches have no threshold.
        """
        own = own_settings(self.blt, threshold)
        found = await self._entropies(data, own) if own.needs_entropies else None
        return await self.call(lambda: patches_answer(self.blt, data, modes, threshold, with_patches, found))

    async def _entropies(self, data: bytes, own: PatchSettings) -> Tensor | None:
        """Of the ids of a long text [N], BOS first, read in pieces between which others decode; None of a short one."""
        ids = prompt_ids(data).to(self.blt.device)
        if own.reset_at_newline or len(ids) <= PIECE:
            return None
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
        for group in _groups(texts):
            read = await self.call(lambda group=group: self.blt.read(group, context=self.blt.context, end=end))
            found += [_score(reading, each) for reading in read]
        return found


def _groups(texts: Sequence[bytes]) -> Iterator[list[bytes]]:
    """The texts in groups that are read between two steps."""
    group: list[bytes] = []
    for data in texts:
        if group and sum(map(len, group)) + len(group) + len(data) >= PIECE:
            yield group
            group = []
        group.append(data)
    if group:
        yield group


def _score(reading: TextReading, each: bool) -> Plain:
    values = reading.log_probabilities.double()
    total, size = float(values.sum()), len(reading.data)
    return {
        "bytes": size,
        "patches": int(reading.starts.sum()),
        "log_probability": total,
        "bits_per_byte": -total / NATS_PER_BIT / size if size else None,
        "log_probabilities": values.tolist() if each else None,
    }
