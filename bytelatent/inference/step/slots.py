"""Rows whose step is replayed from a CUDA graph, ahead of what the host has read of it."""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bytelatent.inference.decoder import Decoder, State
from bytelatent.inference.engine import Continuation, Drawn
from bytelatent.inference.kv_cache import BLOCK, Room
from bytelatent.inference.step.cuda_graph import Graph
from bytelatent.inference.step.drafting import DraftedStep
from bytelatent.inference.step.step import BLTStep, ByteLMStep
from bytelatent.kernels.launch import overlapped
from bytelatent.model import ByteLM

AHEAD = 8  # steps on their way that the host has not read


class CapturedSlots:
    """Rows in fixed shapes: on CUDA captured in a graph and replayed, elsewhere run as they are.

    Args:
        quorum: the share of rows at work that must have closed a patch before the global transformer runs for them; see
            `FastStep`.
        places: rows that it runs for at most; all of them if left out.
        ahead: bytes of each row that a step comes on by at most, all but one of them drafted; see `DraftedStep`. Then
            `places` are patches of one row, and the global transformer runs in every step.
    """

    def __init__(self, decoder: Decoder, num_rows: int, quorum: float = 0.0, places: int | None = None, ahead: int = 1):
        self.decoder = decoder
        self._room = Room()
        self._most = np.zeros((num_rows, 3), dtype=np.int64)  # what each row has at most of what Room counts
        self._in_row: list[Continuation | None] = [None] * num_rows
        self._ahead = ahead
        if isinstance(decoder.model, ByteLM):
            self._step = ByteLMStep(decoder, num_rows)
        elif ahead > 1:
            self._step = DraftedStep(decoder, num_rows, ahead, places)
        else:
            self._step = BLTStep(decoder, num_rows, places or num_rows, quorum)
        self._graph: Graph | None = None
        self._turn = 0
        self._pinned: list[tuple[Tensor, Tensor]] = []
        if decoder.device.type == "cuda":
            self._pinned = [
                (
                    torch.empty(ahead, num_rows, dtype=torch.long, pin_memory=True),
                    torch.empty(ahead, num_rows, pin_memory=True),
                )
                for _ in range(AHEAD + 1)
            ]
        self._on_the_way: deque[tuple[list[Continuation | None], Tensor, Tensor, Any]] = deque()
        self._known: list[Drawn] = []

    def admit(self, row: int, state: State, source: int, logits: Tensor, which: Continuation) -> None:
        counts = torch.stack([state.position[source], state.num_patches[source], state.open_count[source]])
        position, num_patches, open_bytes = counts.tolist()
        soon = min(which.max_new_bytes, BLOCK)  # so that tables need not grow, and graphs be captured again, at once
        self._make_room(np.array([position + soon, num_patches + soon, open_bytes + 1]) + self._ahead)
        self._most[row] = position, num_patches, open_bytes
        step = self._step
        step.state.put(row, state, source)
        step.sampling.put(row, which.sampling, which.prompt, which.max_new_bytes)
        step.logits_BV[row] = logits
        step.flags.is_active[row], step.flags.is_waiting[row] = True, False
        self._in_row[row] = which

    def release(self, row: int) -> None:
        self._in_row[row] = None
        self._most[row] = 0
        self._step.flags.is_active[row] = False
        self._step.flags.is_waiting[row] = False

    def advance(self) -> None:
        self._most += self._ahead
        self._make_room()
        self._turn += 1
        if self.decoder.device.type != "cuda":
            self._step()
        else:
            self._graph = self._graph or self._captured()
            self._graph.replay()
        self._read_back()
        while len(self._on_the_way) >= AHEAD:
            self._take(wait=True)

    def drawn(self) -> list[Drawn]:
        while self._on_the_way and self._take(wait=False):
            pass
        known, self._known = self._known, []
        return known

    def _read_back(self) -> None:
        """Let what was drawn be copied to the host, in the background."""
        step, in_row = self._step, list(self._in_row)
        if self.decoder.device.type != "cuda":
            drawn, log_probability = step.outcome()
            self._on_the_way.append((in_row, drawn.clone(), log_probability.clone(), None))
            return
        ids, log_probabilities = self._pinned[self._turn % len(self._pinned)]
        for pinned, found in zip((ids, log_probabilities), step.outcome(), strict=True):
            pinned.copy_(found, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._on_the_way.append((in_row, ids, log_probabilities, event))

    def _take(self, wait: bool) -> bool:
        """Note what the oldest step drew, if it is known."""
        in_row, ids, log_probabilities, event = self._on_the_way[0]
        if event is not None:
            if not wait and not event.query():
                return False
            event.synchronize()
        self._on_the_way.popleft()
        for row in zip(ids.tolist(), log_probabilities.tolist(), strict=True):
            for which, drawn, log_probability in zip(in_row, *row, strict=True):
                if which is not None and drawn >= 0:
                    self._known.append(Drawn(which, drawn, log_probability))
        return True

    def _captured(self) -> Graph:
        """The step as a graph. Kernels are compiled by a run before, in which every row rests."""
        step = self._step
        kept = step.flags.is_active.clone(), step.flags.is_waiting.clone(), step.logits_BV.clone()
        step.flags.is_active.zero_()
        step.flags.is_waiting.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), overlapped():
            step()
            stream.synchronize()
        graph = Graph(step, stream)
        torch.cuda.current_stream().wait_stream(stream)
        step.flags.is_active.copy_(kept[0])
        step.flags.is_waiting.copy_(kept[1])
        step.logits_BV.copy_(kept[2])
        return graph

    def _make_room(self, wanted: np.ndarray | int = 0) -> None:
        """See that no row outgrows its tables. The host counts the most it could be, so before they grow it looks."""
        room = np.array([*vars(self._room).values()])
        if (np.maximum(self._most.max(0), wanted) < room).all():
            return
        self._look()
        most = np.maximum(self._most.max(0), wanted)
        if (most < room).all():
            return
        self._room = Room(*(int(size) for size in np.where(most < room, room, -(-2 * most // BLOCK) * BLOCK)))
        self._step.reserve(self._room)
        self._graph = None  # it knows the tables by their addresses

    def _look(self) -> None:
        """Replace the host's counts by the true ones."""
        state = self._step.state
        true = torch.stack([state.position, state.num_patches, state.open_count], dim=1).cpu().numpy()
        occupied = np.array([which is not None for which in self._in_row])[:, None]
        self._most = np.where(occupied, true + self._ahead, 0)
