"""Where patches start: for a whole batch at once, and step by step from a small carried state.

The decision about position i+1 uses only ids 0..i, so a prefix is patched the same with or without what follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.patching import bpe
from bytelatent.patching.modes import MODES, DecisionInputs, PatchSettings
from bytelatent.vocab import OFFSET, PADDING

# Shapes: B rows, N ids in a row, P patches


def next_starts(ids: Tensor, entropies: Tensor | None, position: Tensor, settings: PatchSettings) -> Tensor:
    """For each id, whether the id after it starts a patch.

    Args:
        ids: [..., N] ids; rows, or one packed stream of documents.
        entropies: [..., N] in nats, where the mode needs them: the uncertainty about the id that follows each id.
        position: [..., N] position of each id in its document, 0 at each document's start.
        settings: where patches start.

    Returns:
        bool [..., N]. At a document's last id it concerns the id that would follow in it. A document's first id always
        starts a patch, and is not part of it.
    """
    if settings.needs_tail:
        starts = bpe.token_starts(ids, position, str(settings.tokenizer))
    else:
        previous_entropies = None if entropies is None else _shift(entropies)
        starts = _natural_starts(settings, DecisionInputs(position, ids, _shift(ids), entropies, previous_entropies))
    if settings.max_patch_length is None:
        return starts
    index = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape)
    begins = (position == 0) | _shift(starts)
    last_natural_start = torch.where(begins, index, 0).cummax(dim=-1).values
    return starts | ((index + 1 - last_natural_start) % settings.max_patch_length == 0)


def patch_lengths(
    ids: Tensor | None, entropies: Tensor | None, settings: PatchSettings, include_next: bool = True
) -> Tensor:
    """Patch lengths of rows of ids.

    Args:
        ids: [B, N], rows padded at their end with -1; None where entropies alone decide.
        entropies: [B, N] in nats, where the mode needs them.
        settings: where patches start.
        include_next: lengths cover the N ids of a row and the one to come (rows sum to N+1); otherwise only the N ids.

    Returns:
        int64 [B, P], zero-padded.

    Raises:
        UserError: the mode needs what was not given.
    """
    given = ids if ids is not None else entropies
    if given is None or (ids is None and not settings.needs_entropies):
        raise UserError(f"patching mode '{settings.mode}' needs ids")
    if given.dim() != 2:
        raise UserError(f"patch_lengths takes [rows, ids], not a tensor of shape {list(given.shape)}")
    if entropies is not None and entropies.shape != given.shape:
        raise UserError(f"ids {list(given.shape)} and entropies {list(entropies.shape)} differ in shape")
    num_rows, num_ids = given.shape
    filler = torch.full(given.shape, OFFSET, dtype=torch.long, device=given.device)
    ids = filler if ids is None else ids
    real = ids != PADDING
    position = torch.arange(num_ids, device=ids.device).expand(num_rows, num_ids)
    first = torch.ones(num_rows, 1, dtype=torch.bool, device=ids.device)
    starts = torch.cat([first, next_starts(ids, entropies, position, settings)], dim=1)
    exists = torch.cat([first, real], dim=1) if include_next else torch.cat([real, ~first], dim=1)
    patch = (starts & exists).cumsum(dim=1) - 1
    lengths = torch.zeros(num_rows, num_ids + 1, dtype=torch.long, device=ids.device)
    lengths.scatter_add_(1, patch.clamp(min=0), exists.long())
    return lengths[:, : int((lengths > 0).sum(dim=1).max())] if num_rows else lengths


def starts_of_lengths(lengths: Tensor, num_ids: int) -> Tensor:
    """The inverse of `patch_lengths` for one row: for each of its ids, whether the next one starts a patch.

    Args:
        lengths: [P], zero-padded.

    Raises:
        UserError: they are not integers, or are negative, or sum neither to the number of ids nor to one more.
    """
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise UserError(f"patch_lengths are whole numbers, not {lengths.dtype}")
    total = int(lengths.sum())
    if bool((lengths < 0).any()):
        raise UserError(f"patch_lengths are 0 or more, not {int(lengths.min())}; 0 only fills up a row")
    if total not in (num_ids, num_ids + 1):
        raise UserError(f"patch_lengths sum to {total}; a row of {num_ids} ids needs {num_ids} or {num_ids + 1}")
    starts = torch.zeros(num_ids + 2, dtype=torch.bool, device=lengths.device)
    starts[lengths[lengths > 0].cumsum(0)] = True
    if total == num_ids:  # the lengths end before the next id, which then starts no patch yet
        starts[num_ids] = False
    return starts[1 : num_ids + 1]


@dataclass
class PatchState:
    """What the decision about the next id needs to remember, for B rows."""

    position: Tensor  # [B] ids read so far
    previous_id: Tensor  # [B]
    previous_entropy: Tensor  # [B] nats
    since_start: Tensor  # [B] ids read since the mode itself last started a patch
    tails: list[bpe.Tail] = field(default_factory=list)  # the last bytes of each row, for `bpe`

    @classmethod
    def empty(cls, num_rows: int, device: torch.device | str = "cpu") -> "PatchState":
        """Nothing read yet: the first id of every row will start a patch."""
        zeros = torch.zeros(num_rows, dtype=torch.long, device=device)
        return cls(zeros, zeros, zeros.float(), zeros, [bpe.Tail() for _ in range(num_rows)])


def step(
    state: PatchState, ids: Tensor, entropies: Tensor | None, settings: PatchSettings
) -> tuple[PatchState, Tensor]:
    """Read one id per row and decide about the one to come.

    Args:
        state: what was carried so far.
        ids: [B] the ids read now.
        entropies: [B] nats, the uncertainty about the id that follows, where the mode needs it.
        settings: where patches start.

    Returns:
        The new state, and bool [B]: the next id starts a patch.
    """
    tails = state.tails
    if settings.needs_tail:
        tails = [tail.read(int(i), str(settings.tokenizer)) for tail, i in zip(tails, ids.tolist(), strict=True)]
        natural = torch.tensor([tail.token_began for tail in tails], device=ids.device)
    else:
        natural = _natural_starts(
            settings, DecisionInputs(state.position, ids, state.previous_id, entropies, state.previous_entropy)
        )
    since_start = state.since_start + 1
    starts = natural
    if settings.max_patch_length is not None:
        starts = natural | (since_start % settings.max_patch_length == 0)
    carried = PatchState(
        position=state.position + 1,
        previous_id=ids,
        previous_entropy=state.previous_entropy if entropies is None else entropies.float(),
        since_start=torch.where(natural, 0, since_start),
        tails=tails,
    )
    return carried, starts


def _natural_starts(settings: PatchSettings, moment: DecisionInputs) -> Tensor:
    """Whether the next id starts a patch, before `max_patch_length`: elementwise, for a mode that needs no tail."""
    return MODES[settings.mode].decisions[settings.decision](settings, moment)


def _shift(values: Tensor) -> Tensor:
    """Each position's predecessor along the last dimension; zero (False) before the first."""
    return torch.cat([torch.zeros_like(values[..., :1]), values[..., :-1]], dim=-1)


@dataclass(frozen=True)
class Patch:
    """Bytes `start` to `end` (exclusive) of a text.

    Attributes:
        start, end: byte offsets in the text.
        text: those bytes as text; bytes that are not UTF-8 (a patch may cut a character) show as U+FFFD.
        entropies: nats, one per byte: how uncertain the byte LM was about the byte before it read it. None for modes
            that need no byte LM.
    """

    start: int
    end: int
    text: str
    entropies: Sequence[float] | None = None
