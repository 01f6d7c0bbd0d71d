"""Drawings for a page, in the page's colours."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bytelatent.patching import Patch
from bytelatent.report.drawing import Palette, averaged, in_page, scale_bits
from bytelatent.report.figures import draw_histogram
from bytelatent.report.runs import BITS, VALIDATION, curve_points
from bytelatent.report.text import Character, amount_of_bytes, characters, finite, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRIP_COLUMN = 12  # units of the drawing that a byte is wide
STRIP_HEIGHT = 84  # units above the base line
MOST_STRIP_BYTES = 1000  # drawn of a longer text


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

    def draw(axes: "Axes", palette: Palette) -> None:
        for index, (training, validation) in enumerate(drawn):
            colour = palette.series[index % len(palette.series)]
            axes.plot(*averaged(*training), color=colour, linewidth=1.4, zorder=3)
            marks = {"marker": "o", "markersize": 5, "markeredgecolor": palette.paper, "markeredgewidth": 0.8}
            axes.plot(*validation, color=colour, linewidth=0.8, linestyle=(0, (2, 2)), zorder=4, **marks)
        for name, value in references.items():
            axes.axhline(value, color=palette.muted, linewidth=1, linestyle=(0, (5, 3)), zorder=2)
            at: Any = {"ha": "right", "va": "bottom", "transform": axes.get_yaxis_transform()}
            axes.text(1, value, f"{name} ", color=palette.muted, **at)
        scale_bits(axes, [*values, *references.values()], margin=1.08)
        axes.xaxis.set_major_formatter(lambda value, _: amount_of_bytes(value) if value else "0")
        axes.set_xlabel("bytes read in training")
        axes.set_ylabel("bits per byte")

    return in_page(draw, "loss") if values else {}


def patch_length_histogram(lengths: Sequence[int]) -> dict[str, str]:
    """Share of patches of each length in bytes, with their mean, in each of `SIZES`; empty without patches."""

    def draw(axes: "Axes", palette: Palette) -> None:
        draw_histogram(axes, Counter(lengths), palette)

    return in_page(draw, "lengths") if lengths else {}


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
