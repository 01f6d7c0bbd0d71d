"""Figures: files with the curves of runs or thresholds, and drawings for a page in the page's colours."""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.patching import Patch
from bytelatent.report.runs import BITS, VALIDATION, ComparedRun
from bytelatent.report.text import Character, amount_of_bytes, characters, finite, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's colours, for colour-blind readers; then the same with dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("-", (0, (4, 2)), (0, (1, 1)))
AGAINST = ("bytes", "flops")
MOST_POINTS = 400  # of a curve; if there are more, neighbours are averaged

# Matplotlib knows no CSS. It draws with these colours, which are then replaced by the page's variables, so that one
# drawing serves light and dark pages.
STAND_INS = {"#0a0b01": "var(--ink)", "#0a0b02": "var(--muted)", "#0a0b03": "var(--line)", "#0a0b04": "var(--paper)"}
INK, MUTED, LINE, PAPER = STAND_INS
SERIES = [f"#0a0c0{number}" for number in range(1, 7)]
STAND_INS |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, start=1)}
SIZES = {"wide": (7.2, 3.5), "narrow": (3.7, 3.1)}  # inches, for large screens and for phones
LONGEST_BAR = 32  # bytes; the last bar of the histogram holds this length and all longer ones
STRIP_COLUMN = 12  # units of the drawing that a byte is wide
STRIP_HEIGHT = 84  # units above the base line
MOST_STRIP_BYTES = 1000  # drawn of a longer text

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
    figure, axes = _empty_figure(7.2, 4.2)
    for index, (name, training, validation) in enumerate(curves):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}
        axes.plot(*_averaged(*training), label=name, linewidth=1.2, alpha=0.75, **style)
        axes.plot(*validation, marker="o", markersize=4.5, linewidth=0.8, **style)
    _scale_bits(axes, values, margin=1.05)
    if against == "bytes":
        axes.xaxis.set_major_formatter(lambda value, _: amount_of_bytes(value) if value else "0")
    else:
        axes.set_xscale("log")
    axes.set_xlabel("bytes read in training" if against == "bytes" else "floating-point operations of training")
    axes.set_ylabel("bits per byte (points: held out)")
    axes.legend(frameon=False)
    _write_figure(figure, path)


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
    figure, axes = _empty_figure(6.4, 4.0)
    axes.plot(thresholds, patch_bytes, color="#2a6f97", linewidth=1.8)
    mark, (threshold, size) = "#c1440e", chosen
    axes.plot([threshold], [size], "o", color=mark, markersize=7, zorder=3)
    for line in (axes.axvline(threshold), axes.axhline(size)):
        line.set(color=mark, linewidth=0.8, linestyle=(0, (4, 3)))
    label = f"{threshold:.3f} nats\n{size:.2f} bytes per patch"
    axes.annotate(label, chosen, xytext=(8, -8), textcoords="offset points", va="top", color=mark)
    axes.set(xlabel="threshold (nats)", ylabel="mean bytes per patch", yscale="log")
    ticks = [tick for tick in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if tick <= max(patch_bytes) * 1.2]
    axes.set_yticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.set_yticks([], minor=True)
    _write_figure(figure, path)


def write_noise_figure(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], score: str) -> None:
    """Draw a score against the rate of noise, a line for each name.

    Args:
        path: the suffix gives the format.
        curves: pairs of a rate and the score there.
        score: what is drawn, for the axis.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    figure_format(path)
    figure, axes = _empty_figure(7.2, 4.2)
    for index, (name, points) in enumerate(curves.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}
        axes.plot(*zip(*sorted(points), strict=True), label=name, marker="o", markersize=4, linewidth=1.4, **style)
    axes.set(xlabel="rate of the noise", ylabel=score)
    axes.xaxis.set_major_formatter(lambda rate, _: f"{100 * rate:g} %")
    axes.legend(frameon=False)
    _write_figure(figure, path)


def _empty_figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    """A figure outside of pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure in the format of the file's suffix; equal figures give equal bytes."""
    import matplotlib

    kind = figure_format(path)
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with matplotlib.rc_context({"svg.hashsalt": "bytelatent"}), whole_file(path) as aside:
        figure.savefig(aside, format=kind, dpi=160, metadata=undated)


def _curves(run: ComparedRun, against: str) -> tuple[Curve, Curve]:
    """The curves of training and validation."""
    scale = 1.0 if against == "bytes" else run.summary.training_flops_per_byte
    if scale is None:
        return ([], []), ([], [])
    (xs, ys), (validation_xs, validation_ys) = curve_points(run.rows, BITS), curve_points(run.rows, VALIDATION)
    return ([x * scale for x in xs], ys), ([x * scale for x in validation_xs], validation_ys)


def curve_points(rows: Iterable[Mapping[str, Any]], key: str) -> Curve:
    """Bytes seen and the values of `key`, from the rows with both; a resumed run overwrites its earlier rows."""
    points: dict[float, float] = {}
    for row in rows:
        bytes_seen, value = finite(row.get("bytes_seen")), finite(row.get(key))
        if bytes_seen is not None and value is not None and value > 0:  # the axis is logarithmic
            points[bytes_seen] = value
    xs = sorted(points)
    return xs, [points[x] for x in xs]


def _averaged(xs: list[float], ys: list[float]) -> Curve:
    """At most `MOST_POINTS` points, each the mean of its neighbours."""
    group = -(-len(xs) // MOST_POINTS)
    if group <= 1:
        return xs, ys
    starts = range(0, len(xs), group)
    return [fmean(xs[i : i + group]) for i in starts], [fmean(ys[i : i + group]) for i in starts]


def _scale_bits(axes: "Axes", values: Sequence[float], margin: float) -> None:
    """A logarithmic vertical axis for bits per byte, with few enough round ticks to read."""
    from matplotlib.ticker import NullLocator

    lowest, highest = min(values), max(values)
    round_numbers = [digit * 10**power for power in range(-3, 4) for digit in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)]
    ticks = [tick for tick in round_numbers if lowest / 1.08 <= tick <= highest * 1.08]
    axes.set_yscale("log")
    axes.set_ylim(lowest / margin, highest * margin)
    axes.set_yticks(ticks[:: -(-len(ticks) // 9)] if ticks else [lowest, highest], minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def loss_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], references: Mapping[str, float]) -> dict[str, str]:
    """Bits per byte against bytes seen: training as lines, validation as points, one colour per model.

    Args:
        curves: name of a model to the rows of its metrics.
        references: names and bits per byte of fixed references, drawn as level lines.

    Returns:
        An SVG element for each of `SIZES`; empty if there are no values.
    """
    drawn = [(curve_points(rows, BITS), curve_points(rows, VALIDATION)) for rows in curves.values()]
    values = [y for training, validation in drawn for y in training[1] + validation[1]]

    def draw(axes: "Axes") -> None:
        for index, (training, validation) in enumerate(drawn):
            colour = SERIES[index % len(SERIES)]
            axes.plot(*_averaged(*training), color=colour, linewidth=1.4, zorder=3)
            marks = {"marker": "o", "markersize": 5, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
            axes.plot(*validation, color=colour, linewidth=0.8, linestyle=(0, (2, 2)), zorder=4, **marks)
        for name, value in references.items():
            axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (5, 3)), zorder=2)
            axes.text(1, value, f"{name} ", color=MUTED, ha="right", va="bottom", transform=axes.get_yaxis_transform())
        _scale_bits(axes, [*values, *references.values()], margin=1.08)
        axes.xaxis.set_major_formatter(lambda value, _: amount_of_bytes(value) if value else "0")
        axes.set_xlabel("bytes read in training")
        axes.set_ylabel("bits per byte")

    return {size: _svg(draw, "loss", size) for size in SIZES if values}


def patch_length_histogram(lengths: Sequence[int]) -> dict[str, str]:
    """Share of patches of each length in bytes, with their mean, in each of `SIZES`; empty without patches."""

    def draw(axes: "Axes") -> None:
        counts = Counter(min(length, LONGEST_BAR) for length in lengths)
        longest, mean = max(counts), sum(lengths) / len(lengths)
        xs = range(1, longest + 1)
        axes.bar(xs, [100 * counts[x] / len(lengths) for x in xs], width=0.85, color=SERIES[0], zorder=3)
        axes.axvline(min(mean, longest), color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=4)
        side, offset = ("right", -4) if mean > 0.6 * longest else ("left", 4)
        at = {"xytext": (offset, -2), "textcoords": "offset points", "xycoords": axes.get_xaxis_transform()}
        axes.annotate(f"mean {mean:.2f}", (min(mean, longest), 1), color=INK, ha=side, va="top", **at)
        step = 1 if longest <= 12 else 4
        axes.set_xticks([x for x in xs if x % step == 0 or x == 1])
        axes.xaxis.set_major_formatter(lambda x, _: f"{int(x)}+" if x == LONGEST_BAR else f"{int(x)}")
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:g} %")
        axes.set_xlim(0.3, longest + 0.7)
        axes.set_xlabel("patch length in bytes")
        axes.set_ylabel("share of patches")

    return {size: _svg(draw, "lengths", size) for size in SIZES if lengths}


def _svg(draw: Callable[["Axes"], None], name: str, size: str) -> str:
    """A drawing as a self-contained SVG element with text as text and unique ids."""
    import matplotlib

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9.5, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure, axes = _empty_figure(*SIZES[size])
        axes.grid(visible=False)
        axes.grid(axis="y", color=LINE, linewidth=0.8, zorder=0)
        axes.spines["left"].set_visible(False)
        axes.spines["bottom"].set_color(MUTED)
        axes.tick_params(colors=MUTED, labelcolor=INK, length=0, pad=5)
        axes.tick_params(axis="x", length=3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_color(MUTED)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    svg = re.sub(r'\s(xmlns(:xlink)?|width|height|version)="[^"]*"', "", opening) + ">" + rest
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-{size}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    return svg.strip()


@dataclass(frozen=True)
class EntropyStrip:
    """Bars over bytes: x to the right, y down from the top.

    Attributes:
        width: of the whole drawing.
        bars: one SVG path for the bars of the first, third, ... patch and one for those between.
        labels: x and text of the characters under the bars.
        ticks: nats and their y.
        threshold: y of the threshold; None without one.
        num_bytes: number of bytes drawn.
    """

    width: int
    bars: tuple[str, str]
    labels: list[tuple[float, str]]
    ticks: list[tuple[float, float]]
    threshold: float | None
    num_bytes: int


def entropy_strip(patches: Sequence[Patch], threshold: float | None) -> EntropyStrip | None:
    """Entropies over the bytes of a text, as the geometry of a drawing that the template turns into SVG.

    Args:
        patches: of one text, in order.
        threshold: of the entropy mode, nats; None if there is no single level to draw.

    Returns:
        The drawing; None if the patches have no entropies.
    """
    entropies = [value for patch in patches for value in map(finite, patch.entropies or ()) if value is not None]
    if not entropies:
        return None
    threshold = finite(threshold)
    top = max(*entropies, 1.15 * (threshold or 0.0), 0.5)

    def y(entropy: float) -> float:
        return round(STRIP_HEIGHT * (1 - entropy / top), 1)

    paths: tuple[list[str], list[str]] = ([], [])
    labels: list[tuple[float, str]] = []
    num_bytes = 0
    for index, patch in enumerate(patches):
        for character in characters(patch):
            if num_bytes >= MOST_STRIP_BYTES:
                break
            labels.append(_strip_label(character, num_bytes))
            for offset, entropy in enumerate(character.entropies or ()):
                left, height = STRIP_COLUMN * (num_bytes + offset) + 1, max(finite(entropy) or 0.0, 0.0)
                paths[index % 2].append(f"M{left} {STRIP_HEIGHT}V{y(height):g}h{STRIP_COLUMN - 2}V{STRIP_HEIGHT}z")
            num_bytes += character.num_bytes
    step = next(step for step in (0.5, 1, 2, 5, 10, 100, float("inf")) if top / step <= 4)
    return EntropyStrip(
        width=num_bytes * STRIP_COLUMN,
        bars=("".join(paths[0]), "".join(paths[1])),
        labels=labels,
        ticks=[(tick * step, y(tick * step)) for tick in range(5) if tick * step <= top],
        threshold=None if threshold is None else y(threshold),
        num_bytes=num_bytes,
    )


def _strip_label(character: Character, position: int) -> tuple[float, str]:
    shown = visible(character.text)
    shown = "␣" if shown == " " else shown
    return STRIP_COLUMN * (position + character.num_bytes / 2), shown if len(shown) <= 2 else "∙"
