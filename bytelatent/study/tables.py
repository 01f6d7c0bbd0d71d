"""Tables of a study for the terminal: what is planned, what came out, which trial was best."""

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from bytelatent.report.text import UNKNOWN, aligned, amount_of_bytes, duration, number
from bytelatent.study.cost import ENTROPY_MODEL, PlannedRun
from bytelatent.study.plan import budget_name
from bytelatent.study.results import StudyRow

GROUPS = {"global transformer": "global", "blocks": "global", "output": "output", ENTROPY_MODEL: ENTROPY_MODEL}
COLUMNS = ("global", "local", "output", ENTROPY_MODEL)
CHECKPOINT_BYTES = 16  # of a weight: itself and its two moments in float32, and the model once more
NOTE = (
    "MFLOPs per byte of training: three forward passes of the model, whose global part is the blocks of a language "
    "model, and one of the entropy model; bytes per patch or token, ~ before its entropy model or tokenizer is there"
)


def plan_table(runs: Sequence[PlannedRun]) -> str:
    """A line for each family and budget (and each trial), before anything runs."""
    header = ["family", "budget", "runs", "parameters", "hash tables", *COLUMNS, "all", "bytes per patch"]
    header += ["bytes", "epochs", "steps"]
    lines = []
    groups: dict[tuple[str, str, float], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.draft.family, run.draft.variation, run.draft.budget), []).append(run)
    for same in groups.values():
        run, cost = same[0], same[0].cost
        flops = _grouped(cost.training_flops_per_byte)
        size = number(run.measured.unit_bytes)
        lines.append(
            [
                " ".join(filter(None, (run.draft.family, run.draft.variation))),
                budget_name(run.draft.budget),
                f"{len(same)}",
                f"{sum(cost.parameters.values()):,}",
                amount_of_bytes(cost.table_bytes) if cost.table_bytes else UNKNOWN,
                *(_mflops(flops[name]) if name in flops else UNKNOWN for name in COLUMNS),
                _mflops(cost.flops_per_byte),
                f"~{size}" if run.measured.is_expected else size,
                amount_of_bytes(run.num_bytes),
                number(run.epochs),
                f"{run.steps:,}",
            ]
        )
    flops = sum(run.training_flops for run in runs)
    weights = sum(sum(run.cost.parameters.values()) + run.cost.table_parameters for run in runs)
    total = f"{'1 run' if len(runs) == 1 else f'{len(runs)} runs'}, {flops:.3g} training FLOPs in all"
    disk = amount_of_bytes(CHECKPOINT_BYTES * weights)
    return (
        f"{aligned(header, lines, 1)}\n{NOTE}\n{total}; they leave {disk} of checkpoints, unless models are discarded"
    )


def plan_values(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """The same as plain values, with all parts and each seed."""
    return [
        {
            "name": run.name,
            "family": run.draft.family,
            "budget": run.draft.budget,
            "seed": run.draft.seed,
            "parameters": run.cost.parameters,
            "table_parameters": run.cost.table_parameters,
            "table_bytes": run.cost.table_bytes,
            "training_flops_per_byte": run.cost.training_flops_per_byte,
            "inference_flops_per_byte": run.cost.inference_flops_per_byte,
            "training_flops": run.training_flops,
            "bytes_read": run.num_bytes,
            "epochs": run.epochs,
            "steps": run.steps,
            "bytes_per_step": run.bytes_per_step,
            "measured": run.measured.plain(),
        }
        for run in runs
    ]


def results_table(rows: Sequence[StudyRow]) -> str:
    """A line for each family and budget, the best first: means over seeds, beside the best and the worst one."""
    closed = any(row.held_out is None for row in rows)
    header = ["family", "budget", "seeds", "tuning" if closed else "held out", "best seed", "worst seed"]
    header += ["FLOPs", "bytes per patch", "bytes", "time"]
    key = lambda row: (row.budget, row.family)  # noqa: E731
    lines = []
    for (budget, family), group in groupby(sorted(rows, key=key), key=key):
        same = list(group)
        bits = [(row.held_out if not closed and row.held_out else row.tuning).bits_per_byte for row in same]
        many = len(bits) > 1
        values = [number(fmean(bits), 4), *(number(end(bits), 4) if many else UNKNOWN for end in (min, max))]
        values += [f"{fmean(row.training_flops for row in same):.3g}", number(fmean(r.mean_patch_bytes for r in same))]
        values += [amount_of_bytes(fmean(r.bytes_read for r in same)), duration(fmean(r.seconds for r in same))]
        lines.append((budget, fmean(bits), [family, budget_name(budget), f"{len(same)}", *values]))
    return aligned(header, [line for _, _, line in sorted(lines)], 1)


def trials_table(rows: Sequence[tuple[str, StudyRow]]) -> str:
    """The trials of each family, the best first; by the tuning text.

    Args:
        rows: each with the name of its variation.
    """
    header = ["family", "rank", "trial", "tuning", "difference", "bytes per patch", "time"]
    lines = []
    key = lambda pair: pair[1].family  # noqa: E731
    for family, group in groupby(sorted(rows, key=key), key=key):
        ranked = sorted(group, key=lambda pair: pair[1].tuning.bits_per_byte)
        best = ranked[0][1].tuning.bits_per_byte
        for rank, (name, row) in enumerate(ranked, start=1):
            bits = row.tuning.bits_per_byte
            values = [number(bits, 4), f"{bits - best:+.4f}" if rank > 1 else UNKNOWN, number(row.mean_patch_bytes)]
            lines.append([family, f"{rank}", name, *values, duration(row.seconds)])
    return aligned(header, lines, 1)


def _grouped(parts: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, flops in parts.items():
        group = GROUPS.get(name, "local")
        found[group] = found.get(group, 0.0) + flops
    return found


def _mflops(flops: float) -> str:
    return number(flops / 1e6, 1 if flops >= 1e7 else 3)
