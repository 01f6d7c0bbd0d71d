"""Continuous batching: sequences join and leave a fixed number of slots, each as if it were alone.

`Slots` hold what is on the device and draw one id per slot at a time; `Engine` assigns sequences to slots, and turns
ids into bytes, stops and ends.
"""

from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

from bytelatent.device import outside_inference_mode
from bytelatent.errors import UserError
from bytelatent.inference.constraint import Constraint
from bytelatent.inference.continuation import Allowances, Continuation, Drawn, StopTexts
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import DecodeState
from bytelatent.inference.sampling import SamplingSlots
from bytelatent.inference.settings import Sampling, check_limits
from bytelatent.vocab import BYTES, Vocabulary, to_bytes

# Shapes: B slots, V vocabulary

PREFILL_IDS = 65_536  # prompt ids read at once


class Slots(Protocol):
    """Slots that draw and read ids, one each at a time."""

    def admit(self, slot: int, state: DecodeState, source: int, logits: Tensor, which: Continuation) -> None:
        """Put a sequence into a slot: slot `source` of a state, and the logits [V] of what comes next."""
        ...

    def release(self, slot: int) -> None:
        """Free a slot."""
        ...

    def advance(self) -> None:
        """Draw and read one id in each slot."""
        ...

    def drawn(self) -> list[Drawn]:
        """What has become known since the last call, in order."""
        ...


class PlainSlots:
    """Slots in plain PyTorch: every step is known at once."""

    def __init__(self, decoder: Decoder, num_slots: int, vocabulary: Vocabulary = BYTES):
        self.decoder, self.eos = decoder, vocabulary.eos
        self.state = decoder.empty(num_slots)
        self.sampling = SamplingSlots.empty(num_slots, decoder.device, vocabulary, decoder.vocab_size)
        self.logits_BV = torch.zeros(num_slots, decoder.vocab_size, device=decoder.device)
        self._in_slot: list[Continuation | None] = [None] * num_slots
        self._drawn: list[Drawn] = []
        self._allowances = Allowances(num_slots)

    def admit(self, slot: int, state: DecodeState, source: int, logits: Tensor, which: Continuation) -> None:
        self.state.put(slot, state, source)
        self.sampling.put(slot, which.sampling, which.prompt, which.max_new_bytes, which.constraint is not None)
        self._allowances.forget(slot)
        self.logits_BV[slot] = logits
        self._in_slot[slot] = which

    def release(self, slot: int) -> None:
        self._in_slot[slot] = None

    @torch.no_grad()
    def advance(self) -> None:
        self.sampling.constrain(*self._allowances.new(self._in_slot))
        active = torch.tensor([which is not None for which in self._in_slot], device=self.decoder.device)
        ids, log_probabilities = self.sampling.draw(self.logits_BV)
        self.sampling.read(ids, active)
        new = zip(
            self._in_slot, ids.tolist(), log_probabilities.tolist(), self.sampling.remaining.tolist(), strict=True
        )
        unfinished = []
        for slot, (which, drawn, log_probability, remaining) in enumerate(new):
            if which is not None:
                self._drawn.append(Drawn(which, drawn, log_probability))
                if drawn != self.eos and remaining > 0:
                    unfinished.append(slot)
        if unfinished:
            slots = torch.tensor(unfinished, device=self.decoder.device)
            self.logits_BV[slots] = self.decoder.extend(self.state, slots, ids[slots])

    def drawn(self) -> list[Drawn]:
        drawn, self._drawn = self._drawn, []
        return drawn


def prompt_ids(text: str | bytes, vocabulary: Vocabulary = BYTES) -> Tensor:
    """BOS and the bytes or tokens of a prompt, [N].

    Raises:
        UserError: as `prompt_bytes`.
    """
    return torch.from_numpy(vocabulary.encode(prompt_bytes(text), eos=False))


def prompt_bytes(text: str | bytes) -> bytes:
    """The bytes of a prompt, those included for which the system's own surrogates stand in a str.

    Raises:
        UserError: it is neither str nor bytes, or holds half of a surrogate pair: no character, and nothing that
            training text holds.
    """
    if isinstance(text, str):
        try:
            text.encode("utf-8", errors="surrogateescape")
        except UnicodeEncodeError as error:
            raise UserError(
                f"prompt: {text[error.start]!a} at character {error.start + 1} is half of a surrogate pair; "
                "write the whole character, or give bytes"
            ) from None
    return to_bytes(text)


def _checked_ids(prompt: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The ids [N] of a prompt, int64."""
    if prompt.dim() != 1:
        raise UserError(f"prompt: ids [N] of one text, not {list(prompt.shape)}")
    if len(prompt) == 0:
        raise UserError("prompt: it holds no ids; a document begins with BOS")
    if prompt.is_floating_point() or bool(((prompt < 0) | (prompt >= vocabulary.size)).any()):
        raise UserError(f"prompt: ids are whole numbers from 0 to {vocabulary.size - 1}")
    return prompt.long()


class Engine:
    """Sequences in slots.

    Args:
        decoder: reads prompts.
        slots: draw and read the bytes that follow.
        batch_size: sequences decoded at once; others wait.
        vocabulary: of the ids.
    """

    def __init__(self, decoder: Decoder, slots: Slots, batch_size: int, vocabulary: Vocabulary = BYTES):
        self.decoder, self.vocabulary = decoder, vocabulary
        self.slots = slots
        self._in_slot: list[Continuation | None] = [None] * batch_size
        self._waiting: deque[list[Continuation]] = deque()  # those of one prompt together

    @classmethod
    @outside_inference_mode
    def plain(cls, decoder: Decoder, batch_size: int, vocabulary: Vocabulary = BYTES) -> "Engine":
        """One in plain PyTorch."""
        check_limits(batch_size=batch_size)
        return cls(decoder, PlainSlots(decoder, batch_size, vocabulary), batch_size, vocabulary)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return sum(map(len, self._waiting))

    @property
    def num_busy(self) -> int:
        """Sequences in slots."""
        return sum(which is not None for which in self._in_slot)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not any(self._in_slot)

    def submit(
        self,
        prompt: str | bytes | Tensor,
        sampling: Sampling,
        max_new_bytes: int,
        samples: int = 1,
        **more: Any,
    ) -> list[Continuation]:
        """Ask for continuations of a prompt, which is read once for all of them; the arguments are those of `asked`."""
        asked = self.asked(prompt, sampling, max_new_bytes, samples, **more)
        self.enqueue(asked)
        return asked

    def asked(
        self,
        prompt: str | bytes | Tensor,
        sampling: Sampling,
        max_new_bytes: int,
        samples: int = 1,
        num_alternatives: int = 0,
        constraint: Constraint | None = None,
    ) -> list[Continuation]:
        """Continuations of a prompt, for `enqueue`; their seeds follow one another. Any thread may call it.

        Args:
            prompt: a text, or [N] ids, BOS first.
            max_new_bytes: where each ends, unless the model ends the text before; at most `MAX_NEW_BYTES`.
            samples: 1 to `MAX_SAMPLES`.
            num_alternatives: most likely ids to report for each drawn one.
            constraint: what each text must meet, however it is sampled. One that ends with its length may not.

        Raises:
            UserError: the prompt is neither text nor ids, or holds none; a number is out of range.
        """
        vocabulary = self.vocabulary
        given = _checked_ids(prompt, vocabulary) if isinstance(prompt, Tensor) else prompt_ids(prompt, vocabulary)
        if not isinstance(sampling, Sampling):
            raise UserError(f"sampling: {type(sampling).__name__} is no Sampling; write Sampling(temperature=0.8)")
        check_limits(max_new_bytes=max_new_bytes, samples=samples)
        if sampling.valid_utf8 and vocabulary.is_tokens:
            raise UserError("valid_utf8: a token LM draws tokens, some of which end within a character; leave it out")
        if constraint is not None and vocabulary.is_tokens:
            raise UserError(f"{constraint.kind}: a token LM draws tokens, and only bytes are constrained; leave it out")
        stops = [to_bytes(stop) for stop in sampling.stop]
        return [
            Continuation(
                given,
                sampling.model_copy(update={"seed": sampling.seed + number}),
                max_new_bytes,
                num_alternatives,
                vocabulary=vocabulary,
                constraint=constraint,
                _stop_texts=StopTexts(stops) if stops else None,
            )
            for number in range(samples)
        ]

    def enqueue(self, asked: list[Continuation]) -> None:
        """Let continuations of one prompt wait for slots."""
        self._waiting.append(list(asked))

    @outside_inference_mode
    def cancel(self, which: Continuation) -> None:
        """End a sequence where it is."""
        if which.ended is None:
            which.ended = "cancelled"
        others = ([other for other in waiting if other is not which] for waiting in self._waiting)
        self._waiting = deque(waiting for waiting in others if waiting)
        self._release_ended()

    @outside_inference_mode
    def advance(self) -> list[Continuation]:
        """Admit waiting sequences and decode a step; the sequences that have become longer."""
        self._admit()
        if any(self._in_slot):
            self.slots.advance()
        longer: dict[int, Continuation] = {}
        for drawn in self.slots.drawn():
            if drawn.which.ended is None:
                drawn.which.take(drawn)
                longer[id(drawn.which)] = drawn.which
        self._release_ended()
        return list(longer.values())

    def run(self) -> None:
        """Decode until every sequence has ended."""
        while not self.is_idle:
            self.advance()

    def _admit(self) -> None:
        """Read the prompts of waiting sequences, as many as there are free slots for."""
        free = [slot for slot, which in enumerate(self._in_slot) if which is None]
        while free and self._waiting:
            group: list[list[Continuation]] = []
            num_ids, num_free = 0, len(free)
            while self._waiting and num_free:
                size = len(self._waiting[0][0].prompt)
                if group and num_ids + size > PREFILL_IDS:
                    break
                waiting = self._waiting.popleft()
                if len(waiting) > num_free:
                    self._waiting.appendleft(waiting[num_free:])
                group.append(waiting[:num_free])
                num_ids += size
                num_free -= len(group[-1])
            state, logits = self.decoder.prefill([waiting[0].prompt for waiting in group], last_only=True)
            for source, waiting in enumerate(group):
                for which in waiting:
                    slot = free.pop(0)
                    self._in_slot[slot] = which
                    self.slots.admit(slot, state, source, logits[source], which)

    def _release_ended(self) -> None:
        for slot, which in enumerate(self._in_slot):
            if which is not None and which.ended is not None:
                self.slots.release(slot)
                self._in_slot[slot] = None
