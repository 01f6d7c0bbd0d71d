"""Figures as files: curves of runs, patch lengths, thresholds and noise; `entropy_figure.py` draws entropies."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bytelatent.errors import UserError
from bytelatent.report.drawing import (
    DASHES,
    ON_PAPER,
    Curve,
    Palette,
    averaged,
    figure_file,
    label_ends,
    scale_bits,
    scale_time,
)
from bytelatent.report.runs import BITS, VALIDATION, ComparedRun, curve_points, seconds_spent
from bytelatent.report.text import amount_of_bytes, amount_of_flops, duration, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AGAINST = {  # of curves: the name of the axis, and how its values are written
    "bytes": ("bytes read in training", amount_of_bytes),
    "flops": ("floating-point operations of training", amount_of_flops),
    "seconds": ("time spent in training steps", duration),
}
LONGEST_BAR = 32  # bytes; the last bar of the histogram holds this length and all longer ones
IN_A_ROW = 3  # histograms


def write_runs_figure(path: Path, runs: Sequence[ComparedRun], against: str = "bytes") -> None:
    """Draw bits per byte against training cost: lines for training text, points for held-out text.

    Args:
        path: the suffix gives the format.
        against: a key of `AGAINST`.

    Raises:
        UserError: there is nothing to draw, or the file cannot be written.
    """
    if against not in AGAINST:
        raise UserError(f"against: '{against}' is unknown; use {' or '.join(AGAINST)}")
    curves = [(visible_name(run.summary.name), *curves_of(run, against)) for run in runs]
    drawn = [(name, training, held_out) for name, training, held_out in curves if training[1] or held_out[1]]
    if not drawn:
        raise UserError(f"figure: no run has bits per byte to draw against {against}")
    names = "".join(name for name, _, _ in drawn)
    with figure_file(path, 7.2, max(4.2, 0.16 * len(drawn) + 1), names) as axes:
        draw_runs(axes, drawn, against, ON_PAPER)


def draw_runs(axes: "Axes", curves: Sequence[tuple[str, Curve, Curve]], against: str, palette: Palette) -> None:
    """Curves of the training and of the held-out text of each run, named at their ends."""
    ends: list[tuple[float, float, str, str]] = []
    for index, (name, training, held_out) in enumerate(curves):
        colour = palette.series[index % len(palette.series)]
        style: Any = {"color": colour, "linestyle": DASHES[index // len(palette.series) % len(DASHES)]}
        averages = averaged(*training)
        axes.plot(*averages, label=name, linewidth=1.1, alpha=0.5, zorder=3, **style)
        axes.plot(*held_out, label=name, marker="o", markersize=4.5, linewidth=0.8, zorder=4, **style)
        xs, ys = held_out if held_out[0] else averages
        ends.append((xs[-1], ys[-1], name, colour))
    scale_bits(axes, [y for _, training, held_out in curves for y in training[1] + held_out[1]], margin=1.05)
    label, shown = AGAINST[against]
    if against == "flops":
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: shown(value) if value else "0")
    if against == "seconds":
        scale_time(axes, max(x for _, training, held_out in curves for x in training[0] + held_out[0]))
    axes.set(xlabel=label, ylabel="bits per byte (points: held out)")
    label_ends(axes, ends)


def curves_of(run: ComparedRun, against: str) -> tuple[Curve, Curve]:
    """The curves of training and held-out text; empty where the run does not state the cost."""
    training, held_out = curve_points(run.rows, BITS), curve_points(run.rows, VALIDATION)
    if against == "seconds":
        num_bytes, seconds = seconds_spent(run.rows)
        if not any(seconds):
            return ([], []), ([], [])
        [training, held_out] = [(np.interp(xs, num_bytes, seconds).tolist(), ys) for xs, ys in (training, held_out)]
    elif against == "flops":
        scale = run.summary.training_flops_per_byte
        if scale is None:
            return ([], []), ([], [])
        [training, held_out] = [([x * scale for x in xs], ys) for xs, ys in (training, held_out)]
    return training, held_out


def write_patches_figure(path: Path, lengths: Mapping[str, Mapping[int, int]]) -> None:
    """Draw how long the patches of several models are, side by side on the same axes.

    Args:
        path: the suffix gives the format.
        lengths: name of a model to the number of its patches of each length in bytes.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    names = [visible_name(name) for name in lengths]
    columns = min(len(lengths), IN_A_ROW)
    rows = ceil(len(lengths) / columns)
    grid: dict[str, Any] = {"nrows": rows, "ncols": columns, "sharey": True, "squeeze": False}
    size = 4.2 if columns == 1 else 3.1 * columns, 3.1 * rows
    with figure_file(path, *size, "".join(names), **grid) as all_axes:
        longest = max(max(counts) for counts in lengths.values())
        for axes, name, counts in zip(all_axes.flat, names, lengths.values(), strict=False):
            draw_histogram(axes, counts, ON_PAPER, longest)
            axes.set_title(name, fontsize=9.5, color=ON_PAPER.ink, loc="left")
            axes.label_outer()
        for axes in list(all_axes.flat)[len(lengths) :]:
            axes.remove()


def draw_histogram(axes: "Axes", lengths: Mapping[int, int], palette: Palette, longest: int | None = None) -> None:
    """Bars of the share of patches of each length, and their mean.

    Args:
        lengths: bytes of a patch to the number of such patches.
        longest: of the horizontal axis; at most `LONGEST_BAR`, whose bar holds all longer ones.
    """
    longest, whole = min(longest or max(lengths), LONGEST_BAR), sum(lengths.values())
    mean, counts = sum(length * count for length, count in lengths.items()) / whole, Counter[int]()
    for length, count in lengths.items():
        counts[min(length, LONGEST_BAR)] += count
    xs = range(1, longest + 1)
    axes.bar(xs, [100 * counts[x] / whole for x in xs], width=0.85, color=palette.series[0], zorder=3)
    axes.axvline(min(mean, longest), color=palette.ink, linewidth=1.2, linestyle=(0, (4, 3)), zorder=4)
    side, offset = ("right", -4) if mean > 0.6 * longest else ("left", 4)
    at: Any = {"xytext": (offset, -2), "textcoords": "offset points", "xycoords": axes.get_xaxis_transform()}
    axes.annotate(f"mean {mean:.2f}", (min(mean, longest), 1), color=palette.ink, ha=side, va="top", **at)
    axes.margins(y=0.12)
    step = 1 if longest <= 12 else 4
    axes.set_xticks([x for x in xs if x % step == 0 or x == 1])
    axes.xaxis.set_major_formatter(lambda x, _: f"{int(x)}+" if x == LONGEST_BAR else f"{int(x)}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:g} %")
    axes.set_xlim(0.3, longest + 0.7)
    axes.set_xlabel("patch length in bytes")
    axes.set_ylabel("share of patches")


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
    with figure_file(path, 6.4, 4.0) as axes:
        axes.plot(thresholds, patch_bytes, color=ON_PAPER.series[0], linewidth=1.8)
        mark, (threshold, size) = ON_PAPER.series[1], chosen
        axes.plot([threshold], [size], "o", color=mark, markersize=7, zorder=3)
        for line in (axes.axvline(threshold), axes.axhline(size)):
            line.set(color=mark, linewidth=0.8, linestyle=(0, (4, 3)))
        label = f"{threshold:.3f} nats\n{size:.2f} bytes per patch"
        axes.annotate(label, chosen, xytext=(8, -8), textcoords="offset points", va="top", color=mark)
        axes.set(xlabel="threshold (nats)", ylabel="mean bytes per patch", yscale="log")
        ticks = [tick for tick in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if tick <= max(patch_bytes) * 1.2]
        axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.set_yticks([], minor=True)


def write_noise_figure(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], score: str) -> None:
    """Draw a score against the rate of noise, a line for each name.

    Args:
        path: the suffix gives the format.
        curves: pairs of a rate and the score there.
        score: what is drawn, for the axis.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    names = [visible_name(name) for name in curves]
    with figure_file(path, 7.2, 4.2, "".join(names)) as axes:
        ends: list[tuple[float, float, str, str]] = []
        for index, (name, points) in enumerate(zip(names, curves.values(), strict=True)):
            colour = ON_PAPER.series[index % len(ON_PAPER.series)]
            style: Any = {"color": colour, "linestyle": DASHES[index // len(ON_PAPER.series) % len(DASHES)]}
            axes.plot(*zip(*sorted(points), strict=True), label=name, marker="o", markersize=4, linewidth=1.4, **style)
            ends.append((*max(points), name, colour))
        axes.set(xlabel="rate of the noise", ylabel=score)
        axes.xaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g} %")
        label_ends(axes, ends)


def visible_name(name: str) -> str:
    """A name without characters that are invisible or that a font lacks by nature."""
    return "".join(map(visible, name))
