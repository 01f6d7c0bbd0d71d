"""The options of `blt study` and `blt speedrun`."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from bytelatent.commands.options import JsonSettings
from bytelatent.config import ARGUMENT


class StudySettings(JsonSettings):
    """Compare families of models at equal training FLOPs, by a plan: train, measure on held-out text, gather.

    Example:  `blt study apps/bytelatent/studies/smallest.yaml --dry-run`

    What it costs, before it runs:  `--dry-run`

    On a cluster:  `blt study PLAN.yaml --slurm partition=gpu time=12:00:00`, and the same command again to gather

    Attributes:
        plan: a YAML file.
        settings: with --slurm, settings of each job, key=value, as of blt launch.
        out: folder of the study. Default: runs/ and the plan's name.
        dry_run: show each run with its size, FLOPs, bytes and steps, and exit.
        only: run this family only. May be given several times.
        budget: run this budget only, as in 1e16; several with commas.
        trials: run the plan's trials, and rank them by the tuning text.
        prepare: make what the runs share (tokenizers, entropy models, mean patches), and stop.
        tuning_only: do not read the held-out text: results are of the tuning text.
        gpus: number of GPUs to use, with one run each at a time. 0 uses the CPU. Default: all.
        slurm: submit each run as a job.
        discard_models: remove each model, with its run's folder, once its row is written.
    """

    plan: Annotated[Path, ARGUMENT]
    settings: Annotated[list[str], ARGUMENT] = Field(default=[])
    out: Path | None = None
    dry_run: bool = False
    only: list[str] = Field(default=[])
    budget: list[float] = Field(default=[])
    trials: bool = False
    prepare: bool = False
    tuning_only: bool = False
    gpus: int | None = Field(default=None, ge=0)
    slurm: bool = False
    discard_models: bool = False

    @field_validator("budget", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Several budgets with commas."""
        return value.split(",") if isinstance(value, str) else value


class SpeedrunSettings(JsonSettings):
    """Train an entry for ten minutes on one device and a fixed text, and measure it: docs/study/speedrun.md.

    Example:  `blt speedrun apps/bytelatent/speedrun/blt.yaml --text text`

    To check a result:  `blt speedrun --check blt.json runs/speedrun/blt/weights --text text`

    The table of results:  `blt speedrun --table docs/study/speedrun`

    Attributes:
        entry: a training configuration with minutes: 10; with --check, the folder of the model.
        text: folder of the text that setup/build_corpus.py --speedrun writes.
        out: folder to write: the result NAME.json, and NAME/ with the model in NAME/weights.
        minutes: minutes of a trial, in place of the entry's.
        check: result to check against its model.
        table: folder of results to print as a Markdown table.
    """

    entry: Annotated[str | None, ARGUMENT] = None
    text: Path = Path("text")
    out: Path = Path("runs/speedrun")
    minutes: float | None = Field(default=None, gt=0, le=1e6)
    check: Path | None = None
    table: Path | None = None
