"""Settings of `blt eval`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bytelatent.commands.options import DEFAULT_MODEL, JsonSettings, NumBytes, RowSettings, ThresholdSettings
from bytelatent.config import ARGUMENT, Option, Settings
from bytelatent.inference.settings import LIMITS, MAX_SAMPLES

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


class EvaluateSettings(TaskSettings, NoiseSettings, RowSettings, ThresholdSettings, JsonSettings):
    """Measure the bits per byte of models on text, all on the same bytes.

    Example:  `blt eval held-out/*.jsonl --model runs/demo --model gpt2 --by category --out results.json`

    Attributes:
        text: files, folders or globs.
        model: a BLT, a byte LM, a token LM, or a causal language model of Hugging Face transformers: a run, a folder
            or OWNER/NAME on the hub. Several may be named, each with --model.
        by: also by the value of this key or column of documents, or by source.
        overlap: ids that each window of a document longer than the context reads again, without counting them.
        context: ids to read at once. Default: as in the model's training.
        out: new file for the results. An interrupted command leaves what is done beside it; the same command resumes.
        markdown: print a table as Markdown.
        max_bytes: bytes of text to measure. Default: all.
        resamples: resamples of the bootstrap over documents, for the 95 % interval.
        seed: seed of the bootstrap, of noise and of generated tasks.
        tokenizer: path of a tokenizer.json, or of a folder with one, for a model of tokens without one.
        batch_size: bytes or tokens of a batch of text; texts that are continued at once, for --tasks. Default: chosen
            for the device.
        device: device: auto, cpu, cuda or mps.
        dtype: precision: float32 or bfloat16.
    """

    text: Annotated[list[str], ARGUMENT] = Field(default=[])
    model: Annotated[list[str], Option(("--model", "-m"))] = Field(default=[DEFAULT_MODEL], min_length=1)
    by: list[str] | str | None = Field(default=None, min_length=1)
    overlap: int = Field(default=0, ge=0, le=LIMITS["context"])
    context: int | None = Field(default=None, ge=2, le=LIMITS["context"])
    out: Path | None = None
    markdown: bool = False
    max_bytes: NumBytes | None = None
    resamples: int = Field(default=1000, ge=0, le=10**6)
    seed: int = Field(default=0, ge=0, lt=2**63)
    tokenizer: str | None = None
    batch_size: int | None = Field(default=None, ge=1, le=2**26)
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"

    @field_validator("by", mode="before")
    @classmethod
    def _one_key(cls, value: Any) -> Any:
        """It may be given once, which a list from the command line shows."""
        if isinstance(value, list):
            if len(value) > 1:
                raise ValueError(
                    f"{' and '.join(map(repr, value))} are several; give one, and run the command for each"
                )
            return value[0] if value else None
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
