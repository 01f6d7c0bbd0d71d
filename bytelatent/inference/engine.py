"""Continuous batching: sequences join and leave a fixed number of slots, each as if it were alone.

`Slots` hold what is on the device and draw one id per slot at a time; `Engine` assigns sequences to slots, and turns
ids into bytes, stops and ends.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bytelatent.device import outside_inference_mode
from bytelatent.errors import UserError
from bytelatent.inference.constraint import Constraint
from bytelatent.inference.continuation import Allowances, Alternatives, Continuation, Drawn, StopTexts
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import DecodeState
from bytelatent.inference.prefix_cache import Prefix, PrefixCache
from bytelatent.inference.prompts import PromptQueue
from bytelatent.inference.sampling import SamplingSlots
from bytelatent.inference.settings import Sampling, check_limits
from bytelatent.vocab import BYTES, Vocabulary, to_bytes

# Shapes: B slots, V vocabulary


class OutOfRoom(torch.OutOfMemoryError):
    """There is no memory for what the longest sequence needs next; the others can go on without it."""

    def __init__(self, which: Continuation):
        super().__init__(f"no memory is left for a text of {len(which.prompt) + len(which.ids):,} bytes")
        self.which = which


class Admission(NamedTuple):
    """A sequence for a slot: slot `source` of a state, and the logits [V] of what comes next."""

    slot: int
    source: int
    logits: Tensor
    which: Continuation


class Slots(Protocol):
    """Slots that draw and read ids, one each at a time."""

    def admit(self, state: DecodeState, admitted: Sequence[Admission]) -> None:
        """Put sequences into slots."""
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

    def newest(self, slot: int) -> Prefix | None:
        """The state that holds a slot, the number of ids it has read and its next logits; None in the midst of a
        patch's end.
        """
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

    def admit(self, state: DecodeState, admitted: Sequence[Admission]) -> None:
        slots = [each.slot for each in admitted]
        self.state.put(slots, state, [each.source for each in admitted])
        self.sampling.put_all(slots, [each.which.start for each in admitted])
        self.logits_BV[slots] = torch.stack([each.logits for each in admitted])
        for each in admitted:
            self._allowances.forget(each.slot)
            self._in_slot[each.slot] = each.which

    def release(self, slot: int) -> None:
        self._in_slot[slot] = None

    @torch.no_grad()
    def advance(self) -> None:
        self.sampling.constrain(*self._allowances.new(self._in_slot))
        active = torch.tensor([which is not None for which in self._in_slot], device=self.decoder.device)
        alternatives: list[Alternatives] = [[]] * len(self._in_slot)
        if (count := most_alternatives(self._in_slot)) > 0:
            alternatives = as_alternatives(*likeliest(self.logits_BV, count))
        starts = (self.state.open_count == 0).tolist()
        ids, log_probabilities = self.sampling.draw(self.logits_BV)
        self.sampling.read(ids, active)
        new = zip(
            self._in_slot, ids.tolist(), log_probabilities.tolist(), self.sampling.remaining.tolist(), strict=True
        )
        unfinished = []
        for slot, (which, drawn, log_probability, remaining) in enumerate(new):
            if which is not None:
                self._drawn.append(Drawn(which, drawn, log_probability, starts[slot], alternatives[slot]))
                if drawn != self.eos and remaining > 0:
                    unfinished.append(slot)
        if unfinished:
            slots = torch.tensor(unfinished, device=self.decoder.device)
            self.logits_BV[slots] = self.decoder.extend(self.state, slots, ids[slots])

    def drawn(self) -> list[Drawn]:
        drawn, self._drawn = self._drawn, []
        return drawn

    def newest(self, slot: int) -> Prefix | None:
        return Prefix(int(self.state.position[slot]), self.state, self.logits_BV[slot], slot)


def most_alternatives(in_slot: list[Continuation | None]) -> int:
    """The most likely ids that some sequence asks for."""
    return max((which.num_alternatives for which in in_slot if which is not None), default=0)


def likeliest(logits_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most likely ids, the lowest first among equals, and their log-probabilities, [B, count]."""
    log_probabilities_BV = logits_BV.float().log_softmax(dim=-1)
    ids = log_probabilities_BV.argsort(dim=-1, descending=True, stable=True)[:, :count]
    return ids, log_probabilities_BV.gather(-1, ids)


def as_alternatives(ids: Tensor, log_probabilities: Tensor) -> list[Alternatives]:
    """The same by slot, as `Drawn` takes it."""
    pairs = zip(ids.tolist(), log_probabilities.tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs]


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
        self._prompts = PromptQueue(decoder)
        self.is_broken = False

    @classmethod
    @outside_inference_mode
    def plain(cls, decoder: Decoder, batch_size: int, vocabulary: Vocabulary = BYTES) -> "Engine":
        """One in plain PyTorch."""
        check_limits(batch_size=batch_size)
        return cls(decoder, PlainSlots(decoder, batch_size, vocabulary), batch_size, vocabulary)

    @property
    def prompts(self) -> PromptQueue:
        return self._prompts

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return sum(map(len, self._prompts.groups))

    @property
    def num_busy(self) -> int:
        """Sequences in slots."""
        return sum(which is not None for which in self._in_slot)

    @property
    def is_idle(self) -> bool:
        return not self._prompts.groups and not any(self._in_slot)

    def serve(self, chunk: int, cache: PrefixCache | None = None) -> PromptQueue:
        """Read long prompts in chunks between steps, and let an error end the sequences alone that it concerns.

        `advance` then gives what has `failed`, too. Once the engine `is_broken`, another one must take `waiting`.

        Args:
            chunk: ids of prompts that are read between two steps.
            cache: keeps states of prompts, for those that begin alike.
        """
        self._prompts = PromptQueue(self.decoder, chunk, cache, isolates=True)
        return self._prompts

    @property
    def waiting(self) -> list[list[Continuation]]:
        """Sequences that wait, by their prompts."""
        return self._prompts.groups

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
        self._prompts.add(asked)

    @outside_inference_mode
    def cancel(self, which: Continuation) -> None:
        """End a sequence where it is."""
        if which.ended is None:
            which.ended = "cancelled"
        self._prompts.drop_ended()
        self._release_ended()

    @outside_inference_mode
    def advance(self) -> list[Continuation]:
        """Admit waiting sequences and decode a step; the sequences that have become longer, or ended."""
        self._admit()
        if any(self._in_slot):
            self._step()
        longer: dict[int, Continuation] = {}
        for drawn in self.slots.drawn() if not self.is_broken else ():
            if drawn.which.ended is None:
                try:
                    drawn.which.take(drawn)
                except Exception as error:
                    self._fail([drawn.which], error)
                longer[id(drawn.which)] = drawn.which
        failed, self._prompts.failed = self._prompts.failed, []
        longer |= {id(which): which for which in failed}
        self._release_ended()
        return list(longer.values())

    def run(self) -> None:
        """Decode until every sequence has ended."""
        while not self.is_idle:
            self.advance()

    def _admit(self) -> None:
        """Read prompts for which there are free slots, and put their sequences into these."""
        free = [slot for slot, which in enumerate(self._in_slot) if which is None]
        self._prompts.read(len(free))
        by_state: dict[int, tuple[DecodeState, list[Admission]]] = {}
        for read, members in self._prompts.take(len(free)):
            _, admitted = by_state.setdefault(id(read.state), (read.state, []))
            for which in members:
                slot = free.pop(0)
                self._in_slot[slot] = which
                admitted.append(Admission(slot, read.source, read.logits, which))
        for state, admitted in by_state.values():
            counts = state.counts([each.source for each in admitted])
            for each, (_, num_patches, open_bytes) in zip(admitted, counts.tolist(), strict=True):
                each.which.prompt_patches = num_patches + (open_bytes > 0)
            self._put(state, admitted)

    def _put(self, state: DecodeState, admitted: list[Admission]) -> None:
        """Put sequences into their slots; one by one, if it fails for all at once."""
        try:
            self.slots.admit(state, admitted)
        except Exception as error:
            if len(admitted) == 1:
                self._fail([admitted[0].which], error)
                return
            for each in admitted:
                self._put(state, [each])

    def _step(self) -> None:
        try:
            self.slots.advance()
        except OutOfRoom as error:
            self._fail([error.which], error)
        except Exception as error:  # nobody knows what has become of the state
            self._fail([which for which in self._in_slot if which is not None], error)
            self.is_broken = True

    def _fail(self, sequences: list[Continuation], error: Exception) -> None:
        if not self._prompts.isolates:
            raise error
        self._prompts.end(sequences, error)

    def _release_ended(self) -> None:
        for slot, which in enumerate(self._in_slot):
            if which is not None and which.ended is not None:
                if self._prompts.cache is not None and which.ended not in ("cancelled", "failed"):
                    self._keep_state(self._prompts.cache, slot, which)
                if not self.is_broken:
                    self.slots.release(slot)
                self._in_slot[slot] = None

    def _keep_state(self, cache: PrefixCache, slot: int, which: Continuation) -> None:
        """Keep the state of what was generated, for prompts that go on from it."""
        if len(which.prompt) + len(which.ids) < cache.shortest:
            return
        found = self.slots.newest(slot)
        ids = torch.cat([which.prompt, torch.tensor(which.ids, dtype=which.prompt.dtype)])
        if found is not None and found.num_ids <= len(ids):  # steps in flight may have read more
            cache.add(ids[: found.num_ids], found.state, found.slot, found.logits)
