"""Which rule, and its numbers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from bytelatent.config import Settings

Mode = Literal["entropy", "space", "static", "byte", "bpe"]


class PatchSettings(Settings):
    """A patching rule.

    Attributes:
        mode: `entropy` starts a patch where the byte LM finds the next byte hard to guess; `space` after each
            space-like byte; `static` every `patch_size` ids; `byte` at every id; `bpe` at a tokenizer's boundaries.
        threshold: nats. Plain rule: a patch starts at i+1 when H_i > threshold.
        monotonicity: the monotonic rule, H_i - H_{i-1} > threshold.
        threshold_add: the combined rule, H_i > threshold and H_i - H_{i-1} > threshold_add.
        patch_size: ids in a patch (`static` only).
        max_patch_length: longer patches are split from their start.
        tokenizer: path of a Hugging Face `tokenizer.json` (`bpe` only).

    Source: Pagnoni et al. 2024, section 2.
    """

    mode: Mode = "entropy"
    threshold: float | None = Field(default=None, allow_inf_nan=False)
    monotonicity: bool = False
    threshold_add: float | None = Field(default=None, allow_inf_nan=False)
    patch_size: int | None = Field(default=None, ge=1, le=2**31)
    max_patch_length: int | None = Field(default=None, ge=1, le=2**31)
    tokenizer: str | None = None

    @model_validator(mode="after")
    def _only_what_the_mode_uses(self) -> Self:
        belongs = {
            "threshold": "entropy",
            "monotonicity": "entropy",
            "threshold_add": "entropy",
            "patch_size": "static",
            "tokenizer": "bpe",
        }
        for name, mode in belongs.items():
            if self.mode != mode and getattr(self, name) not in (None, False):
                raise ValueError(f"{name} belongs to mode '{mode}', not to '{self.mode}'; leave it out")
        if self.mode == "entropy" and self.threshold is None:
            raise ValueError("mode 'entropy' needs a threshold in nats; `blt calibrate` finds one for a patch size")
        if self.monotonicity and self.threshold_add is not None:
            raise ValueError("monotonicity and threshold_add are two different rules; set one of them")
        if self.mode == "static" and self.patch_size is None:
            raise ValueError("mode 'static' needs patch_size, the ids in a patch")
        if self.mode == "bpe" and self.tokenizer is None:
            raise ValueError("mode 'bpe' needs tokenizer, the path of a Hugging Face tokenizer.json")
        return self

    @property
    def needs_entropies(self) -> bool:
        """Whether the rule reads the byte LM's entropies."""
        return self.mode == "entropy"

    def in_words(self) -> str:
        """The rule in a few words: `entropy, threshold 1.34 nats`."""
        words: list[str] = [self.mode]
        if self.monotonicity:
            words[0] = "rise of the entropy"
        if self.threshold is not None:
            words.append(f"threshold {self.threshold:.4g} nats")
        if self.threshold_add is not None:
            words.append(f"rise above {self.threshold_add:.4g}")
        if self.patch_size is not None:
            words.append(f"{self.patch_size} ids each")
        if self.max_patch_length is not None:
            words.append(f"at most {self.max_patch_length} ids")
        if self.tokenizer is not None:
            words.append(self.tokenizer)
        return ", ".join(words)
