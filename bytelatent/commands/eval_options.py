"""Settings that `blt eval` takes beside those of its text and its model: bases of `EvaluateSettings`."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bytelatent.config import Settings

Rate = Annotated[float, Field(ge=0, le=1)]


class NoiseSettings(Settings):
    """Attributes:
    noise: noise to add to the text or the tasks, NAME or NAME:RATE; may be repeated. Names: antspeak, drop,
        randomcase, repeat, uppercase, or all.
    noise_on: what of a task gets the noise: prompt, completion or both.
    noise_rates: rates to try of each noise, with commas: 0,0.05,0.1. Default: the noise's own.
    figure: draw the score at each rate: a .png, .svg or .pdf file.
    words: words for the tasks of `cute`: a file with one word per line, or any text.
    related: pairs of words of related meaning, for the task `cute_sem`: a file of lines WORD, tab, WORD.
    seed: seed of the noise, of generated tasks and of intervals.
    """

    noise: list[str] = Field(default=[])
    noise_on: Literal["prompt", "completion", "both"] = "both"
    noise_rates: list[Rate] | None = None
    figure: Path | None = None
    words: Path | None = None
    related: Path | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)

    @field_validator("noise_rates", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Several rates with commas."""
        if not isinstance(value, str):
            return value
        for rate in value.split(","):
            if not re.fullmatch(r"\s*(0|1|0?\.[0-9]{1,16}|1\.0*)\s*", rate):
                raise ValueError(f"'{rate}' is not a rate; write numbers from 0 to 1 with commas: 0,0.05,0.1")
        return [float(rate) for rate in value.split(",")]
