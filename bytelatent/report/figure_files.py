"""Figures as files: the curves of several runs, and mean patch size against the threshold."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.report.amounts import amount_of_bytes
from bytelatent.report.page_figures import averaged, curve_points, scale_bits
from bytelatent.report.runs import BITS, VALIDATION, ComparedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's colours, for colour-blind readers; then the same with dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", (0, (4, 2)), (0, (1, 1)))
AGAINST = ("bytes", "flops")

Curve = tuple[list[float], list[float]]


def figure_format(path: Path) -> str:
    """The format of a figure, from the suffix of its file.

    Raises:
        UserError: the suffix is unknown.
    """
    kind = path.suffix.removeprefix(".")
    if kind not in FIGURE_FORMATS:
        raise UserError(f"figure: '{path}' should end in one of {', '.join('.' + name for name in FIGURE_FORMATS)}")
    return kind


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure in the format of the file's suffix; equal figures give equal bytes.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    import matplotlib

    kind = figure_format(path)
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with matplotlib.rc_context({"svg.hashsalt": "bytelatent"}), whole_file(path) as aside:
        figure.savefig(aside, format=kind, dpi=160, metadata=undated)


def write_runs_figure(path: Path, runs: Sequence[ComparedRun], against: str = "bytes") -> None:
    """Draw bits per byte against training cost: lines for training text, points for held-out text.

    Args:
        path: the suffix gives the format.
        against: `bytes` read in training, or the training's `flops`.

    Raises:
        UserError: there is nothing to draw, or the file cannot be written.
    """
    figure_format(path)
    if against not in AGAINST:
        raise UserError(f"against: '{against}' is unknown; use {' or '.join(AGAINST)}")
    curves = [(run.summary.name, *_curves(run, against)) for run in runs]
    values = [y for _, training, validation in curves for y in training[1] + validation[1]]
    if not values:
        raise UserError(f"figure: no run has bits per byte to draw against {against}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, training, validation) in enumerate(curves):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}
        axes.plot(*averaged(*training), label=name, linewidth=1.2, alpha=0.75, **style)
        axes.plot(*validation, marker="o", markersize=4.5, linewidth=0.8, **style)
    scale_bits(axes, values, margin=1.05)
    if against == "bytes":
        axes.xaxis.set_major_formatter(lambda value, _: amount_of_bytes(value) if value else "0")
    else:
        axes.set_xscale("log")
    axes.set_xlabel("bytes read in training" if against == "bytes" else "floating-point operations of training")
    axes.set_ylabel("bits per byte (points: held out)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_figure(figure, path)


def _curves(run: ComparedRun, against: str) -> tuple[Curve, Curve]:
    scale = 1.0 if against == "bytes" else run.summary.training_flops_per_byte
    if scale is None:
        return ([], []), ([], [])
    (xs, ys), (validation_xs, validation_ys) = curve_points(run.rows, BITS), curve_points(run.rows, VALIDATION)
    return ([x * scale for x in xs], ys), ([x * scale for x in validation_xs], validation_ys)


def write_threshold_figure(
    path: Path, thresholds: Sequence[float], patch_bytes: Sequence[float], chosen: tuple[float, float]
) -> None:
    """Draw mean patch size against the threshold, and mark the chosen threshold.

    Args:
        path: the suffix gives the format.
        thresholds: nats, increasing.
        patch_bytes: mean bytes per patch at each threshold.
        chosen: the chosen threshold, and its mean patch size.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    figure_format(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.plot(thresholds, patch_bytes, color="#2a6f97", linewidth=1.8)
    threshold, size = chosen
    axes.plot([threshold], [size], "o", color="#c1440e", markersize=7, zorder=3)
    for line in (axes.axvline(threshold), axes.axhline(size)):
        line.set(color="#c1440e", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate(
        f"{threshold:.3f} nats\n{size:.2f} bytes per patch",
        chosen,
        xytext=(8, -8),
        textcoords="offset points",
        va="top",
        color="#c1440e",
    )
    axes.set(xlabel="threshold (nats)", ylabel="mean bytes per patch", yscale="log")
    ticks = [tick for tick in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if tick <= max(patch_bytes) * 1.2]
    axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    write_figure(figure, path)
