"""What all figures share: colours, axes, labels, fonts, and how they become files or parts of a page."""

import io
import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.report.text import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOGGER = logging.getLogger(__name__)

FIGURE_FORMATS = ("png", "svg", "pdf")
SIZES = {"wide": (7.2, 3.5), "narrow": (3.7, 3.1)}  # inches, for large screens and for phones
DASHES = ("-", (0, (4, 2)), (0, (1, 1)))
MOST_POINTS = 400  # of a curve; if there are more, neighbours are averaged
FONT, FONT_SIZE = "DejaVu Sans", 9.5  # matplotlib brings it
MATPLOTLIB: dict[str, Any] = {"text.parse_math": False, "font.size": FONT_SIZE, "svg.hashsalt": "bytelatent"}

PLACEHOLDERS = "Last Resort"  # a font of boxes, one for each script
# Seconds of ticks, and between ticks.
CLOCK = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, 86400)

Curve = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Palette:
    """The colours of a figure.

    Attributes:
        series: of lines; distinct for colour-blind readers.
        patches: of neighbouring patches, in turn.
    """

    ink: str
    muted: str
    line: str
    paper: str
    threshold: str
    series: tuple[str, ...]
    patches: tuple[str, str]


# As in templates/style.html. Found by a search for colours that readers with any colour blindness tell apart, on this
# ground: no two are nearer than 0.12 in OKLab, nor than 0.12 as Machado et al. 2009 simulate three kinds of it.
ON_PAPER = Palette(
    ink="#1c1e22",
    muted="#5f6570",
    line="#e1e2e0",
    paper="#ffffff",
    threshold="#c0283a",
    series=("#1f50c6", "#c35901", "#1f887a", "#781663", "#5c4800", "#1c1e22"),
    patches=("#4c8fdd", "#e5a02c"),
)
# Matplotlib knows no CSS. It draws with these colours, which are then replaced by the page's variables, so that one
# drawing serves light and dark pages.
IN_PAGE = Palette(
    ink="#0a0b01",
    muted="#0a0b02",
    line="#0a0b03",
    paper="#0a0b04",
    threshold="#0a0b05",
    series=tuple(f"#0a0c0{number}" for number in range(1, 7)),
    patches=("#0a0b06", "#0a0b07"),
)
VARIABLES = {getattr(IN_PAGE, name): name for name in ("ink", "muted", "line", "paper", "threshold")}
VARIABLES |= {colour: f"series-{number}" for number, colour in enumerate(IN_PAGE.series, start=1)}
VARIABLES |= dict(zip(IN_PAGE.patches, ("bar-a", "bar-b"), strict=True))

Draw = Callable[["Axes", Palette], None]


def figure_format(path: Path) -> str:
    """The format of a figure, from the suffix of its file.

    Raises:
        UserError: the suffix is unknown, or matplotlib is not installed.
    """
    must_have_matplotlib()
    kind = path.suffix.removeprefix(".")
    if kind not in FIGURE_FORMATS:
        raise UserError(f"figure: '{path}' should end in one of {', '.join('.' + name for name in FIGURE_FORMATS)}")
    return kind


def must_have_matplotlib() -> None:
    """
    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UserError(f"figures need matplotlib ({error}); run: pip install matplotlib") from None


def empty_figure(width: float, height: float, palette: Palette = ON_PAPER, **subplots: Any) -> tuple["Figure", Any]:
    """A figure outside of pyplot's global state, and its axes, or an array of them.

    Raises:
        UserError: matplotlib is not installed.
    """
    must_have_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    found = figure.subplots(**subplots)
    for axes in figure.axes:
        style_axes(axes, palette)
    return figure, found


def style_axes(axes: "Axes", palette: Palette) -> None:
    axes.grid(axis="y", color=palette.line, linewidth=0.8, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(palette.muted)
    axes.tick_params(colors=palette.muted, labelcolor=palette.ink, length=0, pad=5)
    axes.tick_params(axis="x", length=3)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(palette.muted)


@contextmanager
def figure_file(path: Path, width: float, height: float, text: str = "", **subplots: Any) -> Iterator[Any]:
    """Axes to draw on; the figure is written when the block ends. Equal figures give equal bytes.

    Args:
        path: the suffix gives the format.
        text: what is written on the figure, so that fonts for it are found; a warning names characters without one.

    Raises:
        UserError: the suffix is unknown, the file cannot be written, or matplotlib is not installed.
    """
    kind = figure_format(path)
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with figure_settings(text):
        figure, axes = empty_figure(width, height, **subplots)
        yield axes
        with whole_file(path) as aside:
            figure.savefig(aside, format=kind, dpi=160, metadata=undated)
            if kind == "png":
                _make_small(aside)


def _make_small(picture: Path) -> None:
    """Store a PNG with a table of its colours, of which a figure has few: a third of the size."""
    from PIL import Image

    with Image.open(picture) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(picture, format="png", optimize=True)


@contextmanager
def figure_settings(text: str = "", **more: Any) -> Iterator[None]:
    """matplotlib's settings within the block: fonts that have what is written, and text that is no mathematics.

    Raises:
        UserError: matplotlib is not installed.
    """
    must_have_matplotlib()
    import matplotlib

    families, missing = fonts_for(text)
    warn_of_missing(missing, "boxes")
    settings: Any = {**MATPLOTLIB, "font.family": families, **more}
    with matplotlib.rc_context(settings):
        yield


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """The font families that are needed to draw a text, the usual one first, and the characters that none has.

    Raises:
        UserError: matplotlib is not installed.
    """
    must_have_matplotlib()
    from matplotlib.font_manager import fontManager

    upright = [font for font in fontManager.ttflist if font.weight in (400, "normal") and font.style == "normal"]
    files = {font.name: font.fname for font in upright if not font.name.startswith(PLACEHOLDERS)}
    families: list[str] = []
    missing = {character for character in text if character.isprintable()}
    for family in sorted(files, key=lambda name: (name != FONT, name)):
        drawn = {character for character in missing if ord(character) in _glyphs(files[family])}
        if drawn or family == FONT:
            families.append(family)
            missing -= drawn
        if not missing:
            break
    return families or [FONT], missing


def warn_of_missing(characters: Collection[str], shown_as: str) -> None:
    """Warn of characters that no font has."""
    if characters:
        first = ", ".join(f"U+{ord(character):04X}" for character in sorted(characters)[:8])
        LOGGER.warning(
            f"no font here has {first}{', ...' if len(characters) > 8 else ''}; shown as {shown_as}. A font that has "
            "them helps, such as those of Debian's fonts-noto-cjk or fonts-noto-core"
        )


@cache
def _glyphs(file: str) -> frozenset[int]:
    """The characters that a font has, by number."""
    from matplotlib.font_manager import get_font

    try:
        font = get_font(file)
        return frozenset(font.get_charmap() if font.scalable else ())  # colour emoji are pictures of one size
    except (OSError, RuntimeError, ValueError):  # a font that matplotlib does not read
        return frozenset()


def in_page(draw: Draw, name: str) -> dict[str, str]:
    """A drawing as an SVG element for each of `SIZES`, with the colours of the page and its font."""
    return {size: svg_in_page(draw, f"{name}-{size}", *inches) for size, inches in SIZES.items()}


def svg_in_page(draw: Draw, name: str, width: float, height: float) -> str:
    """A drawing as a self-contained SVG element with text as text and ids that begin with its name."""
    with figure_settings(**{"svg.fonttype": "none", "svg.hashsalt": ""}):
        figure, axes = empty_figure(width, height, IN_PAGE)
        draw(axes, IN_PAGE)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    svg = re.sub(r'\s(xmlns(:xlink)?|width|height|version)="[^"]*"', "", opening) + ">" + rest
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    return svg.strip()


def averaged(xs: Sequence[float], ys: Sequence[float]) -> Curve:
    """At most `MOST_POINTS` points, each the mean of its neighbours."""
    group = max(-(-len(xs) // MOST_POINTS), 1)
    starts = range(0, len(xs), group)
    return [fmean(xs[i : i + group]) for i in starts], [fmean(ys[i : i + group]) for i in starts]


def scale_bits(axes: "Axes", values: Sequence[float], margin: float) -> None:
    """A logarithmic vertical axis for bits per byte, with few enough round ticks to read."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    lowest, highest = min(values), max(values)
    axes.set_yscale("log")
    axes.set_ylim(lowest / margin, highest * margin)
    if highest < 2 * lowest:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    else:
        round_numbers = [digit * 10**power for power in range(-3, 4) for digit in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)]
        ticks = [tick for tick in round_numbers if lowest / 1.08 <= tick <= highest * 1.08]
        axes.set_yticks(ticks[:: -(-len(ticks) // 9)] if ticks else [lowest, highest], minor=False)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def scale_time(axes: "Axes", highest: float) -> None:
    """A horizontal axis of seconds, up to the highest, with ticks as on a clock."""
    from matplotlib.ticker import FixedLocator, MultipleLocator, NullLocator

    if axes.get_xscale() == "log":
        low, high = axes.get_xlim()
        ticks = [time for time in CLOCK if low <= time <= high]
        axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 7)] if ticks else [low, high]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        step = next((step for step in CLOCK if highest / step <= 7), highest / 5)
        axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(lambda value, _: clock(value))


def clock(seconds: float) -> str:
    """`30 s`, `5 min`, `1 h 30 min`: a time without a part that is 0."""
    return re.sub(r"(?<=[a-z]) 0 (s|min)$", "", duration(seconds).replace(".0 s", " s")) if seconds else "0"


def label_ends(axes: "Axes", ends: Sequence[tuple[float, float, str, str]], size: float = 8.5) -> None:
    """Name lines beside the axes, at their right ends: in the lines' colours, and apart from one another.

    Args:
        ends: x and y of the end of a line, in data units, its name and its colour. The axes have their limits.
        size: of the letters, points.
    """
    from matplotlib.collections import LineCollection

    figure: Any = axes.figure
    figure.draw_without_rendering()  # for the height of the axes
    gap = 1.25 * size * figure.dpi / 72 / axes.get_window_extent().height
    inside = (axes.transData + axes.transAxes.inverted()).transform([(x, y) for x, y, _, _ in ends])
    heights = apart([float(height) for _, height in inside], gap)
    colours = [colour for _, _, _, colour in ends]
    leaders = [((x, y), (1.025, height)) for (x, y), height in zip(inside.tolist(), heights, strict=True)]
    style: Any = {"colors": colours, "linewidths": 0.7, "alpha": 0.6, "zorder": 2.5, "clip_on": False}
    axes.add_collection(LineCollection(leaders, transform=axes.transAxes, **style), autolim=False)
    for (_, _, name, colour), height in zip(ends, heights, strict=True):
        at: Any = {"transform": axes.transAxes, "va": "center", "color": colour, "fontsize": size}
        axes.text(1.035, height, name, **at)


def apart(heights: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Heights in the same order, moved as little as it takes to be a gap apart, and between two limits if they fit."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups: list[list[float]] = []  # of neighbours that touch: heights less the gaps below them
    for rank, index in enumerate(order):
        groups.append([heights[index] - rank * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    highest = max(high - gap * (len(heights) - 1), low)
    bases = [min(max(fmean(group), low), highest) for group in groups for _ in group]
    found = dict(zip(order, (base + rank * gap for rank, base in enumerate(bases)), strict=True))
    return [found[index] for index in range(len(heights))]
