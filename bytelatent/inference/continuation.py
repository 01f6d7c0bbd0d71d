"""A sequence that is decoded: ids become bytes, stop texts are watched for, ends decided."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference.constraint import Constraint, ConstraintState
from bytelatent.inference.sampling import Start
from bytelatent.inference.settings import Sampling
from bytelatent.inference.utf8 import CharacterStream, whole_characters
from bytelatent.vocab import BYTES, Vocabulary, decode

Reason = Literal["end of text", "length", "stop", "cancelled", "failed"]
Alternatives = list[tuple[int, float]]  # ids and their log-probabilities, the likeliest first


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
        num_alternatives: ids that `alternatives` lists for each drawn one.
        ids: what was drawn, a stop text and EOS included.
        log_probabilities: the model's own, of each of `ids`, in nats.
        starts: of each of `ids` whether it begins a patch.
        alternatives: for each of `ids` the most likely ones, where asked for.
        constraint: what the text must meet.
        prompt_patches: patches of the prompt, that of BOS included; None before it was read.
        ended: why nothing more will come; None as long as more may.
        failure: what went wrong, where it `failed`; a UserError where its constraint left nothing to draw.
    """

    prompt: Tensor
    sampling: Sampling
    max_new_bytes: int
    num_alternatives: int = 0
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    starts: list[bool] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    ended: Reason | None = None
    failure: Exception | None = None
    vocabulary: Vocabulary = BYTES
    constraint: Constraint | None = None
    prompt_patches: int | None = None
    _constraint_state: ConstraintState | None = None
    _data: bytearray = field(default_factory=bytearray)  # without a stop text
    _stop_texts: StopTexts | None = None
    _num_given: int = 0  # bytes that `new_bytes` has returned
    _characters: CharacterStream = field(default_factory=CharacterStream)

    @property
    def start(self) -> Start:
        return Start(self.sampling, self.prompt, self.max_new_bytes, self.constraint is not None)

    @property
    def data(self) -> bytes:
        """The bytes so far, without a stop text; with `valid_utf8` whole characters only."""
        return bytes(self._data[: self._whole(len(self._data))])

    @property
    def text(self) -> str:
        """`data` as text; bytes that are not UTF-8 show as U+FFFD."""
        return self.data.decode("utf-8", errors="replace")

    @property
    def num_given(self) -> int:
        """Bytes that `new_bytes` has returned."""
        return self._num_given

    def new_bytes(self) -> bytes:
        """What came since the last call, without bytes that may turn out to begin a stop text or to be no whole
        character.
        """
        end = len(self._data)
        if self._stop_texts is not None and self.ended is None:
            end -= self._stop_texts.held_back()
        if self.sampling.valid_utf8:
            end = self._whole(end)
        new, self._num_given = bytes(self._data[self._num_given : end]), max(end, self._num_given)
        return new

    def _whole(self, end: int) -> int:
        """Where to cut the first `end` bytes: with `valid_utf8` before a character that is not whole, be it the
        prompt's last one.
        """
        if not self.sampling.valid_utf8:
            return end
        near = bytes(self._data[max(end - 3, 0) : end])  # no character needs more bytes to be finished
        if len(near) < 3:
            near = decode(self.prompt[-3:].numpy(force=True)) + near
        return max(end - (len(near) - len(whole_characters(near))), 0)

    def new_text(self) -> str:
        """The same in whole characters."""
        return self._characters.feed(self.new_bytes()) + (self._characters.finish() if self.ended else "")

    @property
    def constraint_state(self) -> ConstraintState | None:
        """What its constraint allows next."""
        if self._constraint_state is None and self.constraint is not None:
            self._constraint_state = self.constraint.start()
        return self._constraint_state

    def take(self, drawn: "Drawn") -> None:
        """Add a drawn id, and decide whether it is the last."""
        self.ids.append(drawn.id)
        self.log_probabilities.append(drawn.log_probability)
        self.starts.append(drawn.starts)
        if self.num_alternatives:
            self.alternatives.append(drawn.alternatives[: self.num_alternatives])
        if drawn.id == self.vocabulary.eos:
            self.ended = "end of text"
            return
        for byte in self.vocabulary.bytes_of[drawn.id]:
            self._data.append(byte)
            begins = self._stop_texts.feed(byte) if self._stop_texts is not None else None
            if begins is not None:
                del self._data[begins:]
                self.ended = "stop"
                return
            if len(self._data) >= self.max_new_bytes:
                self.ended = "length"
                break
        if (state := self.constraint_state) is not None:
            state.read(drawn.id)
            if state.is_complete and self.ended == "length":
                self.ended = "end of text"  # only EOS could follow, for which there is no room
            elif state.error is not None and self.ended is None:
                self.fail(UserError(f"{state.kind}: {state.error}"))

    def fail(self, failure: Exception) -> None:
        """End it because of an error."""
        self.ended, self.failure = "failed", failure


class Allowances:
    """Which slots need what their constraints allow next."""

    def __init__(self, num_slots: int):
        self._num_ids: list[int | None] = [None] * num_slots  # of each, after which it was given last

    def forget(self, slot: int) -> None:
        """Another sequence is in the slot."""
        self._num_ids[slot] = None

    def take_over(self, slot: int, other: "Allowances", source: int) -> None:
        """The sequence of slot `source` of others is in the slot."""
        self._num_ids[slot] = other._num_ids[source]

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


@dataclass(frozen=True)
class Drawn:
    """An id that was drawn for a sequence.

    Attributes:
        starts: whether it begins a patch.
        alternatives: the most likely ids, at least as many as the sequence asks for.
    """

    which: Continuation
    id: int
    log_probability: float
    starts: bool = False
    alternatives: Alternatives = field(default_factory=list)
