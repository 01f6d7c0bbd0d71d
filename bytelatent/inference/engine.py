"""Continuous batching: sequences join and leave a fixed number of rows, each as if it were alone.

`Slots` hold what is on the device and draws one id a row at a time; `Engine` says which sequence is in which row, and
turns ids into bytes, stops and ends.
"""

import reprlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference.decoder import Decoder, State
from bytelatent.inference.sampling import SamplingSlots
from bytelatent.inference.settings import MAX_BATCH_SIZE, MAX_NEW_BYTES, MAX_SAMPLES, Sampling
from bytelatent.inference.utf8 import CharacterStream, whole_characters
from bytelatent.vocab import EOS, OFFSET, VOCAB_SIZE, decode, encode, to_bytes

# Shapes: B rows, V vocabulary

PREFILL_IDS = 65_536  # prompt ids read at once
Reason = Literal["end of text", "length", "stop", "cancelled"]


class StopTexts:
    """Watches the bytes of one output for stop texts.

    A match begins and ends at any byte; characters and patches play no part. The first to be completed counts, and
    among those completed by the same byte the longest.

    Args:
        stops: texts to watch for; none may be empty.

    Source: Aho and Corasick 1975, with one step a byte whatever the number of texts.
    """

    def __init__(self, stops: Sequence[bytes]):
        assert all(stops), "an empty text would end every output before it begins"
        # A node stands for a beginning of some stop text; node 0 for none of it.
        self._next: list[dict[int, int]] = [{}]
        self._depth = [0]  # how long that beginning is
        self._longest = [0]  # the longest stop text that it ends with; 0: none
        for stop in stops:
            node = 0
            for byte in stop:
                if byte not in self._next[node]:
                    self._next[node][byte] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[node] + 1)
                    self._longest.append(0)
                node = self._next[node][byte]
            self._longest[node] = len(stop)
        self._fallback = [0] * len(self._next)  # the longest other beginning that this one ends with
        waiting = deque(self._next[0].values())
        while waiting:  # shorter beginnings first, since longer ones fall back on them
            node = waiting.popleft()
            self._longest[node] = self._longest[node] or self._longest[self._fallback[node]]
            for byte, after in self._next[node].items():
                self._fallback[after] = self._step(self._fallback[node], byte)
                waiting.append(after)
        self._node = 0
        self._num_bytes = 0

    def feed(self, byte: int) -> int | None:
        """Watch the output's next byte.

        Returns:
            How many bytes of output precede the stop text that this byte completes; None if it completes none.
        """
        self._num_bytes += 1
        self._node = self._step(self._node, byte)
        found = self._longest[self._node]
        return self._num_bytes - found if found else None

    def held_back(self) -> int:
        """How many of the newest bytes may turn out to begin a stop text, and should not be shown yet."""
        return self._depth[self._node]

    def _step(self, node: int, byte: int) -> int:
        """The longest beginning of a stop text with which the output ends once `byte` follows."""
        while node and byte not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(byte, 0)


@dataclass(eq=False)
class Continuation:
    """A sequence on its way.

    Attributes:
        ids: what was drawn, a stop text and EOS included.
        log_probabilities: the model's own, of each of `ids`, in nats.
        ended: why nothing more will come; None as long as more may.
    """

    prompt: Tensor
    sampling: Sampling
    max_new_bytes: int
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    ended: Reason | None = None
    _watch: StopTexts | None = None
    _stop_begins: int | None = None
    _told: int = 0
    _characters: CharacterStream = field(default_factory=CharacterStream)

    @property
    def data(self) -> bytes:
        """The bytes so far, without a stop text; with `valid_utf8` whole characters, also where a stop text is none."""
        return self._shown(decode(self.ids)[: self._stop_begins])

    @property
    def text(self) -> str:
        """`data` as text; bytes that are no UTF-8 show as U+FFFD."""
        return self.data.decode("utf-8", errors="replace")

    def new_bytes(self) -> bytes:
        """What came since the last call, but for bytes that may turn out to begin a stop text or to be no whole
        character.
        """
        data = decode(self.ids)[: self._stop_begins]
        if self._watch is not None and self.ended is None:
            data = data[: len(data) - self._watch.held_back()]
        data = self._shown(data)
        new, self._told = data[self._told :], max(len(data), self._told)
        return new

    def _shown(self, data: bytes) -> bytes:
        """What of these bytes is given out: with `valid_utf8` no part of a character, nor of the prompt's last one."""
        if not self.sampling.valid_utf8:
            return data
        before = decode(self.prompt[-3:].numpy(force=True))  # no character needs more bytes to be finished
        return whole_characters(before + data)[len(before) :]

    def new_text(self) -> str:
        """The same in whole characters."""
        return self._characters.feed(self.new_bytes()) + (self._characters.finish() if self.ended else "")

    def take(self, drawn: int, log_probability: float) -> None:
        """Note a drawn id, and whether it is the last."""
        self.ids.append(drawn)
        self.log_probabilities.append(log_probability)
        if drawn == EOS:
            self.ended = "end of text"
            return
        if self._watch is not None:
            self._stop_begins = self._watch.feed(drawn - OFFSET)
        if self._stop_begins is not None:
            self.ended = "stop"
        elif len(self.ids) >= self.max_new_bytes:
            self.ended = "length"


class Slots(Protocol):
    """Rows that draw and read ids, one each at a time."""

    def admit(self, row: int, state: State, source: int, logits: Tensor, which: Continuation) -> None:
        """Put a sequence into a row: row `source` of a state, and the logits [V] of what comes next."""
        ...

    def release(self, row: int) -> None:
        """Let a row's sequence go."""
        ...

    def advance(self) -> None:
        """Draw and read one id in each row."""
        ...

    def drawn(self) -> list["Drawn"]:
        """What has become known since the last call, in order."""
        ...


@dataclass(frozen=True)
class Drawn:
    """An id that was drawn for a sequence, and its log-probability."""

    which: Continuation
    id: int
    log_probability: float


class PlainSlots:
    """Rows in plain PyTorch: every step is known at once."""

    def __init__(self, decoder: Decoder, num_rows: int):
        self.decoder = decoder
        self.state = decoder.empty(num_rows)
        self.sampling = SamplingSlots.empty(num_rows, decoder.device)
        self.logits_BV = torch.zeros(num_rows, VOCAB_SIZE, device=decoder.device)
        self._in_row: list[Continuation | None] = [None] * num_rows
        self._known: list[Drawn] = []

    def admit(self, row: int, state: State, source: int, logits: Tensor, which: Continuation) -> None:
        self.state.put(row, state, source)
        self.sampling.put(row, which.sampling, which.prompt, which.max_new_bytes)
        self.logits_BV[row] = logits
        self._in_row[row] = which

    def release(self, row: int) -> None:
        self._in_row[row] = None

    @torch.no_grad()
    def advance(self) -> None:
        active = torch.tensor([which is not None for which in self._in_row], device=self.decoder.device)
        ids, log_probabilities = self.sampling.draw(self.logits_BV)
        self.sampling.read(ids, active)
        new = zip(self._in_row, ids.tolist(), log_probabilities.tolist(), self.sampling.remaining.tolist(), strict=True)
        goes_on = []
        for row, (which, drawn, log_probability, remaining) in enumerate(new):
            if which is not None:
                self._known.append(Drawn(which, drawn, log_probability))
                if drawn != EOS and remaining > 0:
                    goes_on.append(row)
        if goes_on:
            which = torch.tensor(goes_on, device=self.decoder.device)
            self.logits_BV[which] = self.decoder.extend(self.state, which, ids[which])

    def drawn(self) -> list[Drawn]:
        known, self._known = self._known, []
        return known


def prompt_ids(text: str | bytes) -> Tensor:
    """BOS and the bytes of a prompt, [N].

    Raises:
        UserError: as `prompt_bytes`.
    """
    return torch.from_numpy(encode(prompt_bytes(text), eos=False))


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


def _checked_ids(prompt: Tensor) -> Tensor:
    """The ids [N] of a prompt, int64; raises UserError where they are none."""
    if prompt.dim() != 1:
        raise UserError(f"prompt: ids [N] of one text, not {list(prompt.shape)}")
    if len(prompt) == 0:
        raise UserError("prompt: it holds no ids; a document begins with BOS")
    if prompt.is_floating_point() or bool(((prompt < 0) | (prompt >= VOCAB_SIZE)).any()):
        raise UserError(f"prompt: ids are whole numbers from 0 to {VOCAB_SIZE - 1}")
    return prompt.long()


def check_batch_size(num_rows: Any) -> None:
    """Raises UserError where it is no number from 1 to `MAX_BATCH_SIZE`."""
    _check_number("batch_size", num_rows, MAX_BATCH_SIZE)


def check_max_new_bytes(max_new_bytes: Any) -> None:
    """Raises UserError where it is no number from 1 to `MAX_NEW_BYTES`."""
    _check_number("max_new_bytes", max_new_bytes, MAX_NEW_BYTES)


def check_samples(samples: Any) -> None:
    """Raises UserError where it is no number from 1 to `MAX_SAMPLES`."""
    _check_number("samples", samples, MAX_SAMPLES)


def _check_number(name: str, value: Any, largest: int) -> None:
    is_number = isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's, too
    if not is_number or not 1 <= int(value) <= largest:
        raise UserError(f"{name}: {_short(value)} is not a number from 1 to {largest:,}")


def _short(value: Any) -> str:
    """A value in an error; Python refuses to write numbers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 300:
        return f"a number of {value.bit_length():,} bits"
    return reprlib.repr(value)


class Engine:
    """Sequences in rows.

    Args:
        decoder: reads prompts.
        rows: draw and read the bytes that follow.
        num_rows: how many sequences are on their way at once; others wait.
    """

    def __init__(self, decoder: Decoder, rows: Slots, num_rows: int):
        check_batch_size(num_rows)
        self.decoder = decoder
        self.rows = rows
        self._in_row: list[Continuation | None] = [None] * num_rows
        self._waiting: deque[list[Continuation]] = deque()  # those of one prompt together

    @classmethod
    def plain(cls, decoder: Decoder, num_rows: int) -> "Engine":
        """One in plain PyTorch."""
        check_batch_size(num_rows)
        return cls(decoder, PlainSlots(decoder, num_rows), num_rows)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a row."""
        return sum(map(len, self._waiting))

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not any(self._in_row)

    def submit(
        self, prompt: str | bytes | Tensor, sampling: Sampling, max_new_bytes: int, samples: int = 1
    ) -> list[Continuation]:
        """Ask for continuations of a prompt; several share the reading of it, with seeds that follow one another.

        Args:
            prompt: a text, or [N] ids, BOS first.
            max_new_bytes: where each ends, unless the model ends the text before; at most `MAX_NEW_BYTES`.
            samples: 1 to `MAX_SAMPLES`.

        Raises:
            UserError: the prompt is neither text nor ids, or holds none; a number is out of range. Nothing is queued.
        """
        prompt = _checked_ids(prompt) if isinstance(prompt, Tensor) else prompt_ids(prompt)
        if not isinstance(sampling, Sampling):
            raise UserError(f"sampling: {type(sampling).__name__} is no Sampling; write Sampling(temperature=0.8)")
        check_max_new_bytes(max_new_bytes)
        check_samples(samples)
        stops = [to_bytes(stop) for stop in sampling.stop]
        asked = [
            Continuation(
                prompt,
                sampling.model_copy(update={"seed": sampling.seed + number}),
                max_new_bytes,
                _watch=StopTexts(stops) if stops else None,
            )
            for number in range(samples)
        ]
        self._waiting.append(list(asked))
        return asked

    def cancel(self, which: Continuation) -> None:
        """End a sequence where it is."""
        if which.ended is None:
            which.ended = "cancelled"
        for waiting in self._waiting:
            if which in waiting:
                waiting.remove(which)
        self._waiting = deque(waiting for waiting in self._waiting if waiting)
        self._let_go_of_ended()

    def advance(self) -> list[Continuation]:
        """Let waiting sequences join and every row go on by a byte; the sequences that have come further."""
        self._join()
        if any(self._in_row):
            self.rows.advance()
        further: dict[int, Continuation] = {}
        for drawn in self.rows.drawn():
            if drawn.which.ended is None:
                drawn.which.take(drawn.id, drawn.log_probability)
                further[id(drawn.which)] = drawn.which
        self._let_go_of_ended()
        return list(further.values())

    def run(self) -> None:
        """Go on until every sequence has ended."""
        while not self.is_idle:
            self.advance()

    def _join(self) -> None:
        """Read the prompts of those who wait, as many as there are rows for."""
        free = [row for row, which in enumerate(self._in_row) if which is None]
        while free and self._waiting:
            group: list[list[Continuation]] = []
            num_ids = room = 0
            while self._waiting and room < len(free):
                size = len(self._waiting[0][0].prompt)
                if group and num_ids + size > PREFILL_IDS:
                    break
                now = self._waiting.popleft()
                if room + len(now) > len(free):
                    cut = len(free) - room
                    self._waiting.appendleft(now[cut:])
                    now = now[:cut]
                group.append(now)
                num_ids += size
                room += len(now)
            self._read(group, [free.pop(0) for _ in range(room)])

    def _read(self, group: Sequence[list[Continuation]], free: list[int]) -> None:
        prompts = [waiting[0].prompt for waiting in group]
        state, logits = self.decoder.prefill(prompts, last_only=True)
        for source, waiting in enumerate(group):
            for which in waiting:
                row = free.pop(0)
                self._in_row[row] = which
                self.rows.admit(row, state, source, logits[source], which)

    def _let_go_of_ended(self) -> None:
        for row, which in enumerate(self._in_row):
            if which is not None and which.ended is not None:
                self.rows.release(row)
                self._in_row[row] = None
