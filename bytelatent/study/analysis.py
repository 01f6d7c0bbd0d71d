"""What the rows of a study say: best runs, laws, distances to the best token LM, and crossings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from bytelatent.errors import UserError
from bytelatent.report.text import amount_of_flops
from bytelatent.study.best import BestRun, MeasuredFamily, SeedNoise, best_of, budgets, families, seed_noise, spread
from bytelatent.study.fit import FAR, LEVEL, Overtaking, Points, PowerLaw, fit_power_laws, overtaking
from bytelatent.study.results import StudyRow

TOKEN_LM = "token_lm"


@dataclass(frozen=True)
class Distance:
    """Bits per byte of a family above those of the best token LM at a budget; negative if they are below.

    Attributes:
        noise: standard deviation that seeds alone give this difference; None if it is not known.
    """

    budget: float
    bits: float
    noise: float | None
    token_lm: MeasuredFamily

    def in_words(self) -> str:
        return f"{self.bits:+.3f}" + ("" if self.noise is None else f" ± {self.noise:.3f}")


@dataclass(frozen=True)
class Analysis:
    """Everything that the page, the figures and the tables show.

    Attributes:
        noise: None if no configuration has several seeds.
        laws: by the family's name; of families with two budgets or more.
        num_trials: rows that are left out, since they have no held-out text.
    """

    families: list[MeasuredFamily]
    noise: SeedNoise | None
    laws: dict[str, PowerLaw]
    num_trials: int

    @cached_property
    def budgets(self) -> list[float]:
        return budgets(self.families)

    @cached_property
    def categories(self) -> list[str]:
        """In the order of the rows, of all runs."""
        runs = [run for family in self.families for run in family.best.values()]
        held_out = [row.held_out for run in runs for row in run.rows if row.held_out is not None]
        return list(dict.fromkeys(name for text in held_out for name in text.by_category))

    def best(self, kind: str, budget: float | None = None) -> MeasuredFamily | None:
        """The best family of a kind at a budget, or at the largest that the kind has."""
        own = budgets(family for family in self.families if family.kind == kind)
        return best_of(self.families, kind, own[-1] if budget is None else budget) if own else None

    def distances(self, family: MeasuredFamily) -> dict[float, Distance]:
        """To the best token LM at each budget that both have."""
        found = {}
        for budget, run in family.best.items():
            if (token_lm := best_of(self.families, TOKEN_LM, budget)) is not None:
                other, noise = token_lm.best[budget], None
                if self.noise is not None:
                    noise = self.noise.standard_deviation * math.sqrt(1 / len(run.rows) + 1 / len(other.rows))
                found[budget] = Distance(budget, run.bits_per_byte - other.bits_per_byte, noise, token_lm)
        return found

    def crossing(self, family: MeasuredFamily) -> Overtaking | None:
        """Where a family's law comes to that of the best token LM; None if there is no law of either."""
        token_lm = self.best(TOKEN_LM)
        if token_lm is None or token_lm is family or not {family.name, token_lm.name} <= self.laws.keys():
            return None
        measured = [run.mean("training_flops") for it in (family, token_lm) for run in it.best.values()]
        return overtaking(self.laws[family.name], self.laws[token_lm.name], min(measured), max(measured))

    def noise_in_words(self) -> str:
        if (noise := self.noise) is None:
            return "unknown, since no configuration has several seeds"
        return (
            f"{noise.standard_deviation:.4f} bits per byte (standard deviation at {amount_of_flops(noise.budget)}, "
            f"{noise.num_runs} runs of {noise.num_configurations} configurations)"
        )

    def summary(self) -> list[str]:
        """The result in a few sentences."""
        blt, token_lm = self.best("blt"), self.best(TOKEN_LM)
        if blt is None or token_lm is None:
            missing = "BLT" if blt is None else "token LM"
            return [f"No {missing} has finished yet, so that there is nothing to compare."]
        lines = []
        distances = self.distances(blt)
        if distances:
            budget, last = list(distances.items())[-1]
            side = "above" if last.bits > 0 else "below"
            theirs, own = (it.best[budget].bits_per_byte for it in (last.token_lm, blt))
            lines.append(
                f"At {amount_of_flops(budget)} training FLOPs, “{last.token_lm.label}” needs {theirs:.3f} bits per "
                f"byte of held-out text and “{blt.label}” {own:.3f}: {abs(last.bits):.3f} {side} it. "
                f"Seed noise is {self.noise_in_words()}."
            )
        if len(distances) > 1:
            steps = ", ".join(f"{it.in_words()} at {amount_of_flops(budget)}" for budget, it in distances.items())
            known = "" if self.noise is None else " (± one standard deviation of seeds)"
            lines.append(f"Distance of “{blt.label}” to the best token LM{known}: {steps}.")
        if (crossing := self.crossing(blt)) is not None:
            lines.append(f"By the fits, “{blt.label}” {crossing_in_words(crossing, f'“{token_lm.label}”')}.")
        return lines


def analyse(rows: Sequence[StudyRow]) -> Analysis:
    """
    Raises:
        UserError: no row has bits per byte of held-out text.
    """
    found = families(rows)
    if not found:
        raise UserError("study: no row has bits per byte of held-out text; finish a run of the study first")
    several = [run for family in found for run in family.best.values()]
    laws = fit_power_laws({family.name: _points(family) for family in found}, spread(several, math.log))
    return Analysis(found, seed_noise(found), laws, sum(row.held_out is None for row in rows))


def _points(family: MeasuredFamily) -> Points:
    runs: list[BestRun] = sorted(family.best.values(), key=lambda run: run.mean("training_flops"))
    return Points(
        [run.mean("training_flops") for run in runs],
        [run.bits_per_byte for run in runs],
        [len(run.rows) for run in runs],
    )


def crossing_in_words(crossing: Overtaking, other: str) -> str:
    """`is at or below OTHER from 3×10¹⁷ training FLOPs on (95 % interval 10¹⁷ to ...)`."""
    lowest, highest = amount_of_flops(crossing.lowest), amount_of_flops(crossing.highest)

    def place(flops: float) -> str:
        if flops == 0:
            return f"below {lowest}"
        return f"beyond {highest}" if math.isinf(flops) else amount_of_flops(flops)

    if crossing.flops == 0:
        found = f"is at or below {other} everywhere between {lowest} and {highest}"
    elif math.isinf(crossing.flops):
        found = f"does not cross {other} within {highest} training FLOPs, {FAR:g} times the largest budget"
    else:
        found = f"is at or below {other} from {amount_of_flops(crossing.flops)} training FLOPs on"
    if crossing.interval is None:
        return f"{found} (without an interval: one seed each, and no budget to spare)"
    low, high = map(place, crossing.interval)
    return f"{found} ({LEVEL} % interval of the crossing: {low if low == high else f'{low} to {high}'})"
