"""Several bytes a step: a cheap part of the model drafts them, the whole of it verifies the draft at once.

A drafted byte is kept with probability min(1, p / q), p and q being what the model and its drafter give it. The first
that is not kept is drawn anew from what p has more than q, and what was read after it is taken back; where all are
kept, the model draws one more. So what comes out has the distribution of plain decoding, and is the same where the
likeliest byte is taken.

Source: Leviathan et al. 2023 and Chen et al. 2023.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from bytelatent.inference.decoder import Decoder
from bytelatent.inference.drafters import Drafter
from bytelatent.inference.engine import Continuation, Drawn
from bytelatent.inference.sampling import RANDOM_BITS, SamplingRows, random_numbers
from bytelatent.inference.state import SLACK, DecodeState
from bytelatent.vocab import EOS, VOCAB_SIZE

# Shapes: B rows, V vocabulary, T ids that are read

LONGEST = SLACK - 2  # drafted bytes: with the one before them fewer than can be taken back
DRAFTS, ACCEPTS, CHOICES = 1 << 60, 2 << 60, 3 << 60  # added to a seed: three unrelated series of random numbers


@dataclass
class Drafted:
    """One id of the drafts of all rows."""

    ids_B: Tensor
    weights_BV: Tensor  # int64, what it was drawn in proportion to
    exists_B: Tensor  # bool; shorter drafts have none

    @classmethod
    def none(cls, like_B: Tensor) -> "Drafted":
        zeros_B = torch.zeros_like(like_B)
        return cls(zeros_B, zeros_B[:, None].expand(-1, VOCAB_SIZE), zeros_B.bool())


class SpeculativeRows:
    """Rows that come on by several bytes a step.

    Every row has drawn one id that it has not read yet, the first by what its prompt gives. A step drafts what follows
    it, reads it and the draft in one pass, and ends with another id that is drawn and not read.

    Args:
        decoder: of a BLT.
        drafter: of the same decoder.
        longest: drafted bytes at most, no more than LONGEST.

    Attributes:
        steps, drafted, accepted: steps of all rows, and bytes, so far.
    """

    def __init__(self, decoder: Decoder, num_rows: int, drafter: Drafter, longest: int = 8):
        self.decoder = decoder
        self.drafter = drafter
        self.longest = min(longest, LONGEST)
        self.state = decoder.empty(num_rows)
        self.sampling = SamplingRows.empty(num_rows, decoder.device)
        self.steps = self.drafted = self.accepted = 0
        self._unread_B = torch.full((num_rows,), EOS, device=decoder.device)
        self._in_row: list[Continuation | None] = [None] * num_rows
        self._first: dict[int, Tensor] = {}  # logits of the first id, in rows that have drawn none
        self._known: list[Drawn] = []

    def admit(self, row: int, state: DecodeState, source: int, logits: Tensor, which: Continuation) -> None:
        self.state.put(row, state, source)
        self.sampling.put(row, which.sampling, which.prompt, which.max_new_bytes)
        self._in_row[row] = which
        self._first[row] = logits

    def release(self, row: int) -> None:
        self._in_row[row] = None
        self._first.pop(row, None)

    def drawn(self) -> list[Drawn]:
        known, self._known = self._known, []
        return known

    @torch.no_grad()
    def advance(self) -> None:
        """Draft, verify, and take back, in every row."""
        nothing = Drafted.none(self._unread_B)
        if self._first:
            rows = torch.tensor(list(self._first), device=self.decoder.device)
            logits_BV = self._in_all_rows(rows, torch.stack(list(self._first.values())))
            self._take(nothing.exists_B.index_fill(0, rows, True), logits_BV, nothing)
            self._first.clear()
        is_taken = torch.tensor([which is not None for which in self._in_row], device=self.decoder.device)
        going_B = is_taken & (self._unread_B != EOS) & (self.sampling.remaining > 0)
        rows = going_B.nonzero()[:, 0]
        if not len(rows):
            return
        drafts = self._draft(rows)
        begin_B, num_read_B = self.state.position, going_B.long()
        expected = self._expected(going_B, drafts)
        for drafted, logits_BV in zip([*drafts, nothing], expected, strict=True):
            kept_B = self._take(going_B, logits_BV, drafted)
            num_read_B += kept_B
            going_B = kept_B & (drafted.ids_B != EOS)
            self.drafted += int(drafted.exists_B.sum())
            self.accepted += int(kept_B.sum())
        self.steps += len(rows)
        for row, position in zip(rows.tolist(), (begin_B + num_read_B)[rows].tolist(), strict=True):
            self.state.rewind(row, position)

    def _draft(self, rows: Tensor) -> list[Drafted]:
        """Let the drafter read ids and draw others, in each row until it is unsure."""
        sampling, drafts, ids_B = deepcopy(self.sampling), [], self._unread_B
        for number in range(self.longest):
            rows = rows[sampling.remaining[rows] > 1]  # the last id of all is the model's to draw
            if not len(rows):
                break
            position = self.state.position[rows] + number
            logits, goes_on = self.drafter.read(self.state, rows, ids_B[rows], position)
            weights_BV = sampling.weights(self._in_all_rows(rows, logits))
            exists_B = torch.zeros_like(self._unread_B, dtype=torch.bool).index_fill(0, rows, True)
            ids_B = drawn_from(weights_BV, _random(sampling, DRAFTS))
            drafts.append(Drafted(ids_B, weights_BV, exists_B))
            sampling.read(ids_B, exists_B)
            rows = rows[goes_on & (ids_B[rows] != EOS)]
        return drafts

    def _expected(self, going_B: Tensor, drafts: list[Drafted]) -> list[Tensor]:
        """Read the unread ids and their drafts; the model's logits [B, V] of each drafted id, and of one more."""
        ids = torch.stack([self._unread_B, *(drafted.ids_B for drafted in drafts)], dim=1)
        is_read = torch.stack([going_B, *(drafted.exists_B for drafted in drafts)], dim=1)
        rows, number = is_read.nonzero(as_tuple=True)
        logits = self.decoder.extend(self.state, rows, ids[is_read])
        return [self._in_all_rows(rows[number == n], logits[number == n]) for n in range(len(drafts) + 1)]

    def _take(self, going_B: Tensor, logits_BV: Tensor, drafted: Drafted) -> Tensor:
        """Let the rows that go on know their next id, drafted or not; bool [B], in which of them the draft is kept."""
        ids_B, kept_B = verified(self.sampling, logits_BV, drafted)
        log_probabilities = logits_BV.float().log_softmax(-1).gather(1, ids_B[:, None])[:, 0].tolist()
        for row, (which, drawn, going) in enumerate(zip(self._in_row, ids_B.tolist(), going_B.tolist(), strict=True)):
            if going and which is not None:
                self._known.append(Drawn(which, drawn, log_probabilities[row]))
        self.sampling.read(ids_B, going_B)
        self._unread_B = torch.where(going_B, ids_B, self._unread_B)
        return kept_B & going_B

    def _in_all_rows(self, rows: Tensor, logits: Tensor) -> Tensor:
        """[B, V], zeros in other rows."""
        return logits.new_zeros(len(self._in_row), VOCAB_SIZE).index_copy(0, rows, logits)


def verified(sampling: SamplingRows, logits_BV: Tensor, drafted: Drafted) -> tuple[Tensor, Tensor]:
    """What comes next by the model's logits: what was drafted, or another id.

    Returns:
        ids [B], and whether each is the drafted one and was kept, bool [B].
    """
    ours_BV, theirs_BV = sampling.weights(logits_BV), drafted.weights_BV
    p_BV = ours_BV.double() / ours_BV.sum(-1, keepdim=True)
    q_BV = theirs_BV.double() / theirs_BV.sum(-1, keepdim=True).clamp(min=1)
    p_B, q_B = (part.gather(1, drafted.ids_B[:, None])[:, 0] for part in (p_BV, q_BV))
    kept_B = drafted.exists_B & (_random(sampling, ACCEPTS) * q_B < p_B * 2**RANDOM_BITS)
    more_BV = ((p_BV - q_BV).clamp(min=0) * 2**36).round().long()
    is_redrawn_B = drafted.exists_B & more_BV.any(-1)
    chosen_B = drawn_from(torch.where(is_redrawn_B[:, None], more_BV, ours_BV), _random(sampling, CHOICES))
    return torch.where(kept_B, drafted.ids_B, chosen_B), kept_B


def drawn_from(weights_BV: Tensor, number_B: Tensor) -> Tensor:
    """An id in proportion to integer weights, by a random number of RANDOM_BITS for each row."""
    upto_BV = weights_BV.cumsum(-1)
    return (upto_BV <= ((number_B * upto_BV[:, -1]) >> RANDOM_BITS)[:, None]).sum(-1)


def _random(sampling: SamplingRows, series: int) -> Tensor:
    """A random number for the next id of each row. What is drafted anew after a rejection uses those of its place
    again: they took no part in what was decided so far.
    """
    return random_numbers(sampling.seed ^ series, sampling.drawn)
