"""Prompts before they have slots: they wait, are read, whole or in chunks between decode steps, and are then ready.

Short prompts are read together in one packed pass. Longer ones, and those that go on from a stored prefix, are read
side by side, each with a share of the ids that may be read between two steps.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bytelatent.errors import in_one_line
from bytelatent.inference.continuation import Continuation
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.kv_cache import DecodeState
from bytelatent.inference.prefix_cache import PrefixCache

LOGGER = logging.getLogger(__name__)

PREFILL_IDS = 65_536  # prompt ids read at once where nothing waits for them
NUM_READERS = 8  # prompts that are read in chunks at once
SMALLEST_PIECE = 64  # ids


@dataclass(eq=False)
class Prompt:
    """A prompt and the sequences that continue it.

    Attributes:
        position: ids that are read.
        slot: in the state of the prompts that are read in chunks; -1: in none.
        ends: where pieces of it end, since the state there is kept; the last one is the prompt's own.
        alone: it is read by itself, since reading it together with others failed.
    """

    members: list[Continuation]
    position: int = 0
    slot: int = -1
    ends: list[int] = field(default_factory=list)
    alone: bool = False

    @property
    def ids(self) -> Tensor:
        return self.members[0].prompt

    @property
    def left(self) -> int:
        """Ids up to the next end of a piece."""
        return self.ends[0] - self.position


@dataclass(eq=False)
class ReadPrompt:
    """A prompt that was read: slot `source` of a state, and the logits [V] of what comes next."""

    members: list[Continuation]
    state: DecodeState
    source: int
    logits: Tensor


class PromptQueue:
    """Prompts that wait, are read, or are ready.

    Args:
        chunk: ids that are read at once; None: whole prompts, as many as there are free slots for.
        cache: keeps and gives states of prompts that begin alike.
        isolates: whether an error ends the sequences of the prompt that caused it, and is not raised.

    Attributes:
        num_read: ids that were read.
    """

    def __init__(
        self, decoder: Decoder, chunk: int | None = None, cache: PrefixCache | None = None, isolates: bool = False
    ):
        self.decoder, self.chunk, self.cache, self.isolates = decoder, chunk, cache, isolates
        self.num_read = 0
        self.waiting: deque[Prompt] = deque()
        self.reading: list[Prompt] = []
        self.ready: deque[ReadPrompt] = deque()
        self.failed: list[Continuation] = []
        self._state: DecodeState | None = None  # of the prompts that are read in chunks

    @property
    def groups(self) -> list[list[Continuation]]:
        """The sequences of each prompt, in order."""
        return [prompt.members for prompt in (*self.ready, *self.reading, *self.waiting)]

    def add(self, members: list[Continuation]) -> None:
        self.waiting.append(Prompt(list(members), ends=[len(members[0].prompt)]))

    def drop_ended(self) -> None:
        """Forget sequences that have ended, and prompts that no other ones continue."""
        for queue in (self.ready, self.reading, self.waiting):
            for prompt in list(queue):
                prompt.members = [which for which in prompt.members if which.ended is None]
                if not prompt.members:
                    queue.remove(prompt)  # pyright: ignore[reportArgumentType]
        self._free_state()

    def take(self, num_free: int) -> list[tuple[ReadPrompt, list[Continuation]]]:
        """Prompts that were read, and the sequences of each for which there is a slot."""
        taken = []
        while self.ready and num_free:
            read = self.ready.popleft()
            members, rest = read.members[:num_free], read.members[num_free:]
            taken.append((read, members))
            num_free -= len(members)
            if rest:
                self.ready.appendleft(ReadPrompt(rest, read.state.taken(read.source), 0, read.logits))
        return taken

    def read(self, num_free: int) -> None:
        """Read prompts for which there are free slots: all of them, or as much as `chunk` says."""
        room = num_free - sum(len(prompt.members) for prompt in (*self.ready, *self.reading))
        if self.chunk is None:
            while room > 0 and self.waiting:
                begun = self._begin(room, PREFILL_IDS)
                room -= sum(len(prompt.members) for prompt, _ in begun)
                self._read_beginnings(begun)
            return
        begun = self._begin(room, self.chunk // 2 if self.reading else self.chunk)
        self._read_on(self.chunk - sum(size for _, size in begun))
        self._read_beginnings(begun)
        self._free_state()

    def _begin(self, room: int, num_ids: int) -> list[tuple[Prompt, int]]:
        """Take prompts that wait: those to be read from their beginnings, and how many ids of each."""
        begun: list[tuple[Prompt, int]] = []
        num_readers = NUM_READERS - len(self.reading)
        while self.waiting and room > 0 and num_ids > 0:
            prompt = self.waiting[0]
            size = prompt.ends[-1]
            splits = self.chunk is not None and size > num_ids
            if begun and (prompt.alone or (num_ids < SMALLEST_PIECE if splits else size > num_ids)):
                break
            is_cached = self.cache is not None and size >= self.cache.shortest and not prompt.alone
            if num_readers == 0 and (splits or is_cached):
                break
            self.waiting.popleft()
            room -= len(prompt.members)
            if is_cached and self._go_on_from_prefix(prompt):
                num_readers -= 1
                continue
            size = min(prompt.ends[0], num_ids) if self.chunk is not None else size
            num_readers -= size < prompt.ends[-1]
            num_ids -= size
            begun.append((prompt, size))
            if prompt.alone:
                break
        return begun

    def _go_on_from_prefix(self, prompt: Prompt) -> bool:
        """Let a prompt go on from the longest stored prefix, if there is any; decide where its pieces end."""
        assert self.cache is not None
        found = self.cache.find(prompt.ids)
        position = 0 if found is None else found.num_ids
        parts = self.cache.parting(prompt.ids, position)
        if parts is not None:
            prompt.ends.insert(0, parts)
        if found is None:
            return False
        prompt.position = position
        if prompt.left == 0:
            self.ready.append(ReadPrompt(prompt.members, found.state, 0, found.logits))
        else:
            self._give_slot(prompt, found.state, 0)
        return True

    def _read_beginnings(self, begun: Sequence[tuple[Prompt, int]]) -> None:
        if not begun:
            return
        prompts = [prompt for prompt, _ in begun]
        try:
            state, logits_NV = self.decoder.prefill([prompt.ids[:size] for prompt, size in begun], last_only=True)
            for source, (prompt, size) in enumerate(begun):
                self._have_read(prompt, size, state, source, logits_NV[source])
        except Exception as error:
            self._fail(prompts, error)

    def _read_on(self, num_ids: int) -> None:
        """Read the next pieces of prompts whose beginnings were read."""
        group = [prompt for prompt in self.reading if prompt.alone][:1] or list(self.reading)
        if not group or num_ids <= 0:
            return
        share, state = max(num_ids // len(group), 1), self._state
        assert state is not None
        try:
            sizes = [min(prompt.left, share) for prompt in group]
            pieces = [
                prompt.ids[prompt.position : prompt.position + size] for prompt, size in zip(group, sizes, strict=True)
            ]
            own_slots = torch.tensor([prompt.slot for prompt in group])
            slots = own_slots.repeat_interleave(torch.tensor(sizes)).to(self.decoder.device)
            logits_NV = self.decoder.extend(state, slots, torch.cat(pieces).to(self.decoder.device), last_only=True)
            for number, (prompt, size) in enumerate(zip(group, sizes, strict=True)):
                self._have_read(prompt, size, state, prompt.slot, logits_NV[number])
        except Exception as error:
            self._fail(group, error)

    def _have_read(self, prompt: Prompt, size: int, state: DecodeState, source: int, logits: Tensor) -> None:
        """A piece was read: its state may be kept, and the prompt is ready or waits for the next piece."""
        prompt.position += size
        self.num_read += size
        if prompt.left == 0:
            is_copy = prompt.slot >= 0 and len(prompt.ends) == 1  # another prompt takes the slot
            if is_copy:
                state, source = state.taken(source), 0
            if self.cache is not None:
                self.cache.add(prompt.ids[: prompt.position], state, None if is_copy else source, logits)
            if len(prompt.ends) == 1:
                if is_copy:
                    self.reading.remove(prompt)
                self.ready.append(ReadPrompt(prompt.members, state, source, logits))
                return
            del prompt.ends[0]
        if prompt.slot < 0:
            self._give_slot(prompt, state, source)

    def _give_slot(self, prompt: Prompt, state: DecodeState, source: int) -> None:
        """Let a prompt be read on from slot `source` of a state."""
        if self._state is None:
            self._state = self.decoder.empty(NUM_READERS)
        prompt.slot = min(set(range(NUM_READERS)) - {other.slot for other in self.reading})
        self._state.put([prompt.slot], state, [source])
        self.reading.append(prompt)

    def _free_state(self) -> None:
        """Free the memory of prompts that are read in chunks."""
        if not self.reading:
            self._state = None

    def _fail(self, prompts: list[Prompt], error: Exception) -> None:
        """Read prompts again, each by itself; end the sequences of one that was."""
        if not self.isolates:
            raise error
        self.reading = [prompt for prompt in self.reading if prompt not in prompts]
        read = {which for one in self.ready for which in one.members}
        prompts = [prompt for prompt in prompts if prompt.members[0] not in read]
        no_memory = isinstance(error, torch.OutOfMemoryError) and self.cache is not None and self.cache.num_bytes > 0
        if no_memory and self.cache is not None:
            self.cache.clear()
        if len(prompts) > 1 or no_memory:
            LOGGER.warning("reading %d prompts failed (%s); they are read one by one", len(prompts), error)
            self.waiting.extendleft(
                Prompt(prompt.members, ends=[len(prompt.ids)], alone=True) for prompt in reversed(prompts)
            )
            return
        self.end([which for prompt in prompts for which in prompt.members], error)

    def end(self, sequences: list[Continuation], error: Exception) -> None:
        """End sequences because of an error."""
        shown = None if isinstance(error, torch.OutOfMemoryError) else error
        LOGGER.error("%d requests failed: %s", len(sequences), in_one_line(repr(error)), exc_info=shown)
        for which in sequences:
            which.fail(error.with_traceback(None))  # which holds tensors
        self.failed += sequences
