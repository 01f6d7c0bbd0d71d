"""Patching modes: one table, and the settings of a mode.

A mode decides, for each id read, whether the next one starts a patch. Every mode but `bpe` looks only at an id, the id
before it, their entropies and the position. So each of its decisions is written once, for one moment; a batch applies
it to shifted tensors, a decoder to the values it carries.

To add a mode, write its name in `ModeName`, its entry in `MODES`, and its decision on the device in
`bytelatent.inference.step.patching`, or mark it `on_host`.

Source: Pagnoni et al. 2024, section 2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.vocab import OFFSET

ModeName = Literal["entropy", "space", "static", "byte", "bpe"]


class PatchSettings(Settings):
    """Where patches start.

    Attributes:
        mode: `entropy` starts a patch where the byte LM finds the next byte hard to guess; `space` after each
            space-like byte; `static` every `patch_size` ids; `byte` at every id; `bpe` at a tokenizer's boundaries.
        threshold: nats. A patch starts at i+1 when H_i > threshold.
        monotonicity: a patch starts where the entropy rises: H_i - H_{i-1} > threshold.
        threshold_add: both must hold: H_i > threshold and H_i - H_{i-1} > threshold_add.
        reset_at_newline: the byte LM's context is reset at each newline (`entropy` only): its entropies are those of a
            text that begins there.
        patch_size: ids in a patch (`static` only).
        max_patch_length: longer patches are split from their start.
        tokenizer: path of a Hugging Face `tokenizer.json` (`bpe` only).

    Source: Pagnoni et al. 2024, section 2; of the reset section 4.4.
    """

    mode: ModeName = "entropy"
    threshold: float | None = Field(default=None, allow_inf_nan=False)
    monotonicity: bool = False
    threshold_add: float | None = Field(default=None, allow_inf_nan=False)
    reset_at_newline: bool = False
    patch_size: int | None = Field(default=None, ge=1, le=2**31)
    max_patch_length: int | None = Field(default=None, ge=1, le=2**31)
    tokenizer: str | None = None

    @model_validator(mode="after")
    def _only_what_the_mode_uses(self) -> Self:
        for mode, its in MODES.items():
            for name in its.settings:
                if self.mode != mode and getattr(self, name) not in (None, False):
                    raise ValueError(f"{name} belongs to mode '{mode}', not to '{self.mode}'; leave it out")
        for name, what in MODES[self.mode].required.items():
            if getattr(self, name) is None:
                raise ValueError(f"mode '{self.mode}' needs {what}")
        if self.monotonicity and self.threshold_add is not None:
            raise ValueError("monotonicity and threshold_add exclude each other; set one of them")
        return self

    @property
    def needs_entropies(self) -> bool:
        """Whether the mode reads the byte LM's entropies."""
        return MODES[self.mode].needs_entropies

    @property
    def needs_tail(self) -> bool:
        """Whether the mode decides from the last bytes of a row, see `bpe`, and not from one moment."""
        return not MODES[self.mode].decisions

    @property
    def decides_on_host(self) -> bool:
        """Whether the mode has no GPU implementation."""
        return MODES[self.mode].on_host

    @property
    def decision(self) -> str:
        """The name of the mode's decision that these settings choose; empty where a tail decides."""
        return MODES[self.mode].decision_of(self)

    @property
    def name(self) -> str:
        """The mode with its most telling setting, `static:4`, unless that is a threshold."""
        setting = MODES[self.mode].named_by
        return self.mode if setting is None or self.needs_entropies else f"{self.mode}:{getattr(self, setting)}"

    def in_words(self) -> str:
        """The settings in a few words: `entropy, threshold 1.34 nats`."""
        words: list[str] = [self.mode]
        if self.monotonicity:
            words[0] = "rise of the entropy"
        if self.threshold is not None:
            words.append(f"threshold {self.threshold:.4g} nats")
        if self.threshold_add is not None:
            words.append(f"rise above {self.threshold_add:.4g}")
        if self.reset_at_newline:
            words.append("reset at newlines")
        if self.patch_size is not None:
            words.append(f"{self.patch_size} ids each")
        if self.max_patch_length is not None:
            words.append(f"at most {self.max_patch_length} ids")
        if self.tokenizer is not None:
            words.append(self.tokenizer)
        return ", ".join(words)


@dataclass(frozen=True)
class DecisionInputs:
    """What is known when an id has been read; tensors of one shape."""

    position: Tensor  # of the id
    ids: Tensor
    previous_ids: Tensor
    entropies: Tensor | None  # float32, nats: the uncertainty about the id that follows
    previous_entropies: Tensor | None

    def rises(self, settings: PatchSettings) -> tuple[Tensor, Tensor]:
        """The entropies, and by how much they rise.

        Raises:
            UserError: there are none.
        """
        if self.entropies is None or self.previous_entropies is None:
            raise UserError(f"patching mode '{settings.mode}' needs the byte LM's entropies")
        # In float32, so that a batch in bfloat16 decides as a step does.
        entropies = self.entropies.float()
        return entropies, entropies - self.previous_entropies.float()


Decision = Callable[[PatchSettings, DecisionInputs], Tensor]


@dataclass(frozen=True)
class PatchingMode:
    """A patching mode.

    Attributes:
        decisions: whether the next id starts a patch, elementwise, by name; settings choose one, see `decision_of`.
            None of them: the last bytes of a row decide, see `bpe`.
        settings: which settings belong to this mode alone.
        required: settings that must be given, and what they are.
        named_by: the setting that follows the mode in a name such as `static:4`.
        on_host: the decisions have no form in `decide_kernel`, so that generation decides on the host.
    """

    decisions: dict[str, Decision] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    required: dict[str, str] = field(default_factory=dict)
    needs_entropies: bool = False
    named_by: str | None = None
    on_host: bool = False
    decision_of: Callable[[PatchSettings], str] = lambda settings: next(iter(MODES[settings.mode].decisions), "")


def _above_threshold(settings: PatchSettings, moment: DecisionInputs) -> Tensor:
    entropies, _ = moment.rises(settings)
    return (moment.position == 0) | (entropies > cast(float, settings.threshold))


def _rise(settings: PatchSettings, moment: DecisionInputs) -> Tensor:
    _, rises = moment.rises(settings)
    return (moment.position <= 1) | (rises > cast(float, settings.threshold))


def _combined(settings: PatchSettings, moment: DecisionInputs) -> Tensor:
    """As published, a patch always starts after positions 0 and 1, and never after position 2."""
    entropies, rises = moment.rises(settings)
    combined = (entropies > cast(float, settings.threshold)) & (rises > cast(float, settings.threshold_add))
    return (moment.position <= 1) | (combined & (moment.position != 2))


def _entropy_decision(settings: PatchSettings) -> str:
    if settings.monotonicity:
        return "rise"
    return "threshold" if settings.threshold_add is None else "combined"


def _space(settings: PatchSettings, moment: DecisionInputs) -> Tensor:
    """The first of a run of space-like bytes ends a patch, and so does every special id (itself space-like)."""
    continues_run = (moment.position > 0) & _is_space_like(moment.previous_ids)
    return (moment.ids < OFFSET) | (_is_space_like(moment.ids) & ~continues_run)


def _is_space_like(ids: Tensor) -> Tensor:
    """Neither an ASCII letter or digit nor a UTF-8 continuation byte. Special ids count as space-like."""
    byte = ids - OFFSET
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    upper = (byte >= ord("A")) & (byte <= ord("Z"))
    lower = (byte >= ord("a")) & (byte <= ord("z"))
    continuation = (byte >= 0x80) & (byte <= 0xBF)
    return ~(digit | upper | lower | continuation)


def _static(settings: PatchSettings, moment: DecisionInputs) -> Tensor:
    return (moment.position + 1) % cast(int, settings.patch_size) == 0


def _byte(settings: PatchSettings, moment: DecisionInputs) -> Tensor:
    return torch.ones_like(moment.position, dtype=torch.bool)


MODES: dict[ModeName, PatchingMode] = {
    "entropy": PatchingMode(
        {"threshold": _above_threshold, "rise": _rise, "combined": _combined},
        settings=("threshold", "monotonicity", "threshold_add", "reset_at_newline"),
        required={"threshold": "a threshold in nats; `blt calibrate` finds one for a patch size"},
        needs_entropies=True,
        named_by="threshold",
        decision_of=_entropy_decision,
    ),
    "space": PatchingMode({"space": _space}),
    "static": PatchingMode(
        {"static": _static},
        settings=("patch_size",),
        required={"patch_size": "patch_size, the ids in a patch"},
        named_by="patch_size",
    ),
    "byte": PatchingMode({"byte": _byte}),
    "bpe": PatchingMode(
        settings=("tokenizer",),
        required={"tokenizer": "tokenizer, the path of a Hugging Face tokenizer.json"},
        named_by="tokenizer",
        on_host=True,
    ),
}
