"""Continuous batching: sequences join and leave a fixed number of slots, each as if it were alone.

`Slots` hold what is on the device and draw one id per slot at a time; `Engine` assigns sequences to slots, and turns
ids into bytes, stops and ends.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from bytelatent.device import outside_inference_mode
from bytelatent.errors import UserError
from bytelatent.inference.constraint import Constraint, ConstraintState
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import DecodeState
from bytelatent.inference.sampling import CharacterStream, SamplingSlots, whole_characters
from bytelatent.inference.settings import Sampling, check_limits
from bytelatent.vocab import BYTES, Vocabulary, decode, to_bytes

# Shapes: B slots, V vocabulary

PREFILL_IDS = 65_536  # prompt ids read at once
Reason = Literal["end of text", "length", "stop", "cancelled", "constraint"]


class StopTexts:
    """Watches the bytes of one output for stop texts.

    A match begins and ends at any byte; characters and patches play no part. The first to be completed counts, and
    among those completed by the same byte the longest.

    Args:
        stops: texts to watch for; none may be empty.

    Source: Knuth, Morris and Pratt 1977.
    """

    def __init__(self, stops: Sequence[bytes]):
        assert all(stops), "an empty text would end every output before it begins"
        self._stops = [(stop, _fallbacks(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # of each, the longest beginning that the output ends with
        self._num_bytes = 0

    def feed(self, byte: int) -> int | None:
        """Watch the output's next byte.

        Returns:
            The number of bytes before the stop text that this byte completes; None if it completes none.
        """
        self._num_bytes += 1
        complete = 0
        for index, (stop, fallbacks) in enumerate(self._stops):
            size = self._matched[index]
            while size and stop[size : size + 1] != bytes([byte]):
                size = fallbacks[size]
            self._matched[index] = size = size + (stop[size] == byte)
            complete = max(complete, size if size == len(stop) else 0)
        return self._num_bytes - complete if complete else None

    def held_back(self) -> int:
        """The number of newest bytes that may turn out to begin a stop text, and should not be shown yet."""
        return max(self._matched, default=0)


def _fallbacks(stop: bytes) -> list[int]:
    """By size of a beginning of `stop`: the longest shorter beginning that it ends with."""
    fallbacks = [0, 0]
    for byte in stop[1:]:
        size = fallbacks[-1]
        while size and stop[size] != byte:
            size = fallbacks[size]
        fallbacks.append(size + (stop[size] == byte))
    return fallbacks


@dataclass(eq=False)
class Continuation:
    """A sequence that is decoded.

    Attributes:
        max_new_bytes: where it ends. The last token of a token LM may reach over it, and is cut.
        ids: what was drawn, a stop text and EOS included.
        log_probabilities: the model's own, of each of `ids`, in nats.
        ended: why nothing more will come; None as long as more may. "constraint": nothing was left to draw, and
            `error` says why.
        constraint: what the text must meet, and its state once a byte was drawn.
    """

    prompt: Tensor
    sampling: Sampling
    max_new_bytes: int
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    ended: Reason | None = None
    vocabulary: Vocabulary = BYTES
    constraint: Constraint | None = None
    _constraint_state: ConstraintState | None = None
    _num_bytes: int = 0
    _stop_texts: StopTexts | None = None
    _stop_begins: int | None = None
    _num_given: int = 0  # bytes that `new_bytes` has returned
    _characters: CharacterStream = field(default_factory=CharacterStream)

    @property
    def data(self) -> bytes:
        """The bytes so far, without a stop text; with `valid_utf8` whole characters only."""
        return self._whole(self._bytes())

    @property
    def text(self) -> str:
        """`data` as text; bytes that are not UTF-8 show as U+FFFD."""
        return self.data.decode("utf-8", errors="replace")

    def new_bytes(self) -> bytes:
        """What came since the last call, without bytes that may turn out to begin a stop text or to be no whole
        character.
        """
        data = self._bytes()
        if self._stop_texts is not None and self.ended is None:
            data = data[: len(data) - self._stop_texts.held_back()]
        data = self._whole(data)
        new, self._num_given = data[self._num_given :], max(len(data), self._num_given)
        return new

    def _bytes(self) -> bytes:
        end = self.max_new_bytes if self._stop_begins is None else self._stop_begins
        return self.vocabulary.decode(self.ids)[:end]

    def _whole(self, data: bytes) -> bytes:
        """The bytes; with `valid_utf8` without a character that is not whole, be it the prompt's last one."""
        if not self.sampling.valid_utf8:
            return data
        before = decode(self.prompt[-3:].numpy(force=True))  # no character needs more bytes to be finished
        return whole_characters(before + data)[len(before) :]

    def new_text(self) -> str:
        """The same in whole characters."""
        return self._characters.feed(self.new_bytes()) + (self._characters.finish() if self.ended else "")

    @property
    def constraint_state(self) -> ConstraintState | None:
        """What its constraint allows next."""
        if self._constraint_state is None and self.constraint is not None:
            self._constraint_state = self.constraint.start()
        return self._constraint_state

    @property
    def error(self) -> str | None:
        return None if self._constraint_state is None else self._constraint_state.error

    def take(self, drawn: int, log_probability: float) -> None:
        """Add a drawn id, and decide whether it is the last."""
        self.ids.append(drawn)
        self.log_probabilities.append(log_probability)
        if drawn == self.vocabulary.eos:
            self.ended = "end of text"
            return
        for byte in self.vocabulary.bytes_of[drawn]:
            self._num_bytes += 1
            if self._stop_texts is not None:
                self._stop_begins = self._stop_texts.feed(byte)
            if self._stop_begins is not None:
                self.ended = "stop"
                return
            if self._num_bytes >= self.max_new_bytes:
                self.ended = "length"
        if (state := self.constraint_state) is not None:
            state.read(drawn)
            if state.is_complete and self.ended is not None:
                self.ended = "end of text"  # there is no room for EOS, which must come next
            elif state.error is not None and self.ended is None:
                self.ended = "constraint"


@dataclass(frozen=True)
class Drawn:
    """An id that was drawn for a sequence, and its log-probability."""

    which: Continuation
    id: int
    log_probability: float


class Allowances:
    """Which slots wait for what their constraints allow next."""

    def __init__(self, num_slots: int):
        self._num_ids: list[int | None] = [None] * num_slots  # of each, after which it was given last

    def forget(self, slot: int) -> None:
        """Another sequence is in the slot."""
        self._num_ids[slot] = None

    def new(self, in_slot: Sequence[Continuation | None]) -> tuple[list[int], list[np.ndarray]]:
        """The slots whose sequences have become longer, and what each one's constraint allows, bool [V]."""
        slots, allowed = [], []
        for slot, which in enumerate(in_slot):
            if which is None or which.ended is not None or self._num_ids[slot] == len(which.ids):
                continue
            if (state := which.constraint_state) is not None:
                self._num_ids[slot] = len(which.ids)
                slots.append(slot)
                allowed.append(state.allowed)
        return slots, allowed


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
        self.logits_BV[slot] = logits
        self._in_slot[slot] = which
        self._allowances.forget(slot)

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
    def is_idle(self) -> bool:
        return not self._waiting and not any(self._in_slot)

    def submit(
        self,
        prompt: str | bytes | Tensor,
        sampling: Sampling,
        max_new_bytes: int,
        samples: int = 1,
        constraint: Constraint | None = None,
    ) -> list[Continuation]:
        """Ask for continuations of a prompt, which is read once for all of them; their seeds follow one another.

        Args:
            prompt: a text, or [N] ids, BOS first.
            max_new_bytes: where each ends, unless the model ends the text before; at most `MAX_NEW_BYTES`.
            samples: 1 to `MAX_SAMPLES`.
            constraint: what each text must meet, however it is sampled. One that ends with its length may not.

        Raises:
            UserError: the prompt is neither text nor ids, or holds none; a number is out of range. Nothing is queued.
        """
        vocabulary = self.vocabulary
        given = _checked_ids(prompt, vocabulary) if isinstance(prompt, Tensor) else prompt_ids(prompt, vocabulary)
        if not isinstance(sampling, Sampling):
            raise UserError(f"sampling: {type(sampling).__name__} is no Sampling; write Sampling(temperature=0.8)")
        check_limits(max_new_bytes=max_new_bytes, samples=samples)
        if sampling.valid_utf8 and vocabulary.is_tokens:
            raise UserError("valid_utf8: a token LM draws tokens, some of which end within a character; leave it out")
        if constraint is not None and vocabulary.is_tokens:
            raise UserError(
                f"{constraint.kind}: a token LM draws tokens, and bytes are what is constrained; leave it out"
            )
        stops = [to_bytes(stop) for stop in sampling.stop]
        asked = [
            Continuation(
                given,
                sampling.model_copy(update={"seed": sampling.seed + number}),
                max_new_bytes,
                vocabulary=vocabulary,
                constraint=constraint,
                _stop_texts=StopTexts(stops) if stops else None,
            )
            for number in range(samples)
        ]
        self._waiting.append(list(asked))
        return asked

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
                drawn.which.take(drawn.id, drawn.log_probability)
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
