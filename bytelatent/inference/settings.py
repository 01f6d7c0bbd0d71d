"""Settings of generation. Nothing here imports torch, so that a command shows its help at once."""

from typing import Any, Literal

from pydantic import Field, field_serializer, field_validator

from bytelatent.config import Settings

MAX_NEW_BYTES = 10**9  # of a row
MAX_SAMPLES = 100_000  # of a prompt; each takes memory from when it is asked for
MAX_BATCH_SIZE = 65_536  # sequences at once

Quantization = Literal["full", "int8", "fp8"]  # full: as the weights are


class Sampling(Settings):
    """How the next id is drawn.

    In this order: `repetition_penalty`, `valid_utf8`, `temperature`, `top_k`, `top_p`, `min_p`. Each looks at what the
    one before has left, as if that were all there is.

    Attributes:
        temperature: sampling temperature. 0 takes the most likely byte, of equals the lowest.
        top_k: sample from the k most likely bytes.
        top_p: sample from the most likely bytes that reach this probability.
        min_p: smallest probability, as a share of the largest.
        repetition_penalty: values above 1 make bytes that occurred less likely, in the prompt too. Positive logits are
            divided by it, others multiplied; the end of the text is never penalised.
        seed: sampling seed, at most 64 bits. Each row draws its own random numbers from it, so that its bytes do not
            depend on its neighbours.
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
            raise ValueError("an empty text would end every row before it begins; leave it out")
        for text in stop:
            try:
                _ = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
            except UnicodeEncodeError:
                raise ValueError(f"{text!a} holds half of a surrogate pair, which no text does") from None
        return stop

    @field_serializer("stop", when_used="json")
    def _as_text(self, stop: list[str | bytes]) -> list[str]:
        return [part.decode("utf-8", "surrogateescape") if isinstance(part, bytes) else part for part in stop]
