"""The curves of several runs in one picture."""

from collections.abc import Sequence
from pathlib import Path

from bytelatent.errors import UserError
from bytelatent.report.amounts import amount_of_bytes
from bytelatent.report.figures import averaged, curve_points, ticks
from bytelatent.report.pictures import format_of, write_picture
from bytelatent.report.runs import BITS, VALIDATION, ComparedRun

# Okabe and Ito's colours, which those tell apart who do not see all of them; then the same in dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", (0, (4, 2)), (0, (1, 1)))
AGAINST = ("bytes", "flops")


def write_runs_figure(path: Path, runs: Sequence[ComparedRun], against: str = "bytes") -> None:
    """Draw bits per byte, of training text as lines and of held-out text as points, against what was spent.

    Args:
        path: its ending says the format.
        against: `bytes` read in training, or `flops` spent on them.

    Raises:
        UserError: there is nothing to draw, or the file cannot be written.
    """
    format_of(path)
    if against not in AGAINST:
        raise UserError(f"against: '{against}' is none; use {' or '.join(AGAINST)}")
    curves = [(run.summary.name, *_curves(run, against)) for run in runs]
    values = [y for _, training, validation in curves for y in training[1] + validation[1]]
    if not values:
        raise UserError(f"figure: no run has bits per byte to draw against {against}")
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    for index, (name, training, validation) in enumerate(curves):
        look = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}
        axes.plot(*averaged(*training), label=name, linewidth=1.2, alpha=0.75, **look)
        axes.plot(*validation, marker="o", markersize=4.5, linewidth=0.8, **look)
    low, high = min(values), max(values)
    axes.set_ylim(low / 1.05, high * 1.05)
    axes.set_yticks(ticks(low, high), minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    if against == "bytes":
        axes.xaxis.set_major_formatter(lambda value, _: amount_of_bytes(value) if value else "0")
    else:
        axes.set_xscale("log")
    axes.set_xlabel("bytes read in training" if against == "bytes" else "floating-point operations of training")
    axes.set_ylabel("bits per byte (points: held out)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_picture(figure, path)


Curve = tuple[list[float], list[float]]


def _curves(run: ComparedRun, against: str) -> tuple[Curve, Curve]:
    scale = 1.0 if against == "bytes" else run.summary.training_flops_per_byte
    if scale is None:
        return ([], []), ([], [])
    (xs, ys), (validation_xs, validation_ys) = curve_points(run.rows, BITS), curve_points(run.rows, VALIDATION)
    return ([x * scale for x in xs], ys), ([x * scale for x in validation_xs], validation_ys)
