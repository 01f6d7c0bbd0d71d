"""The figures of a study: held-out bits per byte against what was spent, and against patch size."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bytelatent.report.drawing import Palette, label_ends, scale_bits, scale_time
from bytelatent.report.figures import visible_name
from bytelatent.report.text import amount_of_flops
from bytelatent.study.analysis import Analysis
from bytelatent.study.best import BestRun, MeasuredFamily, held_out_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = {"wide": (7.4, 4.6), "narrow": (3.7, 4.9)}  # inches
BEYOND = 3.0  # laws are drawn up to this many times the largest budget, or to the crossing
FARTHEST = 30.0
SAMPLES = 24  # points of a drawn law
# The hue says which kind of model or patches it is, marker and dashes which of these it is.
HUES = {"token_lm": 1, "entropy": 0, "space": 2, "static": 3, "byte": 4, "bpe": 4}
MARKERS = {"token_lm": "s", "entropy": "o", "space": "D", "static": "^", "byte": "v", "bpe": "P", "byte_lm": "X"}
FILLS = ("full", "none", "left", "bottom")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))


@dataclass(frozen=True)
class Look:
    """How a family is drawn in all figures."""

    colour: str
    marker: str
    dashes: Any
    fill: Any


def looks(families: Sequence[MeasuredFamily], palette: Palette) -> dict[str, Look]:
    """The look of each family, by its name."""
    found: dict[str, Look] = {}
    seen: dict[str, int] = {}
    for family in families:
        number = seen[family.mode] = seen.get(family.mode, -1) + 1
        hue = HUES.get(family.mode)
        colour = palette.ink if hue is None else palette.series[hue]
        found[family.name] = Look(colour, MARKERS.get(family.mode, "o"), DASHES[number % 4], FILLS[number % 4])
    return found


def bits_against_flops(axes: "Axes", palette: Palette, analysis: Analysis, labelled: bool = True) -> None:
    """Best runs with whiskers of their seeds, their laws, and the intervals of the best BLT and the best token LM."""
    axes.set_xscale("log")
    end = _end_of_laws(analysis)
    best = [family.name for kind in ("token_lm", "blt") if (family := analysis.best(kind)) is not None]
    look = looks(analysis.families, palette)
    for family in analysis.families:
        style, law = look[family.name], analysis.laws.get(family.name)
        runs = list(family.best.values())
        _points(axes, family, [run.mean("training_flops") for run in runs], style, palette, line=law is None)
        for run in runs:
            if len(run.rows) > 1:
                bits = [held_out_bits(row) for row in run.rows]
                at = run.mean("training_flops")
                axes.plot([at, at], [min(bits), max(bits)], color=style.colour, linewidth=1.2, zorder=4)
        if law is not None:
            flops = [run.mean("training_flops") for run in runs]
            for begin, stop, alpha, label in ((flops[0], flops[-1], 1.0, "law"), (flops[-1], end, 0.55, "beyond")):
                xs = np.geomspace(begin, max(stop, begin), SAMPLES)
                dashes: Any = style.dashes if label == "law" else (0, (1, 2.5))
                line = {"color": style.colour, "linewidth": 1.3, "linestyle": dashes, "alpha": alpha, "zorder": 3}
                axes.plot(xs, law(xs), label=f"{family.name}: {label}", **line)
            if family.name in best and (band := law.band(xs := np.geomspace(flops[0], end, SAMPLES))) is not None:
                axes.fill_between(xs, *band, color=style.colour, alpha=0.13, linewidth=0, zorder=1)
    _mark_crossing(axes, analysis, palette, end)
    bits = [run.bits_per_byte for family in analysis.families for run in family.best.values()]
    ends = [float(law([end])[0]) for law in analysis.laws.values()]
    scale_bits(axes, [*bits, *ends], margin=1.02)
    _flops_axis(axes, "training FLOPs")
    _name_lines(axes, analysis.families, look, lambda family: _end_of(family, analysis, end), labelled)


def distance_against_flops(axes: "Axes", palette: Palette, analysis: Analysis, labelled: bool = True) -> None:
    """Distances to the best token LM, with the deviation that seeds alone give them."""
    axes.set_xscale("log")
    look = looks(analysis.families, palette)
    drawn = {family.name: found for family in analysis.families if (found := analysis.distances(family))}
    drawn = {name: found for name, found in drawn.items() if any(it.token_lm.name != name for it in found.values())}
    for name, found in drawn.items():
        xs, ys = list(found), [it.bits for it in found.values()]
        style = look[name]
        axes.plot(xs, ys, color=style.colour, linewidth=1.2, linestyle=style.dashes, zorder=3)
        _marker(axes, name, xs, ys, style, palette)
        for budget, it in found.items():
            if it.noise is not None:
                ends = [it.bits - it.noise, it.bits + it.noise]
                axes.plot([budget] * 2, ends, color=style.colour, linewidth=1.2, zorder=4)
    axes.axhline(0, color=palette.ink, linewidth=1.3, zorder=2)
    at: Any = {"transform": axes.get_yaxis_transform(), "fontsize": 8.5, "color": palette.ink}
    axes.text(0.01, 0, "the best token LM", va="bottom", **at)
    axes.margins(x=0.08, y=0.08)
    _flops_axis(axes, "training FLOPs")
    axes.set_ylabel("bits per byte above the best token LM")
    families = [family for family in analysis.families if family.name in drawn]

    def end(family: MeasuredFamily) -> tuple[float, float]:
        return list(drawn[family.name].items())[-1][0], list(drawn[family.name].values())[-1].bits

    if families:
        _name_lines(axes, families, look, end, labelled)


def bits_against_seconds(axes: "Axes", palette: Palette, analysis: Analysis, labelled: bool = True) -> None:
    """Best runs against the time spent in training steps."""
    axes.set_xscale("log")
    _against(axes, palette, analysis, lambda run: run.mean("seconds"), labelled)
    scale_time(axes, 0.0)
    axes.set_xlabel("time in training steps")


def bits_against_inference(axes: "Axes", palette: Palette, analysis: Analysis, labelled: bool = True) -> None:
    """Best runs against the FLOPs of a forward pass for each byte."""
    axes.set_xscale("log")
    _against(axes, palette, analysis, lambda run: run.mean("inference_flops_per_byte") / 1e6, labelled)
    axes.set_xlabel("forward MFLOPs per byte of text")
    _plain_ticks(axes)


def bits_against_patch_size(axes: "Axes", palette: Palette, analysis: Analysis, labelled: bool = True) -> None:
    """A line for each budget through the BLTs of mode entropy, and the other families as points around it."""
    axes.set_xscale("log")
    look = looks(analysis.families, palette)
    ends: list[tuple[float, float, str, str]] = []
    for budget in analysis.budgets:
        there = [family for family in analysis.families if budget in family.best]
        for family in there:
            run = family.best[budget]
            _marker(axes, family.name, [run.mean("mean_patch_bytes")], [run.bits_per_byte], look[family.name], palette)
        entropy = [family.best[budget] for family in there if family.mode == "entropy"]
        line = sorted((run.mean("mean_patch_bytes"), run.bits_per_byte) for run in entropy)
        if line:
            style = {"color": palette.series[HUES["entropy"]], "linewidth": 1.1, "alpha": 0.7, "zorder": 3}
            axes.plot(*zip(*line, strict=True), label=f"{budget:g}", **style)
        x, y = max((run.mean("mean_patch_bytes"), run.bits_per_byte) for run in (it.best[budget] for it in there))
        ends.append((x, y, f"{amount_of_flops(budget)} FLOPs", palette.ink))
    bits = [run.bits_per_byte for family in analysis.families for run in family.best.values()]
    scale_bits(axes, bits, margin=1.02)
    axes.set(xlabel="mean bytes per patch or token (flat: 1)", ylabel="held-out bits per byte")
    _plain_ticks(axes)
    label_ends(axes, ends)
    handles = {line.get_label(): line for line in axes.get_lines() if line.get_marker() != "None"}
    named = [
        (handles[family.name], visible_name(family.label)) for family in analysis.families if family.name in handles
    ]
    _legend(axes, named, columns=2 if labelled else 1)


DRAWINGS: dict[str, Callable[..., None]] = {
    "flops": bits_against_flops,
    "distance": distance_against_flops,
    "seconds": bits_against_seconds,
    "inference": bits_against_inference,
    "patch_size": bits_against_patch_size,
}


def _against(
    axes: "Axes", palette: Palette, analysis: Analysis, x_of: Callable[[BestRun], float], labelled: bool
) -> None:
    """A line for each family through its best runs, from budget to budget."""
    look = looks(analysis.families, palette)
    for family in analysis.families:
        _points(axes, family, [x_of(run) for run in family.best.values()], look[family.name], palette, line=True)
    bits = [run.bits_per_byte for family in analysis.families for run in family.best.values()]
    scale_bits(axes, bits, margin=1.02)
    axes.set_ylabel("held-out bits per byte")

    def end(family: MeasuredFamily) -> tuple[float, float]:
        run = list(family.best.values())[-1]
        return x_of(run), run.bits_per_byte

    _name_lines(axes, analysis.families, look, end, labelled)


def _points(
    axes: "Axes", family: MeasuredFamily, xs: Sequence[float], look: Look, palette: Palette, line: bool
) -> None:
    ys = [run.bits_per_byte for run in family.best.values()]
    if line:
        axes.plot(xs, ys, color=look.colour, linewidth=1.2, linestyle=look.dashes, zorder=3)
    _marker(axes, family.name, xs, ys, look, palette)


def _marker(axes: "Axes", name: str, xs: Sequence[float], ys: Sequence[float], look: Look, palette: Palette) -> None:
    fill: Any = {"fillstyle": look.fill, "markerfacecolor": look.colour, "markerfacecoloralt": palette.paper}
    if look.fill == "none":  # the lines behind it do not show through
        fill = {"markerfacecolor": palette.paper}
    edge: Any = {"markeredgecolor": look.colour, "markeredgewidth": 1.1, "markersize": 6}
    axes.plot(xs, ys, label=name, linestyle="none", marker=look.marker, zorder=5, **fill, **edge)


def _name_lines(
    axes: "Axes",
    families: Sequence[MeasuredFamily],
    look: dict[str, Look],
    end: Callable[[MeasuredFamily], tuple[float, float]],
    labelled: bool,
) -> None:
    """Names at the ends of the lines, or on a narrow screen below the axes."""
    if labelled:
        label_ends(axes, [(*end(it), visible_name(it.label), look[it.name].colour) for it in families])
        return
    handles = {line.get_label(): line for line in axes.get_lines()}
    by_height = sorted(families, key=lambda family: -end(family)[1])
    _legend(axes, [(handles[family.name], visible_name(family.label)) for family in by_height], columns=1)


def _legend(axes: "Axes", named: Sequence[tuple[Any, str]], columns: int) -> None:
    figure: Any = axes.figure
    handles, labels = zip(*named, strict=True)
    more: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 8.5}
    figure.legend(handles, labels, labelcolor=axes.xaxis.label.get_color(), **more)


def _end_of_laws(analysis: Analysis) -> float:
    """Up to which FLOPs laws are drawn."""
    largest = max(run.mean("training_flops") for family in analysis.families for run in family.best.values())
    blt = analysis.best("blt")
    crossing = None if blt is None else analysis.crossing(blt)
    far = crossing.flops * 1.5 if crossing is not None and math.isfinite(crossing.flops) else 0.0
    return max(BEYOND * largest, far if far <= FARTHEST * largest else 0.0)


def _end_of(family: MeasuredFamily, analysis: Analysis, end: float) -> tuple[float, float]:
    law = analysis.laws.get(family.name)
    if law is not None:
        return end, float(law([end])[0])
    run = list(family.best.values())[-1]
    return run.mean("training_flops"), run.bits_per_byte


def _mark_crossing(axes: "Axes", analysis: Analysis, palette: Palette, end: float) -> None:
    """A ring where the laws of the best BLT and the best token LM meet, if it is in the figure."""
    blt = analysis.best("blt")
    crossing = None if blt is None else analysis.crossing(blt)
    if blt is None or crossing is None or not 0 < crossing.flops < end:
        return
    bits = float(analysis.laws[blt.name]([crossing.flops])[0])
    ring: Any = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgecolor": palette.ink}
    axes.plot([crossing.flops], [bits], label="crossing", linestyle="none", zorder=6, **ring)
    at: Any = {"xytext": (-6, -7), "textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 8.5}
    axes.annotate(f"crossing, {amount_of_flops(crossing.flops)}", (crossing.flops, bits), color=palette.ink, **at)


def _flops_axis(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_xlim()
    steps = (1, 2, 5) if high / low < 20 else (1, 3) if high / low < 1e4 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: amount_of_flops(value))
    axes.set(xlabel=label, ylabel="held-out bits per byte")


def _plain_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.get_xlim()
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low < 12 else (1, 2, 3, 5) if high / low < 60 else (1, 3)
    axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
