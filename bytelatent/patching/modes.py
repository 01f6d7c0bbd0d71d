"""The rules: for each id read, does the next one start a patch?

Every rule but `bpe` looks only at an id, the id before it, their entropies and the position. So each is written once,
for one moment; a batch applies it to shifted tensors, a decoder to the values it carries.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.patching import bpe
from bytelatent.patching.settings import PatchSettings
from bytelatent.vocab import OFFSET, PADDING

# Shapes: B rows, N ids in a row, P patches


def next_starts(ids: Tensor, entropies: Tensor | None, position: Tensor, settings: PatchSettings) -> Tensor:
    """For each id, whether the id after it starts a patch.

    Args:
        ids: [..., N] ids; rows, or one packed stream of documents.
        entropies: [..., N] in nats, where the rule needs them: the uncertainty about the id that follows each id.
        position: [..., N] position of each id in its document, 0 at each document's start.
        settings: the rule.

    Returns:
        bool [..., N]. Whatever it says at a document's last id concerns the id that would come next in it; that a
        document's first id starts a patch goes without saying.
    """
    if settings.mode == "bpe":
        starts = bpe.next_starts(ids, position, str(settings.tokenizer))
    else:
        starts = _natural(
            settings, position, ids, _shift(ids), entropies, None if entropies is None else _shift(entropies)
        )
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
        entropies: [B, N] in nats, where the rule needs them.
        settings: the rule.
        include_next: lengths cover the N ids of a row and the one to come (rows sum to N+1); otherwise only the N ids.

    Returns:
        int64 [B, P], zero-padded.

    Raises:
        UserError: the rule needs what was not given.
    """
    given = ids if ids is not None else entropies
    if given is None or (ids is None and not settings.needs_entropies):
        raise UserError(f"patching rule '{settings.mode}' needs ids")
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


@dataclass
class PatchState:
    """What the decision about the next id needs to remember, for B rows."""

    position: Tensor  # [B] ids read so far
    previous_id: Tensor  # [B]
    previous_entropy: Tensor  # [B] nats
    since_start: Tensor  # [B] ids read since the rule itself last started a patch
    tails: list[bpe.Tail] = field(default_factory=list)  # the last bytes of each row, for `bpe`

    @classmethod
    def empty(cls, num_rows: int, device: torch.device | str = "cpu") -> "PatchState":
        """Nothing read yet: the first id of every row will start a patch."""
        zeros = torch.zeros(num_rows, dtype=torch.long, device=device)
        return cls(zeros, zeros, zeros.float(), zeros, [bpe.Tail() for _ in range(num_rows)])


def step(
    state: PatchState, ids: Tensor, entropies: Tensor | None, settings: PatchSettings
) -> tuple[PatchState, Tensor]:
    """Read one id a row and decide about the one to come.

    Args:
        state: what was carried so far.
        ids: [B] the ids read now.
        entropies: [B] nats, the uncertainty about the id that follows, where the rule needs it.
        settings: the rule.

    Returns:
        The new state, and bool [B]: the next id starts a patch.
    """
    tails = state.tails
    if settings.mode == "bpe":
        tails = [tail.read(int(i), str(settings.tokenizer)) for tail, i in zip(tails, ids.tolist(), strict=True)]
        natural = torch.tensor([tail.token_began for tail in tails], device=ids.device)
    else:
        natural = _natural(settings, state.position, ids, state.previous_id, entropies, state.previous_entropy)
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


def _natural(
    settings: PatchSettings,
    position: Tensor,
    ids: Tensor,
    previous_id: Tensor,
    entropies: Tensor | None,
    previous_entropy: Tensor | None,
) -> Tensor:
    """The rule itself, before `max_patch_length`: does the id after `ids` start a patch? Elementwise."""
    if settings.mode == "byte":
        return torch.ones_like(position, dtype=torch.bool)
    if settings.mode == "static":
        assert settings.patch_size is not None
        return (position + 1) % settings.patch_size == 0
    if settings.mode == "space":
        # The first of a run of space-like bytes ends a patch, and so does every special id (itself space-like).
        continues_run = (position > 0) & _space_like(previous_id)
        return (ids < OFFSET) | (_space_like(ids) & ~continues_run)
    assert settings.mode == "entropy"
    if entropies is None or previous_entropy is None:
        raise UserError("patching rule 'entropy' needs the byte LM's entropies")
    assert settings.threshold is not None
    entropies, previous_entropy = entropies.float(), previous_entropy.float()  # a batch in bfloat16 decides as `step`
    rises = entropies - previous_entropy
    if settings.monotonicity:
        return (position <= 1) | (rises > settings.threshold)
    if settings.threshold_add is not None:
        # The published rule decides at positions 0 and 1 alone and never starts a patch at position 3.
        combined = (entropies > settings.threshold) & (rises > settings.threshold_add)
        return (position <= 1) | (combined & (position != 2))
    return (position == 0) | (entropies > settings.threshold)


def _space_like(ids: Tensor) -> Tensor:
    """Neither an ASCII letter or digit nor a UTF-8 continuation byte. Special ids count as space-like."""
    byte = ids - OFFSET
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    upper = (byte >= ord("A")) & (byte <= ord("Z"))
    lower = (byte >= ord("a")) & (byte <= ord("z"))
    continuation = (byte >= 0x80) & (byte <= 0xBF)
    return ~(digit | upper | lower | continuation)


def _shift(values: Tensor) -> Tensor:
    """Each position's predecessor along the last dimension; zero (False) before the first."""
    return torch.cat([torch.zeros_like(values[..., :1]), values[..., :-1]], dim=-1)
