"""Settings that `blt eval` takes beside those of its text and its model: bases of `EvaluateSettings`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bytelatent.config import Settings
from bytelatent.inference.settings import MAX_SAMPLES

Rate = Annotated[float, Field(ge=0, le=1)]


class TaskSettings(Settings):
    """Attributes:
    tasks: tasks with commas: those of lm-evaluation-harness; paper: the seven of the BLT paper; cute: knowledge of
        characters; g2p: sounds of words.
    shots: worked examples before each question. Default: the task's own number.
    limit: questions of each task. Default: all; of cute and g2p 1,000.
    include_path: folder of task files (.yaml) of your own.
    samples: programs for each problem, for pass@k.
    temperature: temperature of --samples.
    run_programs: run the programs that the model writes, in a limited process.
    """

    tasks: str | None = None
    shots: int | None = Field(default=None, ge=0, le=1000)
    limit: int | None = Field(default=None, ge=1, lt=2**63)
    include_path: Path | None = None
    samples: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    temperature: float = Field(default=0.8, gt=0, le=100)
    run_programs: bool = False


class NoiseSettings(Settings):
    """Attributes:
    noise: noise to add to the text or the tasks, NAME or NAME:RATE; may be repeated. Names: antspeak, drop,
        randomcase, repeat, uppercase, or all.
    noise_on: what of a task gets the noise: prompt, completion or both.
    noise_rates: rates to try of each noise, with commas: 0,0.05,0.1. Default: the noise's own.
    figure: draw the score at each rate: a .png, .svg or .pdf file.
    words: words for the tasks of `cute`: a file with one word per line, or any text.
    related: pairs of words of related meaning, for the task `cute_sem`: a file of lines WORD, tab, WORD.
    """

    noise: list[str] = Field(default=[])
    noise_on: Literal["prompt", "completion", "both"] = "both"
    noise_rates: list[Rate] | None = None
    figure: Path | None = None
    words: Path | None = None
    related: Path | None = None

    @field_validator("noise_rates", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Several rates with commas."""
        return value.split(",") if isinstance(value, str) else value
