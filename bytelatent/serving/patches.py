"""The answer of `/v1/patches`: entropies, where patches start in each mode, and what they cost."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bytelatent.blt import BLT
from bytelatent.errors import UserError
from bytelatent.inference import prompt_ids
from bytelatent.inference.scoring import entropies_of
from bytelatent.model import BLTSettings, ByteLM, Stream, lines_as_documents, pack_rows
from bytelatent.model.flops import flops_per_byte
from bytelatent.patching import MODES, PatchSettings, next_starts
from bytelatent.serving.shapes import OTHER_MODES
from bytelatent.vocab import to_bytes

SHARES = 32  # steps between no patches and one per byte, at which FLOPs are counted


@torch.no_grad()
def patches_answer(
    blt: BLT,
    text: str | bytes,
    modes: Sequence[str] = OTHER_MODES,
    threshold: float | None = None,
    with_patches: bool = True,
    entropies: Tensor | None = None,
) -> dict[str, Any]:
    """The patches of a text, as JSON.

    Args:
        modes: modes to compare with, such as `space` and `static:4`; the model's own is always there.
        threshold: in place of the model's own, in nats.
        with_patches: whether `patches` is there, which is long.
        entropies: of BOS and each byte, where they are known already.

    Returns:
        `bytes`, their number; `entropies` in nats of each byte before it is read, null where the mode needs none;
        `starts`, the offsets of bytes at which patches start, and `patches` (`start`, `end`, `text`); `mode` and
        `patching`, which settings made them; `threshold`; `flops_saved`, see `_Costs.saved`; `modes`, for each mode
        its `starts` and `flops_saved`; `flops`, see `_Costs.plain`.

    Raises:
        UserError: there is no such mode, or the model has no threshold to change.
    """
    data, own = to_bytes(text), own_settings(blt, threshold)
    settings = {mode_name(own): own} | {name: mode_settings(name) for name in modes if name != mode_name(own)}
    stream = pack_rows([prompt_ids(data)]).to(blt.device)
    if entropies is None and own.needs_entropies:
        entropies = patch_entropies(blt, own, stream)
    costs = _Costs.of(blt, own)
    found = {}
    for name, each in settings.items():
        starts = _starts(stream, entropies, each, len(data))
        found[name] = {"starts": starts, "flops_saved": costs.saved(len(data), len(starts), each.needs_entropies)}
    name = mode_name(own)
    answer = {
        "bytes": len(data),
        # Nine digits give back the float32, so that a reader compares it with a threshold as the model does.
        "entropies": None if entropies is None else [float(f"{x:.9g}") for x in entropies[: len(data)].tolist()],
        **found[name],
        "mode": name,
        "patching": own.plain() | {"tokenizer": None, "decision": own.decision},
        "threshold": own.threshold,
        "modes": found,
        "flops": costs.plain(),
    }
    if with_patches:
        starts = answer["starts"]
        answer["patches"] = [
            {"start": start, "end": end, "text": data[start:end].decode("utf-8", "replace")}
            for start, end in zip(starts, [*starts[1:], len(data)], strict=False)  # an empty text has none
        ]
    return answer


def own_settings(blt: BLT, threshold: float | None) -> PatchSettings:
    """The model's patching settings, with another threshold."""
    if threshold is None:
        return blt.patching
    if not blt.patching.needs_entropies:
        raise UserError(f"threshold: this model has patches by {blt.patching.in_words()}; leave it out")
    return PatchSettings.parse({**blt.patching.plain(), "threshold": threshold}, "threshold")


def mode_name(settings: PatchSettings) -> str:
    """As in `modes`; a tokenizer's path is the server's own business."""
    return "bpe" if settings.mode == "bpe" else settings.name


def mode_settings(name: str) -> PatchSettings:
    """The settings of a mode that needs neither a threshold nor a file, by its name."""
    mode, _, value = name.partition(":")
    its = MODES.get(mode)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if its is None or its.needs_entropies or "tokenizer" in its.settings or bool(value) != bool(its.named_by):
        raise UserError(f"modes: there is no mode {name[:40]!r} to compare with; modes: space, static:N, byte")
    return PatchSettings.parse({"mode": mode} | ({its.named_by: value} if its.named_by else {}), "modes")


@torch.no_grad()
def patch_entropies(blt: BLT, settings: PatchSettings, stream: Stream) -> Tensor:
    """The entropies by which patches are found, [T] nats."""
    byte_lm = blt.needed_entropy_model()
    assert isinstance(byte_lm, ByteLM)
    return entropies_of(byte_lm, lines_as_documents(stream) if settings.reset_at_newline else stream)


def _starts(stream: Stream, entropies: Tensor | None, settings: PatchSettings, num_bytes: int) -> list[int]:
    """Offsets of bytes; the first byte always starts a patch, as where patches are shown."""
    starts = next_starts(stream.ids, entropies, stream.position, settings)[:num_bytes]
    starts[:1] = True
    return starts.nonzero()[:, 0].tolist()


class _Costs:
    """FLOPs per byte of a forward pass, by how many patches there are per byte.

    Args:
        by_share: FLOPs at 0, 1/32, ... 1 patches per byte, at the model's context.
        of_entropies: those of the entropy model.
    """

    def __init__(self, by_share: tuple[float, ...], of_entropies: float):
        self.by_share, self.of_entropies = by_share, of_entropies

    @classmethod
    def of(cls, blt: BLT, settings: PatchSettings) -> "_Costs":
        context = blt.context
        byte_lm = blt.entropy_model if settings.needs_entropies else None
        of_entropies = 0.0 if byte_lm is None else flops_per_byte(byte_lm.settings, 1.0, context)
        return cls(_flops_by_share(blt.model.settings.model_dump_json(), context), of_entropies)

    def saved(self, num_bytes: int, num_patches: int, by_entropy: bool) -> float | None:
        """The share of a forward pass's FLOPs that patches save, against one patch per byte.

        The entropy model is counted where it finds the patches. Negative where that costs more than they save.
        """
        if not num_bytes:
            return None
        share = num_patches / num_bytes * SHARES
        below = min(int(share), SHARES - 1)
        # Nearly linear: the global transformer runs once per patch.
        low, high = self.by_share[below], self.by_share[below + 1]
        flops = low + (high - low) * (share - below) + (self.of_entropies if by_entropy else 0.0)
        return 1 - flops / self.by_share[-1]

    def plain(self) -> dict[str, Any]:
        """What a reader needs to count for another threshold."""
        return {"per_byte": list(self.by_share), "entropy_model": self.of_entropies}


@lru_cache(maxsize=4)
def _flops_by_share(settings: str, context: int) -> tuple[float, ...]:
    model = BLTSettings.model_validate_json(settings)
    sizes = [SHARES / share if share else 1e9 for share in range(SHARES + 1)]
    return tuple(flops_per_byte(model, size, context) for size in sizes)
