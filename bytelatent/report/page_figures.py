"""Figures of a page as SVG, in the page's colours: loss curves, a histogram of patch lengths, entropies over bytes."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bytelatent.patching import Patch
from bytelatent.report.amounts import amount_of_bytes, finite
from bytelatent.report.characters import Character, characters, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib knows no CSS. It draws with these colours, which are then replaced by the page's variables, so that one
# drawing serves light and dark pages.
STAND_INS = {"#0a0b01": "var(--ink)", "#0a0b02": "var(--muted)", "#0a0b03": "var(--line)", "#0a0b04": "var(--paper)"}
INK, MUTED, LINE, PAPER = STAND_INS
NUM_SERIES_COLOURS = 6
SERIES = [f"#0a0c0{i + 1}" for i in range(NUM_SERIES_COLOURS)]
STAND_INS |= {colour: f"var(--series-{i + 1})" for i, colour in enumerate(SERIES)}

SIZES = {"wide": (7.2, 3.5), "narrow": (3.7, 3.1)}  # inches, for large screens and for phones
MOST_POINTS = 400  # of a curve; if there are more, neighbours are averaged
LONGEST_BAR = 32  # bytes; the last bar of the histogram holds this length and all longer ones

STRIP_COLUMN = 12  # units of the drawing that a byte is wide
STRIP_HEIGHT = 84  # units above the base line
MOST_STRIP_BYTES = 1000  # drawn of a longer text


def curve_points(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Bytes seen and the values of `key`, from the rows with both; a resumed run overwrites its earlier rows."""
    points: dict[float, float] = {}
    for row in rows:
        bytes_seen, value = finite(row.get("bytes_seen")), finite(row.get(key))
        if bytes_seen is not None and value is not None and value > 0:  # the axis is logarithmic
            points[bytes_seen] = value
    xs = sorted(points)
    return xs, [points[x] for x in xs]


def loss_curves(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], references: Mapping[str, float], size: str
) -> str | None:
    """Bits per byte against bytes seen: training as lines, validation as points, one colour a model.

    Args:
        curves: name of a model to the rows of its metrics.
        references: names and bits per byte of fixed references, drawn as level lines.
        size: a key of `SIZES`.

    Returns:
        The SVG element, or None if there are no values.
    """
    drawn = {
        name: (curve_points(rows, "bits_per_byte"), curve_points(rows, "validation_bits_per_byte"))
        for name, rows in curves.items()
    }
    values = [y for training, validation in drawn.values() for y in training[1] + validation[1]]
    if not values:
        return None
    with _figure(size) as (figure, axes):
        _draw_curves(axes, drawn, references, values)
        return _svg(figure, f"loss-{size}")


def _draw_curves(axes: "Axes", drawn: dict, references: Mapping[str, float], values: list[float]) -> None:
    for index, (training, validation) in enumerate(drawn.values()):
        colour = SERIES[index % NUM_SERIES_COLOURS]
        axes.plot(*averaged(*training), color=colour, linewidth=1.4, zorder=3)
        marks = {"marker": "o", "markersize": 5, "markeredgecolor": PAPER, "markeredgewidth": 0.8}
        axes.plot(*validation, color=colour, linewidth=0.8, linestyle=(0, (2, 2)), zorder=4, **marks)
    for name, value in references.items():
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (5, 3)), zorder=2)
        axes.text(1, value, f"{name} ", color=MUTED, ha="right", va="bottom", transform=axes.get_yaxis_transform())
    scale_bits(axes, [*values, *references.values()], margin=1.08)
    axes.xaxis.set_major_formatter(lambda value, _: amount_of_bytes(value) if value else "0")
    axes.set_xlabel("bytes read in training")
    axes.set_ylabel("bits per byte")


def scale_bits(axes: "Axes", values: Sequence[float], margin: float) -> None:
    """A logarithmic vertical axis for bits per byte."""
    from matplotlib.ticker import NullLocator

    lowest, highest = min(values), max(values)
    axes.set_yscale("log")
    axes.set_ylim(lowest / margin, highest * margin)
    axes.set_yticks(ticks(lowest, highest), minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def patch_length_histogram(lengths: Sequence[int], size: str) -> str | None:
    """Share of patches of each length in bytes, with their mean; None without patches."""
    if not lengths:
        return None
    with _figure(size) as (figure, axes):
        _draw_histogram(axes, lengths)
        return _svg(figure, f"lengths-{size}")


def _draw_histogram(axes: "Axes", lengths: Sequence[int]) -> None:
    counts = Counter(min(length, LONGEST_BAR) for length in lengths)
    longest = max(counts)
    xs = list(range(1, longest + 1))
    axes.bar(xs, [100 * counts[x] / len(lengths) for x in xs], width=0.85, color=SERIES[0], zorder=3)
    mean = sum(lengths) / len(lengths)
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


def averaged(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` points, each the mean of its neighbours."""
    group = -(-len(xs) // MOST_POINTS)
    if group <= 1:
        return xs, ys
    starts = range(0, len(xs), group)
    return [fmean(xs[i : i + group]) for i in starts], [fmean(ys[i : i + group]) for i in starts]


def ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers between the two, few enough to read on a logarithmic axis."""
    round_numbers = [digit * 10**power for power in range(-3, 4) for digit in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)]
    inside = [tick for tick in round_numbers if lowest / 1.08 <= tick <= highest * 1.08]
    return inside[:: -(-len(inside) // 9)] if inside else [lowest, highest]


@contextmanager
def _figure(size: str) -> Iterator[tuple["Figure", "Axes"]]:
    """An empty figure outside of pyplot's global state; draw and save it inside the block."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9.5, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=SIZES[size], layout="constrained")
        axes = figure.add_subplot()
        _style(axes)
        yield figure, axes


def _style(axes: "Axes") -> None:
    axes.grid(axis="y", color=LINE, linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, length=0, pad=5)
    axes.tick_params(axis="x", length=3)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)


def _svg(figure: "Figure", name: str) -> str:
    """The figure as a self-contained SVG element with text as text and unique ids."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    svg = re.sub(r'\s(xmlns(:xlink)?|width|height|version)="[^"]*"', "", opening) + ">" + rest
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in STAND_INS.items():
        svg = svg.replace(stand_in, variable)
    return svg.strip()


@dataclass(frozen=True)
class StripLabel:
    """A character under its bars."""

    x: float
    text: str


@dataclass(frozen=True)
class EntropyStrip:
    """Bars over bytes: x to the right, y down from the top.

    Attributes:
        width: of the whole drawing.
        bars: one SVG path for the bars of the first, third, ... patch and one for those between.
        labels: the characters under the bars.
        ticks: nats and their y.
        threshold: y of the threshold; None without one.
        num_bytes: number of bytes drawn.
    """

    width: int
    bars: tuple[str, str]
    labels: list[StripLabel]
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
    paths: tuple[list[str], list[str]] = ([], [])
    labels: list[StripLabel] = []
    num_bytes = 0
    for index, patch in enumerate(patches):
        for character in characters(patch):
            if num_bytes >= MOST_STRIP_BYTES:
                break
            labels.append(_strip_label(character, num_bytes))
            for offset, entropy in enumerate(character.entropies or ()):
                paths[index % 2].append(_strip_bar(num_bytes + offset, finite(entropy) or 0.0, top))
            num_bytes += character.num_bytes
    step = next(step for step in (0.5, 1, 2, 5, 10, 100, float("inf")) if top / step <= 4)
    ticks = [(tick * step, _y(tick * step, top)) for tick in range(5) if tick * step <= top]
    return EntropyStrip(
        width=num_bytes * STRIP_COLUMN,
        bars=("".join(paths[0]), "".join(paths[1])),
        labels=labels,
        ticks=ticks,
        threshold=None if threshold is None else _y(threshold, top),
        num_bytes=num_bytes,
    )


def _strip_label(character: Character, position: int) -> StripLabel:
    shown = visible(character.text)
    shown = "␣" if shown == " " else shown
    x = STRIP_COLUMN * (position + character.num_bytes / 2)
    return StripLabel(x, shown if len(shown) <= 2 else "∙")


def _strip_bar(position: int, entropy: float, top: float) -> str:
    y = _y(max(entropy, 0.0), top)
    return f"M{STRIP_COLUMN * position + 1} {STRIP_HEIGHT}V{y:g}h{STRIP_COLUMN - 2}V{STRIP_HEIGHT}z"


def _y(entropy: float, top: float) -> float:
    return round(STRIP_HEIGHT * (1 - entropy / top), 1)
