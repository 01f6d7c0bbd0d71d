"""Settings of generation. Nothing here imports torch, so that a command shows its help at once."""

import reprlib
from numbers import Integral
from typing import Any, Literal, get_args

from pydantic import Field, field_serializer, field_validator

from bytelatent.config import Settings
from bytelatent.errors import UserError

MAX_NEW_BYTES = 10**9
MAX_SAMPLES = 100_000  # of a prompt; each takes memory from when it is asked for
MAX_BATCH_SIZE = 65_536
LIMITS = {
    "max_new_bytes": MAX_NEW_BYTES,
    "samples": MAX_SAMPLES,
    "batch_size": MAX_BATCH_SIZE,
    "context": 2**31,
}

_NO_DRAFTS = "speculative decoding was removed (docs/generate.md says why); leave it out, the text is the same"
REMOVED = {"draft_length": _NO_DRAFTS, "ahead": _NO_DRAFTS}

Quantization = Literal["full", "int8", "fp8"]  # full: the weights as they are
KVCacheNumbers = Literal["full", "int8"]  # full: in the precision of the states


def check_kv_cache(kv_cache: Any) -> None:
    """Raises UserError where there are no such KV caches."""
    if kv_cache not in get_args(KVCacheNumbers):
        raise UserError(f"kv_cache: {reprlib.repr(kv_cache)} is not one of {', '.join(get_args(KVCacheNumbers))}")


def check_limits(**values: Any) -> None:
    """Raises UserError where a value, by its name, is no number from 1 to its limit."""
    for name, value in values.items():
        is_number = isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's, too
        if not is_number or not 1 <= int(value) <= LIMITS[name]:
            # Python refuses to write numbers of thousands of digits.
            num_bits = int(value).bit_length() if is_number else 0
            shown = f"a number of {num_bits:,} bits" if num_bits > 300 else reprlib.repr(value)
            raise UserError(f"{name}: {shown} is not a number from 1 to {LIMITS[name]:,}")


class Sampling(Settings):
    """How the next id is drawn.

    In this order: `repetition_penalty`, `valid_utf8`, `temperature`, `top_k`, `top_p`, `min_p`. Each applies to what
    the one before has left, as if that were all there is.

    Attributes:
        temperature: sampling temperature. 0 takes the most likely byte, the lowest among equals.
        top_k: sample from the k most likely bytes.
        top_p: sample from the most likely bytes that reach this probability.
        min_p: smallest probability, as a share of the largest.
        repetition_penalty: values above 1 make bytes that occurred less likely, in the prompt too. Positive logits are
            divided by it, others multiplied; the end of the text is never penalised.
        seed: sampling seed, at most 64 bits. Each sequence draws its own random numbers from it, so that its bytes
            do not depend on others.
        stop: text at which generation stops; may be repeated. In bash a line break is $'\\n'.
        valid_utf8: generate valid UTF-8 only. Where a stop text begins within a character, the text ends before it.
    """

    temperature: float = Field(default=0.8, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)
    stop: list[str | bytes] = Field(default=[])
    valid_utf8: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str | bytes) else stop

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, stop: list[str | bytes]) -> list[str | bytes]:
        if not all(stop):
            raise ValueError("an empty text would end every text before it begins; leave it out")
        for text in stop:
            try:
                _ = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
            except UnicodeEncodeError:
                raise ValueError(f"{text!a} holds half of a surrogate pair, which no text does") from None
        return stop

    @field_serializer("stop", when_used="json")
    def _as_text(self, stop: list[str | bytes]) -> list[str]:
        return [part.decode("utf-8", "surrogateescape") if isinstance(part, bytes) else part for part in stop]
