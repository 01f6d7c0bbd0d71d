"""Several bytes a step, with no other model: the byte LM drafts them, the rest verifies the draft at once.

The byte LM must read every byte anyway, and inside a patch it is sure of the next one. So it draws bytes until it is
not (the patch ends there), and encoder and decoder read them in one pass. A drafted byte is kept with probability
min(1, p / q), p and q being what the model and the byte LM give it; the first that is not is drawn anew from what p
has more than q, and what was read after it is taken back. So what comes out has the distribution of plain decoding,
and is the same where the likeliest byte is taken.

Source: Leviathan et al. 2023 and Chen et al. 2023 for the rule; the draft by the byte LM is this project's.
"""

from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.inference.decode import Decoder
from bytelatent.inference.engine import Continuation, Drawn
from bytelatent.inference.sampling import RANDOM_BITS, SamplingRows, random_numbers
from bytelatent.inference.state import SLACK, DecodeState
from bytelatent.model import entropies
from bytelatent.vocab import EOS

# Shapes: V vocabulary

DRAFTS, ACCEPTS, RESIDUALS = 1 << 60, 2 << 60, 3 << 60  # added to a seed: three unrelated series of random numbers


@dataclass
class _Row:
    """A sequence that is being drafted."""

    which: Continuation
    sampling: SamplingRows  # of this row alone
    logits: Tensor | None  # [V] the model's, of the next id; None: `unread` must be read first
    draft_logits: Tensor | None  # [V] the byte LM's
    unread: int | None = None  # an id that was drawn and not read yet
    draws: int = 0  # random numbers used
    draft: list[int] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # [V] what each was drawn from
    before: list[SamplingRows] = field(default_factory=list)  # what the drawing of each depended on
    found: list[float] = field(default_factory=list)  # entropy after each id that is read, `unread` included


class SpeculativeRows:
    """Rows that come on by several bytes a step.

    Args:
        decoder: of a BLT with a byte LM.
        longest: drafted bytes at most.
        bound: nats; the draft ends where the byte LM is less sure than that. None: where the patch does.

    Attributes:
        drafted, accepted: bytes so far.
    """

    def __init__(self, decoder: Decoder, num_rows: int, longest: int = 8, bound: float | None = None):
        if decoder.byte_lm is None or decoder.patching is None or decoder.patching.threshold is None:
            raise UserError("speculation: it drafts with the byte LM, which this model's patches do not need")
        self.decoder = decoder
        self.longest = min(longest, SLACK - 2)
        self.bound = decoder.patching.threshold if bound is None else bound
        self.state = decoder.empty(num_rows)
        self.drafted = self.accepted = 0
        self._rows: dict[int, _Row] = {}
        self._known: list[Drawn] = []

    def admit(self, row: int, state: DecodeState, source: int, logits: Tensor, which: Continuation) -> None:
        self.state.put(row, state, source)
        sampling = SamplingRows.empty(1, self.decoder.device)
        sampling.put(0, which.sampling, which.prompt, which.max_new_bytes)
        self._rows[row] = _Row(which, sampling, logits, None)
        # What the byte LM expects next was not kept: it reads the last id once more.
        last = which.prompt[-1:].to(self.decoder.device)
        self._rows[row].draft_logits = self._read([row], last, [int(self.state.position[row]) - 1])[0]

    def release(self, row: int) -> None:
        self._rows.pop(row, None)

    def drawn(self) -> list[Drawn]:
        known, self._known = self._known, []
        return known

    def advance(self) -> None:
        """Draft, verify, and take back, in every row."""
        running = {row: one for row, one in self._rows.items() if int(one.sampling.remaining) > 0 and not _ended(one)}
        if not running:
            return
        for one in running.values():
            one.draft, one.weights, one.before, one.found = [], [], [], []
        self._draft(running)
        read = {row: ([one.unread] if one.unread is not None else []) + one.draft for row, one in running.items()}
        counts = [len(ids) for ids in read.values()]
        which = torch.tensor([row for row, ids in read.items() for _ in ids], device=self.decoder.device)
        ids = torch.tensor([i for ids in read.values() for i in ids], device=self.decoder.device)
        found = torch.tensor([h for one in running.values() for h in one.found], device=self.decoder.device)
        begin = {row: int(self.state.position[row]) for row in running}
        logits = self.decoder.extend(self.state, which, ids, found).split(counts)
        for (row, one), new in zip(running.items(), logits, strict=True):
            expected = list(new) if one.logits is None else [one.logits, *new]
            position = begin[row] + (one.unread is not None)
            kept = self._verify(one, expected)
            self.state.rewind(row, position + kept)

    def _draft(self, running: dict[int, _Row]) -> None:
        """Let the byte LM draw ids and read them, until it is unsure."""
        position = {row: int(self.state.position[row]) for row in running}
        unread = {row: one for row, one in running.items() if one.unread is not None}
        if unread:
            ids = torch.tensor([one.unread for one in unread.values()], device=self.decoder.device)
            for one, logits in zip(
                unread.values(), self._read(list(unread), ids, [position[r] for r in unread]), strict=True
            ):
                one.draft_logits = logits
                one.found.append(float(entropies(logits)))
        drafting = dict(running)
        for _ in range(self.longest):
            for one in drafting.values():
                assert one.draft_logits is not None
                sampling = deepcopy(one.before[-1] if one.before else one.sampling)
                if one.draft:
                    _note(sampling, one.draft[-1])
                one.before.append(sampling)
                one.weights.append(sampling.weights(one.draft_logits[None])[0])
                one.draft.append(_drawn_from(one.weights[-1], self._random(one, DRAFTS)))
            # Nothing is read after the end of a text; the byte that ends a row need not be, but may.
            drafting = {row: one for row, one in drafting.items() if one.draft[-1] != EOS}
            ended = [one for one in running.values() if one.draft[-1] == EOS and len(one.found) < _num_read(one)]
            for one in ended:
                one.found.append(0.0)
            if not drafting:
                return
            at = [position[row] + _num_read(one) - 1 for row, one in drafting.items()]
            ids = torch.tensor([one.draft[-1] for one in drafting.values()], device=self.decoder.device)
            for one, logits in zip(drafting.values(), self._read(list(drafting), ids, at), strict=True):
                one.draft_logits = logits
                one.found.append(float(entropies(logits)))
            drafting = {
                row: one
                for row, one in drafting.items()
                if one.found[-1] <= self.bound and len(one.draft) < int(one.sampling.remaining)
            }
            if not drafting:
                return

    def _verify(self, one: _Row, expected: list[Tensor]) -> int:
        """Keep drafted ids as far as they hold; how many of them stay read."""
        one.unread = None
        self.drafted += len(one.draft)
        for number, (drafted, theirs, sampling) in enumerate(zip(one.draft, one.weights, one.before, strict=True)):
            ours = sampling.weights(expected[number][None])[0]
            p, q = ours.double() / ours.sum(), theirs.double() / theirs.sum()
            chosen = drafted
            if self._random(one, ACCEPTS) / 2**RANDOM_BITS * float(q[drafted]) >= float(p[drafted]):
                more = ((p - q).clamp(min=0) * 2**36).round().long()
                chosen = _drawn_from(more if bool(more.any()) else ours, self._random(one, RESIDUALS))
            log_probability = float(expected[number].float().log_softmax(-1)[chosen])
            self._known.append(Drawn(one.which, chosen, log_probability))
            _note(one.sampling, chosen)
            if chosen != drafted:
                one.unread, one.logits = chosen, None
                return number
            self.accepted += 1
        one.logits = expected[len(one.draft)]
        return len(one.draft)

    def _random(self, one: _Row, series: int) -> int:
        """The next random number of a series, RANDOM_BITS wide."""
        one.draws += 1
        seed = one.sampling.seed ^ (series - (1 << 64) if series >= 1 << 63 else series)
        return int(random_numbers(seed, torch.full_like(seed, one.draws)))

    def _read(self, rows: list[int], ids: Tensor, position: list[int]) -> Tensor:
        where = torch.tensor([rows, position], device=self.decoder.device)
        with torch.no_grad():
            return self.decoder.read_byte_lm(self.state, where[0], ids, where[1])


def _num_read(one: _Row) -> int:
    return len(one.draft) + (one.unread is not None)


def _ended(one: _Row) -> bool:
    return one.unread == EOS or one.which.ended is not None


def _note(sampling: SamplingRows, drawn: int) -> None:
    device = sampling.seed.device
    sampling.read(torch.tensor([drawn], device=device), torch.ones(1, dtype=torch.bool, device=device))


def _drawn_from(weights_V: Tensor, number: int) -> int:
    """An id in proportion to integer weights, by a random number of RANDOM_BITS."""
    upto_V = weights_V.cumsum(0)
    return int((upto_V <= (number * int(upto_V[-1])) >> RANDOM_BITS).sum())
