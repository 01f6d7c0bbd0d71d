"""The best run of each family at each budget, and how much the seed alone changes a result."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from bytelatent.config import flat
from bytelatent.study.changes import FREE
from bytelatent.study.results import StudyRow

KINDS = ("token_lm", "byte_lm", "blt")  # the order of families


@dataclass(frozen=True)
class BestRun:
    """The configuration of a family that is best at a budget, by the text for tuning, with a row for each seed.

    Attributes:
        num_configurations: from how many it is chosen.
    """

    rows: tuple[StudyRow, ...]
    num_configurations: int

    @property
    def row(self) -> StudyRow:
        """Of the first seed: for all that does not depend on the seed."""
        return self.rows[0]

    @cached_property
    def bits_per_byte(self) -> float:
        """Of the held-out text, mean over the seeds."""
        return fmean(held_out_bits(row) for row in self.rows)

    @property
    def tuning_bits_per_byte(self) -> float:
        return self.mean("tuning.bits_per_byte")

    def mean(self, name: str) -> float:
        """The mean over the seeds of a number of the rows."""
        return fmean(_inside(row, name) for row in self.rows)

    def category_bits(self, category: str) -> float | None:
        """Held-out bits per byte of a category, mean over the seeds; None if it was not measured."""
        groups = [row.held_out.by_category.get(category) for row in self.rows if row.held_out is not None]
        return None if None in groups else fmean(group.bits_per_byte for group in groups if group is not None)


@dataclass(frozen=True)
class MeasuredFamily:
    """A family's best runs, by budget, smallest first."""

    name: str
    label: str
    kind: str
    best: dict[float, BestRun]

    @property
    def mode(self) -> str:
        """The patching mode of a BLT; else the kind."""
        patching = next(iter(self.best.values())).row.settings.get("patching")
        mode = patching.get("mode") if isinstance(patching, dict) else None
        return str(mode or "entropy") if self.kind == "blt" else self.kind


@dataclass(frozen=True)
class SeedNoise:
    """How much bits per byte differ between seeds of one configuration.

    Attributes:
        budget: the smallest one with several seeds.
        standard_deviation: bits per byte, pooled over the configurations there.
        num_runs, num_configurations: that it is measured on.
    """

    budget: float
    standard_deviation: float
    num_runs: int
    num_configurations: int


def held_out_bits(row: StudyRow) -> float:
    assert row.held_out is not None, "trials are left out before"
    return row.held_out.bits_per_byte


def families(rows: Sequence[StudyRow]) -> list[MeasuredFamily]:
    """The families of a study, token LMs first, then by patch size; trials without held-out text are left out."""
    reported = [row for row in rows if row.held_out is not None]
    found = []
    for name in dict.fromkeys(row.family for row in reported):
        own = [row for row in reported if row.family == name]
        best = {budget: _best(row for row in own if row.budget == budget) for budget in sorted({r.budget for r in own})}
        found.append(MeasuredFamily(name, own[0].label, own[0].kind, best))
    return sorted(found, key=lambda it: (KINDS.index(it.kind), it.mode, _unit_bytes(it), it.name))


def budgets(found: Iterable[MeasuredFamily]) -> list[float]:
    return sorted({budget for family in found for budget in family.best})


def best_of(found: Iterable[MeasuredFamily], kind: str, budget: float) -> MeasuredFamily | None:
    """The family of a kind that is best at a budget, by the text for tuning."""
    there = [family for family in found if family.kind == kind and budget in family.best]
    return min(there, key=lambda family: family.best[budget].tuning_bits_per_byte, default=None)


def seed_noise(found: Iterable[MeasuredFamily]) -> SeedNoise | None:
    """The noise at the smallest budget with several seeds; None without one."""
    several = [run for family in found for run in family.best.values() if len(run.rows) > 1]
    if not several:
        return None
    smallest = min(run.row.budget for run in several)
    several = [run for run in several if run.row.budget == smallest]
    squares, degrees = spread(several, lambda bits: bits)
    num_runs = sum(len(run.rows) for run in several)
    return SeedNoise(smallest, math.sqrt(squares / degrees), num_runs, len(several))


def spread(runs: Iterable[BestRun], of: Any) -> tuple[float, int]:
    """The sum of the squared differences of seeds from their mean, of a function of bits; and degrees of freedom."""
    squares, degrees = 0.0, 0
    for run in runs:
        values = [of(held_out_bits(row)) for row in run.rows]
        squares += sum((value - fmean(values)) ** 2 for value in values)
        degrees += len(values) - 1
    return squares, degrees


def _best(rows: Iterable[StudyRow]) -> BestRun:
    groups: dict[str, list[StudyRow]] = {}
    for row in sorted(rows, key=lambda row: (row.seed, row.name)):
        groups.setdefault(_configuration(row), []).append(row)
    runs = [BestRun(tuple(group), len(groups)) for group in groups.values()]
    return min(runs, key=lambda run: run.tuning_bits_per_byte)


def _configuration(row: StudyRow) -> str:
    """What runs of one configuration share: all settings that change a result, but for the seed."""
    derived = {"seed", "entropy_model"}  # whose path another machine may have elsewhere
    derived |= {"patching.threshold"} if row.settings.get("calibration") is not None else set()
    settings = {key: value for key, value in flat(row.settings).items() if not FREE.fullmatch(key)}
    return json.dumps({key: settings[key] for key in sorted(settings.keys() - derived)}, default=str)


def _unit_bytes(family: MeasuredFamily) -> float:
    return next(iter(family.best.values())).mean("mean_patch_bytes")


def _inside(values: Any, name: str) -> float:
    for part in name.split("."):
        values = getattr(values, part)
    return values
