"""Where patches begin among new ids: all at once, from what was known before them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bytelatent.inference.kv_cache import Runs
from bytelatent.inference.state import HISTORY, DecodeState
from bytelatent.patching import PatchSettings, PatchState, Tail, step

# Shapes: T new ids


@dataclass
class Boundaries:
    """What is known about patches once each new id is read."""

    closes: Tensor  # [T] bool, the id is the last of its patch
    begin: Tensor  # [T] position where its patch begins
    since_start: Tensor  # [T] ids since the mode itself last started a patch
    num_patches: Tensor  # [T] closed patches
    tails: list[Tail] = field(default_factory=list)  # of modes that need them

    def new_patch(self, runs: Runs) -> Tensor:
        """[T] which of the patches that close here each id reads: the newest of its run; -1: none of them."""
        closed = self.closes.cumsum(0)
        before = (closed - self.closes.long())[runs.begin]
        return torch.where(closed > before, closed - 1, -1)

    def keep(self, state: DecodeState, runs: Runs, where: Tensor | slice) -> None:
        """Let the state know it, of the places `where` for which its history has room."""
        history, position = state.history, runs.position
        here = (runs.rows[where], position[where] % HISTORY)
        history.since_start[here] = self.since_start[where]
        history.patch_start[here] = torch.where(self.closes, position + 1, self.begin)[where]
        history.num_patches[here] = self.num_patches[where]
        if self.tails:
            state.tails = state.tails or [[Tail()] for _ in state.position]
            for row, at, tail in zip(runs.rows.tolist(), position.tolist(), self.tails, strict=True):
                if row >= 0:  # padding is in no row
                    state.tails[row][at + 1 :] = [tail]


def boundaries(patching: PatchSettings, state: DecodeState, runs: Runs, ids: Tensor, entropies: Tensor) -> Boundaries:
    """Decide about new ids [T].

    Args:
        entropies: [T] nats, where the mode needs them.
    """
    history, turn = state.history, runs.turn
    order = torch.arange(len(ids), device=ids.device)

    def before(values: Tensor) -> Tensor:
        """[T] what the history says before each one's run."""
        return state.last(values, runs.rows, runs.position - turn)

    def previous(values: Tensor, remembered: Tensor) -> Tensor:
        """[T] the value before each one: of its run, or remembered."""
        return torch.where(turn == 0, before(remembered), torch.cat([values[:1], values[:-1]]))

    def newest(events: Tensor) -> tuple[Tensor, Tensor]:
        """[T] the place of the newest event of its run up to each one, and whether there is any."""
        place = torch.where(events, order, -1).cummax(0).values
        return place, place >= runs.begin

    tails: list[Tail] = []
    if patching.needs_tail:
        tails = _tails(patching, state, runs, ids)
        natural = torch.tensor([tail.token_began for tail in tails], device=ids.device)
    else:
        ids_before, entropies_before = previous(ids, history.ids), previous(entropies, history.entropies)
        moment = PatchState(runs.position, ids_before, entropies_before, torch.zeros_like(ids))
        natural = step(moment, ids, entropies, patching.model_copy(update={"max_patch_length": None}))[1]
    place, any_natural = newest(natural)
    since_start = torch.where(any_natural, order - place, before(history.since_start) + turn + 1)
    closes = natural
    if patching.max_patch_length is not None:
        closes = natural | ((previous(since_start, history.since_start) + 1) % patching.max_patch_length == 0)
    place, any_closed = newest(closes)
    start = torch.where(any_closed, runs.position[place] + 1, before(history.patch_start))  # of the next id's patch
    closed = closes.cumsum(0)
    return Boundaries(
        closes=closes,
        begin=previous(start, history.patch_start),
        since_start=since_start,
        num_patches=before(history.num_patches) + closed - (closed - closes.long())[runs.begin],
        tails=tails,
    )


def _tails(patching: PatchSettings, state: DecodeState, runs: Runs, ids: Tensor) -> list[Tail]:
    """The last bytes of each row, after each id."""
    tails: list[Tail] = []
    for row, at, turn, i in zip(*(x.tolist() for x in (runs.rows, runs.position, runs.turn, ids)), strict=True):
        remembered = state.tails[row][at] if state.tails and row >= 0 and turn == 0 else Tail()
        tails.append((tails[-1] if turn else remembered).read(i, str(patching.tokenizer)))
    return tails
