"""The tables of a study, for its page and as Markdown."""

import math
from dataclasses import dataclass

from bytelatent.report.text import UNKNOWN, aligned, amount_of_bytes, amount_of_flops, duration, number
from bytelatent.study.analysis import Analysis, Distance
from bytelatent.study.best import BestRun, MeasuredFamily
from bytelatent.study.fit import LEVEL, FitNoise, Interval

WITHOUT_LIMIT = " Laws without E fall too fast far beyond the budgets that were measured, so that they are no forecast."


@dataclass(frozen=True)
class StudyTable:
    """A table with a sentence or two about how to read it.

    Attributes:
        num_texts: number of left-aligned columns at the left; the others are right-aligned.
        best: row and column of the cells that are the best of their budget.
    """

    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]
    num_texts: int = 1
    best: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        rows = [
            [f"**{cell}**" if (at, column) in self.best else cell for column, cell in enumerate(row)]
            for at, row in enumerate(self.rows)
        ]
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        return f"### {self.title}\n\n{self.caption}\n\n{aligned(self.header, escaped, self.num_texts, markdown=True)}\n"


def tables_of(analysis: Analysis) -> list[StudyTable]:
    """Results, laws, distances, categories and cost."""
    found = [_results(analysis), _laws(analysis), _distances(analysis), _categories(analysis), _cost(analysis)]
    return [table for table in found if table is not None]


def _results(analysis: Analysis) -> StudyTable:
    header = ["family", *(amount_of_flops(budget) for budget in analysis.budgets)]
    rows = [[family.label] for family in analysis.families]
    best = set()
    for column, budget in enumerate(analysis.budgets, start=1):
        values = [run.bits_per_byte if (run := it.best.get(budget)) else math.inf for it in analysis.families]
        best.add((values.index(min(values)), column))
        for row, family in zip(rows, analysis.families, strict=True):
            row.append(_bits(family.best.get(budget)))
    caption = (
        "Bits per byte of the held-out text at each budget of training FLOPs; lower is better, and the best of a "
        "budget is bold. Where a configuration has several seeds it is their mean, with their number in brackets. "
        f"Seed noise is {analysis.noise_in_words()}."
    )
    if any(run.num_configurations > 1 for family in analysis.families for run in family.best.values()):
        caption += " Of several configurations, the one that is best on the text for tuning is shown."
    return StudyTable("Held-out bits per byte", caption, header, rows, 1, frozenset(best))


def _laws(analysis: Analysis) -> StudyTable | None:
    if not analysis.laws:
        return None
    law = next(iter(analysis.laws.values()))
    reference, noise = law.reference, law.noise
    rows = []
    for family in analysis.families:
        if (law := analysis.laws.get(family.name)) is None:
            rows.append([family.label, *[UNKNOWN] * 6])
            continue
        interval = law.exponent_interval
        rows.append(
            [
                family.label,
                number(law.limit, 3) if law.has_limit else UNKNOWN,
                number(law.scale, 3),
                number(law.exponent, 4),
                UNKNOWN if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
                number(float(law([10 * reference])[0]), 3),
                f"{100 * law.largest_distance:.2f} %",
            ]
        )
    header = ["family", "E", "A", "α", f"{LEVEL} % interval", "at ten times C₀", "largest miss"]
    forms = dict.fromkeys(law.form for law in analysis.laws.values())
    caption = (
        f"Power laws of bits per byte against training FLOPs C, with C₀ = {amount_of_flops(reference)}. "
        f"The form is {'; or '.join(forms)}. Intervals are of a bootstrap over seeds, whose noise is {_pooled(noise)}; "
        "the sampling of the held-out text, the same for all, is not in them. The largest miss is that of a point from "
        f"its law.{'' if any(law.has_limit for law in analysis.laws.values()) else WITHOUT_LIMIT}"
    )
    return StudyTable("Fits", caption, header, rows)


def _pooled(noise: FitNoise) -> str:
    if not noise.degrees:
        return "unknown (one seed each, and no budget to spare)"
    return (
        f"{100 * noise.relative:.2f} % (of seeds, and of points around their laws; {noise.degrees} degrees of freedom)"
    )


def _distances(analysis: Analysis) -> StudyTable | None:
    rows, token_lms = [], {}
    for family in analysis.families:
        found = analysis.distances(family)
        token_lms |= {budget: distance.token_lm.label for budget, distance in found.items()}
        cells = [_distance(found.get(budget), family) for budget in analysis.budgets]
        rows.append([family.label, *cells, *_crossing(analysis, family)])
    if not token_lms:
        return None
    names = "; ".join(f"“{label}” at {amount_of_flops(budget)}" for budget, label in sorted(token_lms.items()))
    if len(set(token_lms.values())) == 1:
        names = f"“{next(iter(token_lms.values()))}” at every budget"
    known = "" if analysis.noise is None else ", ± the standard deviation that seeds alone give the difference"
    last = analysis.best("token_lm")
    caption = (
        f"Bits per byte above those of the best token LM at the same budget{known}. It is {names}. "
        "Crossing: from how many training FLOPs on the fit is at or below that of "
        f"“{last.label if last else UNKNOWN}”, and its {LEVEL} % interval over seeds."
    )
    header = ["family", *(amount_of_flops(budget) for budget in analysis.budgets), "crossing", f"{LEVEL} % interval"]
    return StudyTable("Distance to the best token LM", caption, header, rows)


def _distance(distance: Distance | None, family: MeasuredFamily) -> str:
    if distance is None:
        return UNKNOWN
    return "best" if distance.token_lm is family else distance.in_words()


def _crossing(analysis: Analysis, family: MeasuredFamily) -> tuple[str, str]:
    """Where it crosses, and the interval."""
    if (crossing := analysis.crossing(family)) is None:
        return UNKNOWN, UNKNOWN

    def shown(flops: float) -> str:
        if math.isinf(flops):
            return f"beyond {amount_of_flops(crossing.highest)}"
        return amount_of_flops(flops) if flops else f"before {amount_of_flops(crossing.lowest)}"

    interval: Interval | None = crossing.interval
    if interval is None:
        return shown(crossing.flops), UNKNOWN
    low, high = map(shown, interval)
    return shown(crossing.flops), low if low == high else f"{low} to {high}"


def _categories(analysis: Analysis) -> StudyTable | None:
    if not analysis.categories:
        return None
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for budget in reversed(analysis.budgets):
        there = [(family, family.best[budget]) for family in analysis.families if budget in family.best]
        values = [
            [*(run.category_bits(category) for category in analysis.categories), run.bits_per_byte] for _, run in there
        ]
        for column in range(len(analysis.categories) + 1):
            known = [value for row in values if (value := row[column]) is not None]
            best |= {
                (len(rows) + at, column + 2) for at, row in enumerate(values) if known and row[column] == min(known)
            }
        rows += [
            [amount_of_flops(budget), family.label, *(number(value, 3) for value in row)]
            for (family, _), row in zip(there, values, strict=True)
        ]
    caption = "Bits per byte of the held-out text of each category, at each budget; the best of a budget is bold."
    return StudyTable(
        "By category", caption, ["FLOPs", "family", *analysis.categories, "all"], rows, 2, frozenset(best)
    )


def _cost(analysis: Analysis) -> StudyTable:
    header = ["FLOPs", "family", "parameters", "tables", "text read", "epochs", "bytes per patch"]
    header += ["training MFLOPs per byte", "forward MFLOPs per byte", "time", "bytes/s", "entropy model, FLOPs"]
    rows = [
        [amount_of_flops(budget), family.label, *_cost_of(family.best[budget])]
        for budget in reversed(analysis.budgets)
        for family in analysis.families
        if budget in family.best
    ]
    devices = dict.fromkeys(row.device for it in analysis.families for run in it.best.values() for row in run.rows)
    caption = (
        "What the runs cost, with their mean patch or token. Parameters are those without hash tables, whose memory in "
        "training (float32) is beside them; tables cost memory and no FLOPs. The FLOPs per byte include the frozen "
        "entropy model's forward pass. Training that model is not counted in the budget; its FLOPs are in the last "
        f"column. Time is that in training steps, on: {', '.join(devices)}."
    )
    return StudyTable("Cost", caption, header, rows, 2)


def _cost_of(run: BestRun) -> list[str]:
    row, rates = run.row, [row.bytes_per_second for row in run.rows if row.bytes_per_second is not None]
    trained = row.entropy_model_training_flops
    return [
        f"{row.num_parameters / 1e6:.3g} M",
        amount_of_bytes(row.table_bytes) if row.table_bytes else UNKNOWN,
        amount_of_bytes(row.bytes_read),
        number(row.epochs, 2),
        number(run.mean("mean_patch_bytes")),
        f"{sum(row.training_flops_per_byte.values()) / 1e6:.3g}",
        f"{row.inference_flops_per_byte / 1e6:.3g}",
        duration(run.mean("seconds")),
        f"{sum(rates) / len(rates):,.0f}" if rates else UNKNOWN,
        amount_of_flops(trained) if trained else UNKNOWN,
    ]


def _bits(run: BestRun | None) -> str:
    if run is None:
        return UNKNOWN
    return number(run.bits_per_byte, 3) + (f" ({len(run.rows)})" if len(run.rows) > 1 else "")
