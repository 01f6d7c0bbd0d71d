"""Slots whose decode step is replayed from a CUDA graph, some steps before the host reads what they drew."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytelatent.device import on_device
from bytelatent.inference.continuation import Allowances, Alternatives, Continuation, Drawn
from bytelatent.inference.decoder import Decoder
from bytelatent.inference.engine import Admission, OutOfRoom, as_alternatives, likeliest, most_alternatives
from bytelatent.inference.kv_cache import BLOCK, CacheCapacity, DecodeState
from bytelatent.inference.prefix_cache import Prefix
from bytelatent.inference.step.cuda_graph import Graph
from bytelatent.inference.step.step import BLTStep, ByteLMStep
from bytelatent.model import ByteLM


@dataclass(frozen=True)
class InFlight:
    """A step that the host has not read yet: who was in the slots, and what was drawn."""

    in_slot: list[Continuation | None]
    found: tuple[Tensor, ...]  # as `ByteLMStep.outcome`
    alternatives: tuple[Tensor, ...]  # as `likeliest`, where some sequence asks
    event: Any  # after which all of it is on the host; None: it is


IN_FLIGHT = 8  # steps that the host has not read yet


class CapturedSlots:
    """Slots in fixed shapes: on CUDA captured in a graph and replayed, elsewhere run as they are.

    Args:
        quorum: the share of slots at work that must have closed a patch before the global transformer runs; see
            `BLTStep`.
        max_closing: slots that the global transformer runs for at most; default: all.
        beside: whether it runs beside the other slots' next byte; see `BLTStep`.
        like: other slots of the same decoder, whose weights these share.
    """

    overlap = True  # kernels of a step start while the one before runs; else each one's time is its own, for profiles

    def __init__(
        self,
        decoder: Decoder,
        num_slots: int,
        quorum: float = 0.0,
        max_closing: int | None = None,
        like: "CapturedSlots | None" = None,
        beside: bool = False,
    ):
        self.decoder = decoder
        self.num_steps = 0
        self.in_flight: deque[InFlight] = deque()
        self._room = CacheCapacity()
        self._largest = np.zeros((num_slots, 3), dtype=np.int64)  # the most that each slot may have of what Room counts
        self._in_slot: list[Continuation | None] = [None] * num_slots
        shared: Any = None if like is None else like.step
        if isinstance(decoder.model, ByteLM):
            self.step = ByteLMStep(decoder, num_slots, like=shared)
        else:
            self.step = BLTStep(decoder, num_slots, max_closing or num_slots, quorum, shared, beside)
        self._graph: Graph | None = None
        self._captured_at: list[int] = []
        self._pinned: list[tuple[Tensor, ...]] = []
        if decoder.device.type == "cuda":
            self._pinned = [tuple(map(_pinned, self.step.outcome())) for _ in range(IN_FLIGHT + 1)]
        self._drawn: list[Drawn] = []
        self._allowances = Allowances(num_slots)

    def admit(self, state: DecodeState, admitted: Sequence[Admission]) -> None:
        slots, sources = [each.slot for each in admitted], [each.source for each in admitted]
        counts = state.counts(sources)
        # So that caches need not grow, and graphs be captured again, at once.
        soon = np.array([min(each.which.max_new_bytes, BLOCK) for each in admitted])
        self._make_room((counts + np.stack([soon, soon, np.ones_like(soon)], axis=1) + 1).max(0))
        self._largest[slots] = counts
        step = self.step
        step.state.put(slots, state, sources)
        step.sampling.put_all(slots, [each.which.start for each in admitted])
        index = on_device(torch.tensor(slots), self.decoder.device)
        step.logits_BV.index_copy_(0, index, torch.stack([each.logits for each in admitted]).to(step.logits_BV.dtype))
        step.buffers.is_active.index_fill_(0, index, True)
        for name in ("is_waiting", "is_held"):
            getattr(step.buffers, name).index_fill_(0, index, False)
        for each in admitted:
            self._allowances.forget(each.slot)
            self._in_slot[each.slot] = each.which

    def release(self, slot: int) -> None:
        self._in_slot[slot] = None
        self._largest[slot] = 0
        self.step.buffers.is_active[slot] = False
        self.step.buffers.is_waiting[slot] = False

    def advance(self) -> None:
        self._largest += 1
        try:
            self._make_room()
        except torch.OutOfMemoryError:
            longest = self._in_slot[int(self._largest.max(1).argmax())]
            if longest is None:
                raise
            raise OutOfRoom(longest) from None
        self.step.sampling.constrain(*self._allowances.new(self._in_slot))
        self.num_steps += 1
        num_alternatives = most_alternatives(self._in_slot)
        likely = likeliest(self.step.newest_logits(), num_alternatives) if num_alternatives else ()
        if self.decoder.device.type != "cuda":
            self.step()
        else:
            if self._graph is None or self._captured_at != self.step.addresses():
                self._graph, self._captured_at = self._captured(), self.step.addresses()
            self._graph.replay()
        self._read_back(likely)
        while len(self.in_flight) >= IN_FLIGHT:
            self._take(wait=True)

    def drawn(self) -> list[Drawn]:
        most = self._most_in_flight()
        while self.in_flight and self._take(wait=len(self.in_flight) > most):
            pass
        drawn, self._drawn = self._drawn, []
        return drawn

    def _most_in_flight(self) -> int:
        """Steps that may run before the host reads what they drew.

        A slot with a constraint draws once the host has read its last byte. Beside others, which need not wait for it,
        it takes part in every second step: one runs while the host reads the one before.
        """
        constrained = [which.constraint is not None for which in self._in_slot if which is not None]
        return IN_FLIGHT if not any(constrained) else 0 if all(constrained) else 1

    def newest(self, slot: int) -> Prefix | None:
        step = self.step
        num_ids, is_waiting = torch.stack([step.state.position[slot], step.buffers.is_waiting[slot]]).tolist()
        return None if is_waiting else Prefix(num_ids, step.state, step.newest_logits()[slot], slot)

    def take_over(self, slots: Sequence[int], other: "CapturedSlots", sources: Sequence[int]) -> None:
        """Let `slots` go on as slots `sources` of others would, of which no step is in flight."""
        self._make_room(other._largest[sources].max(0) + BLOCK + 1)
        self._largest[slots] = other._largest[sources]
        for slot, source in zip(slots, sources, strict=True):
            self._in_slot[slot] = other._in_slot[source]
            self._allowances.take_over(slot, other._allowances, source)
        step, theirs = self.step, other.step
        step.state.put(slots, theirs.state, sources)
        step.sampling.take_over(slots, theirs.sampling, sources)
        to, of = (on_device(torch.tensor(each), self.decoder.device) for each in (slots, sources))
        moved = [(step.logits_BV, theirs.newest_logits())]
        moved += [(getattr(step.buffers, name), getattr(theirs.buffers, name)) for name in ("is_active", "is_waiting")]
        if isinstance(step, BLTStep) and isinstance(theirs, BLTStep):
            moved.append((step.encoded_BD, theirs.encoded_BD))
        for mine, given in moved:
            mine.index_copy_(0, to, given.index_select(0, of))
        step.buffers.is_held.index_fill_(0, to, False)

    def clear(self) -> None:
        """Free all slots."""
        for slot in range(len(self._in_slot)):
            self.release(slot)

    def finish(self) -> list[Drawn]:
        """Wait for the steps in flight; what they drew, and what is known besides."""
        while self.in_flight:
            self._take(wait=True)
        return self.drawn()

    def _read_back(self, alternatives: tuple[Tensor, ...]) -> None:
        """Start copying what was drawn to the host."""
        in_slot, found = list(self._in_slot), self.step.outcome()
        if self.decoder.device.type != "cuda":
            self.in_flight.append(InFlight(in_slot, tuple(part.clone() for part in found), alternatives, None))
            return
        pinned = self._pinned[self.num_steps % len(self._pinned)]
        for target, source in zip(pinned, found, strict=True):
            target.copy_(source, non_blocking=True)
        alternatives = tuple(_pinned(part).copy_(part, non_blocking=True) for part in alternatives)
        event = torch.cuda.Event()
        event.record()
        self.in_flight.append(InFlight(in_slot, pinned, alternatives, event))

    def _take(self, wait: bool) -> bool:
        """Take what the oldest step drew; False if it is not on the host yet."""
        step = self.in_flight[0]
        if step.event is not None:
            if not wait and not step.event.query():
                return False
            step.event.synchronize()
        self.in_flight.popleft()
        none: list[Alternatives] = [[]] * len(step.in_slot)
        alternatives = as_alternatives(*step.alternatives) if step.alternatives else none
        found = (part.tolist() for part in step.found)
        for which, drawn, *more in zip(step.in_slot, *found, alternatives, strict=True):
            if which is not None and drawn >= 0:
                self._drawn.append(Drawn(which, drawn, *more))
        return True

    def _captured(self) -> Graph:
        """The step as a graph, captured while all slots are idle."""
        step = self.step
        changed = step.buffers.is_active, step.buffers.is_waiting, step.logits_BV
        before = [tensor.clone() for tensor in changed]
        step.buffers.is_active.zero_()
        step.buffers.is_waiting.zero_()
        graph = Graph(step, self.overlap)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        return graph

    def _make_room(self, wanted: np.ndarray | int = 0) -> None:
        """Grow the caches before a slot outgrows them.

        The host knows only the most that a slot may have; so before they grow, it reads what slots have.
        """
        room = np.array([*vars(self._room).values()])
        if (np.maximum(self._largest.max(0), wanted) < room).all():
            return
        state = self.step.state
        counts = torch.stack([state.position, state.num_patches, state.open_count], dim=1).cpu().numpy()
        occupied = np.array([which is not None for which in self._in_slot])[:, None]
        self._largest = np.where(occupied, counts + 1, 0)
        largest = np.maximum(self._largest.max(0), wanted)
        if (largest < room).all():
            return
        grown = CacheCapacity(*(int(size) for size in np.where(largest < room, room, -(-2 * largest // BLOCK) * BLOCK)))
        self.reserve(grown)

    def reserve(self, room: CacheCapacity) -> None:
        """Let this much fit in each slot."""
        self._graph = None  # it knows the caches by their addresses
        self.step.reserve(room)
        self._room = CacheCapacity(*map(max, vars(self._room).values(), vars(room).values()))

    def more_bytes(self, room: CacheCapacity) -> int:
        """Memory that `reserve` would take."""
        return self.step.state.more_bytes(room)


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
