"""The result of each finished run of a study: `rows/NAME.json` in the study's folder, written whole."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.files import json_if_any, whole_file

ROWS = "rows"  # the folder
TRIALS = "trials"  # the folder of all that trials write
MOST_POINTS = 200  # of a curve, apart from those on held-out text
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")  # of a run, and so of files


class GroupBits(Settings):
    """Bits per byte of some text, and how much text that is."""

    bits_per_byte: float = Field(ge=0)
    bytes: int = Field(ge=1)


class HeldOut(GroupBits):
    """Exact bits per byte of a held-out text.

    Attributes:
        by_category: of the documents of each category, where the text has a field for it.
    """

    by_category: dict[str, GroupBits] = Field(default={})


class CurvePoint(Settings):
    """A moment of training.

    Attributes:
        training_flops, seconds: spent up to here; seconds are those in training steps.
        bits_per_byte: of the training text since the point before.
        validation_bits_per_byte: of held-out text, as validation measured it here.
    """

    training_flops: float = Field(ge=0)
    seconds: float = Field(ge=0)
    bits_per_byte: float | None = Field(default=None, ge=0)
    validation_bits_per_byte: float | None = Field(default=None, ge=0)


class StudyRow(Settings):
    """A finished run.

    Attributes:
        name: of the run, and of its file.
        family: of the plan; `label` is its name for people.
        budget: training FLOPs that the plan asks for.
        kind: of the model.
        settings: all settings of the training; paths below the study's folder begin there.
        parameters: by part of the model, without hash tables.
        table_parameters, table_bytes: of the hash tables, as they are trained, in float32.
        batch_bytes: bytes of text in a step, on average.
        bytes_read: bytes of text that were trained on.
        epochs: how often the training text was read.
        mean_patch_bytes: in training; of a token LM the mean token, of a flat byte LM 1.
        context_bytes: the context over which attention was averaged: as long as pieces of documents are in batches.
        training_flops_per_byte: by part: three times the forward pass of each part of the model, and once that of the
            entropy model.
        training_flops: what was spent: bytes_read times the sum of these.
        entropy_model_training_flops: what training the entropy model cost, 0 without one; not part of training_flops.
        inference_flops_per_byte: of the forward pass, the entropy model included.
        seconds: in training steps, without the first after each start.
        held_out: what is reported; None for trials, which never read this text.
        tuning: the second held-out part, by which settings are chosen.
        curve: at most `MOST_POINTS` points of training, and those of validation.
        versions: of torch and bytelatent.
        date: on which the run ended, as 2026-11-30.
    """

    name: str
    family: str
    label: str
    budget: float = Field(gt=0)
    seed: int = Field(ge=0)
    kind: Literal["blt", "byte_lm", "token_lm"]
    settings: dict[str, Any]
    parameters: dict[str, int]
    table_parameters: int = Field(ge=0)
    table_bytes: int = Field(ge=0)
    steps: int = Field(ge=1)
    batch_bytes: float = Field(gt=0)
    bytes_read: int = Field(ge=1)
    epochs: float = Field(gt=0)
    mean_patch_bytes: float = Field(ge=1)
    context_bytes: float | None = Field(default=None, ge=1)
    training_flops_per_byte: dict[str, float]
    training_flops: float = Field(gt=0)
    entropy_model_training_flops: float | None = Field(default=None, ge=0)
    inference_flops_per_byte: float = Field(gt=0)
    seconds: float = Field(ge=0)
    bytes_per_second: float | None = Field(default=None, gt=0)
    held_out: HeldOut | None
    tuning: HeldOut
    curve: list[CurvePoint] = Field(default=[])
    device: str
    versions: dict[str, str]
    date: str

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(f"'{name}' is no name of a run: letters, digits and . _ + - without spaces")
        return name

    @property
    def num_parameters(self) -> int:
        """Without hash tables."""
        return sum(self.parameters.values())


def row_path(folder: Path, name: str) -> Path:
    """Where a study's folder has the row of a run."""
    return folder / ROWS / f"{name}.json"


def write_row(folder: Path, row: StudyRow) -> Path:
    """Write a run's row into a study's folder; it appears whole or not at all.

    Returns:
        The file.
    """
    path = row_path(folder, row.name)
    with whole_file(path) as aside:
        aside.write_text(row.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return path


def read_row(path: Path) -> StudyRow:
    """
    Raises:
        UserError: the file is no row; it names the file and the key.
    """
    values = json_if_any(path)
    if not isinstance(values, dict):
        raise UserError(f"'{path}' is no row of a study: it is not JSON; remove it, and its run writes it again")
    try:
        row = StudyRow.parse(values, where=f"'{path}'")
    except UserError as error:
        raise UserError(f"{error}; put back what a study wrote, or remove the file") from None
    if row.name != path.stem:
        raise UserError(f"'{path}' is the row of '{row.name}'; rename it to {row.name}.json, or remove it")
    return row


def read_rows(places: Sequence[Path]) -> list[StudyRow]:
    """The rows of studies, by name.

    Args:
        places: folders of studies, folders of rows, or rows.

    Raises:
        UserError: a place has no rows, a row is not what a study writes, or two have the same name.
    """
    found: dict[str, tuple[Path, StudyRow]] = {}
    for place in places:
        folder = place / ROWS if (place / ROWS).is_dir() else place
        files = [place] if place.is_file() else sorted(folder.glob("*.json"))
        if not files:
            raise UserError(f"'{place}' has no rows of a study; name its folder, or rows/*.json in it")
        for file in files:
            row = read_row(file)
            other = found.setdefault(row.name, (file, row))[0]
            if other != file and not other.samefile(file):
                raise UserError(f"'{file}' and '{other}' are both rows of '{row.name}'; leave one of them out")
    return [row for _, (_, row) in sorted(found.items())]
