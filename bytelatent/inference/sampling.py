"""From logits to ids, for many slots at once, each as if it were alone.

All of it is tensors of fixed shapes that never wait for the device, so that a CUDA graph can hold it. A slot's id is
the same in any batch: sums over the vocabulary are sums of integers, which no order of summation changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bytelatent.device import on_device
from bytelatent.inference.settings import Sampling
from bytelatent.inference.utf8 import NEEDED, RESUMED, TRANSITIONS
from bytelatent.vocab import BYTES, EOS, OFFSET, VOCAB_SIZE, Vocabulary

# Shapes: B slots, V vocabulary, N ids of a prompt, S states of the automaton

RANDOM_BITS = 24  # of a draw
WEIGHT_BITS = 30  # of the likeliest id's weight
ANY = 1 << 30  # in place of top_k: more ids than there are
NEVER = 1 << 30  # bytes needed after an id that may not be drawn: more than a slot can have
FEW = 16  # slots
COLDEST = 2.0**-149  # the lowest temperature above 0 in float32; 0 itself is divided by none
FREE, READY, OUTDATED = 0, 1, 2  # slots without a constraint; with what it allows next; with what it allowed before
FAR = 1e30  # takes the place of infinite logits, which have no differences


@dataclass(frozen=True)
class SamplingOption:
    """How a field of `Sampling` reaches the slots: a number for each, which the device's draw reads."""

    dtype: torch.dtype
    neutral: float  # what slots hold that nothing was put into
    value: Callable[[Sampling], float]


_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max

# To add a field: declare it in `Sampling`, add it here and as a field of `SamplingSlots`, apply it in `weights`, and
# give it to the kernel of `bytelatent.inference.step.sampling`. A test checks that nothing is missing.
OPTIONS: dict[str, SamplingOption] = {
    "temperature": SamplingOption(torch.float32, 0, lambda sampling: min(sampling.temperature, _LARGEST)),
    "top_k": SamplingOption(torch.int64, 1, lambda sampling: _top_k(sampling)),
    "top_p": SamplingOption(torch.float32, 1, lambda sampling: 1 if sampling.top_p is None else sampling.top_p),
    "min_p": SamplingOption(torch.float32, 0, lambda sampling: 0 if sampling.min_p is None else sampling.min_p),
    # Neither a penalty of 0 nor an infinite one: float32 may round to them what is not.
    "repetition_penalty": SamplingOption(
        torch.float32, 1, lambda sampling: min(max(sampling.repetition_penalty, _SMALLEST), _LARGEST)
    ),
    "seed": SamplingOption(torch.int64, 0, lambda sampling: _as_int64(sampling.seed)),
    "valid_utf8": SamplingOption(torch.bool, False, lambda sampling: sampling.valid_utf8),
}
OF_ALL_SLOTS = {"utf8_after", "needed", "needed_after", "is_special", "is_text"}  # fields of SamplingSlots
BY_ENGINE = {"stop"}  # fields that the engine applies to what was drawn


def _utf8_state(prompt_ids: Tensor) -> int:
    """The automaton's state after a prompt, which depends on its last three bytes only."""
    state = 0
    for id_ in prompt_ids[-3:].tolist():
        state = 0 if id_ < OFFSET else int(RESUMED[state, id_ - OFFSET])
    return state


def _top_k(sampling: Sampling) -> int:
    takes_likeliest = sampling.temperature <= COLDEST / 2  # float32 rounds it to 0
    return 1 if takes_likeliest else min(sampling.top_k or ANY, ANY)


class Start(NamedTuple):
    """What a slot begins with; see `SamplingSlots.put`."""

    sampling: Sampling
    prompt_ids: Tensor
    max_new_bytes: int
    is_constrained: bool


@dataclass
class SamplingSlots:
    """How each of B slots draws, and what that depends on."""

    temperature: Tensor  # [B] float32; 0 takes the likeliest id
    top_k: Tensor  # [B] int64; V: any; 1 at temperature 0
    top_p: Tensor  # [B] float32; 1: any
    min_p: Tensor  # [B] float32; 0: any
    repetition_penalty: Tensor  # [B] float32; 1: none
    seed: Tensor  # [B] int64
    drawn: Tensor  # [B] int64, ids drawn so far: which of the seed's random numbers comes next
    seen: Tensor  # [B, V] bool, the bytes or tokens that have occurred
    valid_utf8: Tensor  # [B] bool
    utf8: Tensor  # [B] int64, state of the automaton after what was read
    remaining: Tensor  # [B] int64, ids that may still be drawn
    constraint: Tensor  # [B] int64, FREE, READY or OUTDATED: then nothing may be drawn
    allowed: Tensor  # [B, V] bool, what a constraint allows next
    utf8_after: Tensor  # [S, V] int64, the state after an id; the same for all slots, as are the next three
    needed: Tensor  # [S] int64, bytes that a character in this state still needs
    needed_after: Tensor  # [S, V] int64, bytes that its character still needs after an id; NEVER: it may not be drawn
    is_special: Tensor  # [V] bool, ids that are never drawn: neither text nor EOS
    is_text: Tensor  # [V] bool

    @classmethod
    def empty(
        cls,
        num_slots: int,
        device: torch.device | str,
        vocabulary: Vocabulary = BYTES,
        vocab_size: int = VOCAB_SIZE,
    ) -> "SamplingSlots":
        """Empty slots, which draw the most likely ids.

        Args:
            vocabulary: of the ids; `valid_utf8` is for bytes.
            vocab_size: ids that have logits, the vocabulary's or more.
        """

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((num_slots,), value, dtype=dtype, device=device)

        utf8_after = torch.zeros(1 if vocabulary.is_tokens else len(NEEDED), vocab_size, dtype=torch.int64)
        needed, needed_after = NEEDED[: len(utf8_after)], torch.zeros_like(utf8_after)
        if not vocabulary.is_tokens:
            utf8_after[:, OFFSET:] = RESUMED  # a special id is a border between texts
            needed_after[:, :OFFSET] = NEVER
            needed_after[:, OFFSET:] = NEEDED[TRANSITIONS]
            needed_after[needed_after > NEEDED[:-1].max()] = NEVER
            needed_after[0, EOS] = 0
        is_text = torch.zeros(vocab_size, dtype=torch.bool)
        is_text[: vocabulary.size] = torch.from_numpy(vocabulary.id_bytes > 0)
        is_special = ~is_text
        is_special[vocabulary.eos] = False
        return cls(
            **{name: full(option.neutral, option.dtype) for name, option in OPTIONS.items()},
            drawn=full(0, torch.int64),
            seen=torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device),
            utf8=full(0, torch.int64),
            remaining=full(0, torch.int64),
            constraint=full(FREE, torch.int64),
            allowed=torch.ones(num_slots, vocab_size, dtype=torch.bool, device=device),
            utf8_after=utf8_after.to(device),
            needed=needed.to(device),
            needed_after=needed_after.to(device),
            is_special=is_special.to(device),
            is_text=is_text.to(device),
        )

    @property
    def vocab_size(self) -> int:
        return self.seen.shape[1]

    def put(
        self, slot: int, sampling: Sampling, prompt_ids: Tensor, max_new_bytes: int, is_constrained: bool = False
    ) -> None:
        """Let a slot draw what follows a prompt, in place of what it held before.

        Args:
            prompt_ids: [N] on any device.
            max_new_bytes: ids that will be drawn at most, `MAX_NEW_BYTES` or fewer; with `valid_utf8` no character
                begins that would need more.
            is_constrained: whether a constraint decides what may be drawn, in place of `valid_utf8`; `constrain` before
                each draw.
        """
        self.put_all([slot], [Start(sampling, prompt_ids, max_new_bytes, is_constrained)])

    def put_all(self, slots: Sequence[int], starts: Sequence[Start]) -> None:
        """`put` for several slots. Each field is sent to the device once, which the host does not wait for."""
        device, samplings = self.seen.device, [start.sampling for start in starts]
        is_bytes = len(self.utf8_after) > 1
        values: dict[str, list[Any]] = {
            name: [option.value(sampling) for sampling in samplings] for name, option in OPTIONS.items()
        }
        values["top_k"] = [min(top_k, self.vocab_size) for top_k in values["top_k"]]
        values["valid_utf8"] = [start.sampling.valid_utf8 and not start.is_constrained for start in starts]
        values["constraint"] = [OUTDATED if start.is_constrained else FREE for start in starts]
        values["remaining"] = [start.max_new_bytes for start in starts]
        values["utf8"] = [_utf8_state(start.prompt_ids) if is_bytes else 0 for start in starts]
        seen = np.zeros((len(starts), self.vocab_size), dtype=np.bool_)
        for row, start in zip(seen, starts, strict=True):
            row[start.prompt_ids.cpu().numpy()] = True
        index = on_device(torch.tensor(slots), device)
        for name, given in values.items():
            field = getattr(self, name)
            field.index_copy_(0, index, on_device(torch.tensor(given, dtype=field.dtype), device))
        self.seen.index_copy_(0, index, on_device(torch.from_numpy(seen), device) & self.is_text)
        self.drawn.index_fill_(0, index, 0)

    def take_over(self, slots: Sequence[int], other: "SamplingSlots", sources: Sequence[int]) -> None:
        """Let `slots` go on as slots `sources` of others would."""
        to, of = (on_device(torch.tensor(each), self.seen.device) for each in (slots, sources))
        for name, mine in vars(self).items():
            if name not in OF_ALL_SLOTS:
                mine.index_copy_(0, to, getattr(other, name).index_select(0, of))

    def constrain(self, slots: Sequence[int], allowed: Sequence[np.ndarray]) -> None:
        """Let slots draw one of the ids that each one's constraint allows next, bool [V]; some id must be."""
        if not slots:
            return
        device = self.allowed.device
        rows, index = on_device(torch.from_numpy(np.stack(allowed)), device), on_device(torch.tensor(slots), device)
        self.allowed[:, : rows.shape[1]].index_copy_(0, index, rows)
        self.constraint.index_fill_(0, index, READY)

    def draw(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a byte or EOS for each slot. Nothing is changed: the same is drawn until `read` is called.

        Args:
            logits_BV: of what comes next, as the model gives them; infinite ones may be among them.

        Returns:
            ids, int64 [B]; their log-probabilities in nats, float32 [B], by the model alone: of all V ids, with no
            temperature, nothing penalised and nothing ruled out.
        """
        weight_BV = self.weights(logits_BV)
        upto_BV = weight_BV.cumsum(dim=-1)
        # Less than the sum of all weights, so some id is found; never one of weight 0, which adds nothing to the sum.
        point_B = _share(random_numbers(self.seed, self.drawn), upto_BV[:, -1])
        ids_B = (upto_BV <= point_B[:, None]).sum(dim=-1)
        log_probabilities_BV = logits_BV.float().log_softmax(dim=-1)
        return ids_B, log_probabilities_BV.gather(1, ids_B[:, None])[:, 0]

    def read(self, ids_B: Tensor, active_B: Tensor) -> None:
        """Read the id that came next in each slot, in place.

        Args:
            ids_B: int64.
            active_B: bool; other slots stay as they are.
        """
        if ids_B.device.type == "cpu":
            self._read_arrays(ids_B.numpy(), active_B.numpy())
            return
        every_V = torch.arange(self.vocab_size, device=ids_B.device)
        self.seen |= (every_V == ids_B[:, None]) & self.is_text & active_B[:, None]
        self.utf8.copy_(torch.where(active_B, self.utf8_after[self.utf8, ids_B], self.utf8))
        self.drawn += active_B
        self.constraint.masked_fill_(active_B & (self.constraint == READY), OUTDATED)
        self.remaining -= active_B.long()

    def _read_arrays(self, ids_B: np.ndarray, active_B: np.ndarray) -> None:
        """The same on a CPU, in NumPy, whose operations on a few numbers cost a third."""
        slots = (active_B & self.is_text.numpy()[ids_B]).nonzero()[0]
        self.seen.numpy()[slots, ids_B[slots]] = True
        utf8_B = self.utf8.numpy()
        np.copyto(utf8_B, self.utf8_after.numpy()[utf8_B, ids_B], where=active_B)
        drawn_B, remaining_B = self.drawn.numpy(), self.remaining.numpy()
        drawn_B += active_B
        remaining_B -= active_B
        constraint_B = self.constraint.numpy()
        constraint_B[active_B & (constraint_B == READY)] = OUTDATED

    def ruled_out(self) -> Tensor:
        """What may not be drawn, bool [B or 1, V]: special ids but EOS, and where asked for what would not be UTF-8 or
        is not allowed by a constraint.
        """
        if _asked(self.constraint, FREE):
            return torch.where(self.constraint[:, None] == FREE, self._no_text(), ~self.allowed)
        return self._no_text()

    def _no_text(self) -> Tensor:
        if not _asked(self.valid_utf8, False):
            return self.is_special[None]
        needed_B = self.needed[self.utf8]
        # A prompt may end within a character for which there is no room. It goes on nevertheless, as far as it can.
        room_B = torch.maximum(self.remaining, needed_B.clamp(min=1))
        no_longer_valid_BV = self.needed_after[self.utf8] >= room_B[:, None]
        return torch.where(self.valid_utf8[:, None], no_longer_valid_BV, self.is_special)

    def weights(self, logits_BV: Tensor) -> Tensor:
        """Sampling weights, proportional to probabilities, int64 [B, V]; 0 for ids that may not be drawn.

        The most likely id has 2^30; no slot has only zeros.
        """
        wide = torch.float32 if logits_BV.device.type == "mps" else torch.float64  # MPS has no float64
        logits = logits_BV.to(wide)
        if _asked(self.repetition_penalty, 1):
            penalty_B1 = self.repetition_penalty[:, None].to(wide)
            penalised = torch.where(logits > 0, logits / penalty_B1, logits * penalty_B1)
            logits = torch.where(self.seen, penalised, logits)
        logits = logits.nan_to_num(nan=-FAR).clamp_(-FAR, FAR).masked_fill_(self.ruled_out(), -torch.inf)

        temperature_B1 = self.temperature[:, None].clamp(min=COLDEST)
        relative_BV = (logits - logits.amax(-1, keepdim=True)).div_(temperature_B1).exp_()  # the likeliest's is 1
        weight_BV = (relative_BV * (1 << WEIGHT_BITS)).round_().long()
        if _asked(self.top_k, self.vocab_size) or _asked(self.top_p, 1):
            weight_BV = self._of_likeliest(logits, weight_BV)
        if _asked(self.min_p, 0):
            weight_BV.masked_fill_(relative_BV < self.min_p[:, None].to(wide), 0)
        return weight_BV

    def _of_likeliest(self, logits_BV: Tensor, weight_BV: Tensor) -> Tensor:
        """The weights of those that `top_k` and `top_p` leave, int64 [B, V]."""
        # From the likeliest to the least likely; stable, so that among equals the lowest id comes first.
        id_BV = logits_BV.argsort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(self.vocab_size, device=logits_BV.device)
        ordered_BV = weight_BV.gather(1, id_BV).masked_fill_(rank_V >= self.top_k[:, None], 0)
        upto_BV = ordered_BV.cumsum(dim=-1)
        share_B1 = self.top_p[:, None].to(logits_BV.dtype) * upto_BV[:, -1:].to(logits_BV.dtype)
        is_left_BV = ((upto_BV - ordered_BV).to(logits_BV.dtype) < share_B1) | (rank_V == 0)
        return torch.zeros_like(weight_BV).scatter_(1, id_BV, ordered_BV.masked_fill_(~is_left_BV, 0))


def _share(number: Tensor, total: Tensor) -> Tensor:
    """`number * total >> RANDOM_BITS` where the product may be beyond 64 bits."""
    low = total & ((1 << RANDOM_BITS) - 1)
    return number * (total >> RANDOM_BITS) + (number * low >> RANDOM_BITS)


def _asked(setting_B: Tensor, none: float) -> bool:
    """Whether some slot may ask for more than `none`. Only a CPU is asked, to leave out what is not needed; no other
    device is waited for.
    """
    return setting_B.device.type != "cpu" or any(value != none for value in setting_B.tolist())


def random_numbers(seed: Tensor, number: Tensor) -> Tensor:
    """Random numbers that depend on nothing but a seed and a counter.

    Args:
        seed, number: int64, any one shape.

    Returns:
        Integers from 0 to 2^24 - 1, all equally likely, int64.

    Source: Steele, Lea and Flood 2014, SplitMix64; the seed is mixed first, so that neighbouring ones are unrelated.
    """
    if seed.device.type == "cpu" and seed.dim() == 1 and len(seed) <= FEW:  # a tensor's operations cost more
        return torch.tensor([_number(*pair) for pair in zip(seed.tolist(), number.tolist(), strict=True)])
    return _number(seed, number)


def _number(seed: Any, number: Any) -> Any:
    """The hash of two numbers: tensors, or Python integers whose lowest 64 bits count."""
    return _shifted(_mixed(_mixed(seed) + (number + 1) * _as_int64(0x9E3779B97F4A7C15)), 64 - RANDOM_BITS)


def _mixed(x: Any) -> Any:
    """Every bit of the result depends on every bit of `x`, one to one. int64, whose products wrap around."""
    x = (x ^ _shifted(x, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _as_int64(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Any, bits: int) -> Any:
    """Logical (unsigned) right shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _as_int64(value: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
