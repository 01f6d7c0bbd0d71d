"""The paper's figure of entropies along a text: a bar per byte, the threshold, and where patches begin."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytelatent.patching import Patch
from bytelatent.report.drawing import ON_PAPER, Palette, figure_file, fonts_for, warn_of_missing
from bytelatent.report.text import finite, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOGGER = logging.getLogger(__name__)

MOST_BYTES = 1200  # drawn of a longer text
ROW_BYTES = 64  # of one row of bars; a character is not split
BYTE_WIDTH, ROW_HEIGHT = 0.125, 1.5  # inches
SPACE = "␣"


@dataclass(frozen=True)
class Glyph:
    """A character as it is written under its bars: itself, or a number or a name where it cannot be drawn.

    Attributes:
        start: byte offset in the text.
        text: what is written.
    """

    start: int
    num_bytes: int
    text: str


def write_entropies_figure(path: Path, text: bytes, patches: Sequence[Patch], threshold: float | None) -> None:
    """Draw the entropy of each byte of a text, up to `MOST_BYTES`.

    Args:
        path: the suffix gives the format.
        text: not empty.
        patches: of the text, in order, with entropies.
        threshold: nats; None without one.

    Raises:
        UserError: the suffix is unknown, or the file cannot be written.
    """
    glyphs = glyphs_of(text)
    rows = glyph_rows(glyphs)
    drawn = rows[-1][-1].start + rows[-1][-1].num_bytes
    if drawn < len(text):
        LOGGER.warning(f"the figure shows the first {drawn:,} bytes of {len(text):,}")
    widest = max(row[-1].start + row[-1].num_bytes - row[0].start for row in rows)
    size = max(3.2, BYTE_WIDTH * widest + 0.9), ROW_HEIGHT * len(rows) + 0.35
    shown = "".join(glyph.text for row in rows for glyph in row)
    with figure_file(path, *size, shown, nrows=len(rows), squeeze=False, sharey=True) as all_axes:
        for axes, row in zip(all_axes[:, 0], rows, strict=True):
            draw_entropies(axes, row, patches, threshold, widest, ON_PAPER)
        counts = f"{len(text):,} bytes in {len(patches):,} {'patch' if len(patches) == 1 else 'patches'}"
        mean = f"{len(text) / len(patches):.2f} bytes per patch"
        top = all_axes[0, 0]
        top.set_title(f"{counts}, {mean}", fontsize=9, color=ON_PAPER.muted, loc="left")
        if threshold is not None:
            named = f"threshold {threshold:.2f} nats"
            top.set_title(named, fontsize=9, color=ON_PAPER.threshold, loc="right")


def draw_entropies(
    axes: "Axes", row: Sequence[Glyph], patches: Sequence[Patch], threshold: float | None, width: int, palette: Palette
) -> None:
    """Bars of the bytes of some characters, in the colours of their patches, with borders and the threshold."""
    begin, end = row[0].start, row[-1].start + row[-1].num_bytes
    for index, patch in enumerate(patches):
        if patch.end <= begin or patch.start >= end:
            continue
        values = [finite(value) or 0.0 for value in patch.entropies or ()]
        own = [(at, value) for at, value in enumerate(values, patch.start) if begin <= at < end]
        colour = palette.patches[index % 2]
        axes.bar([at - begin for at, _ in own], [value for _, value in own], width=0.8, color=colour, zorder=3)
        if patch.start >= begin:
            axes.axvline(patch.start - begin - 0.5, color=palette.muted, linewidth=0.7, alpha=0.7, zorder=2)
    if threshold is not None:
        axes.axhline(threshold, color=palette.threshold, linewidth=1.1, linestyle=(0, (5, 3)), zorder=4)
    for glyph in row:
        at: Any = {"ha": "center", "va": "top", "color": palette.ink, "fontsize": 9}
        if len(glyph.text) > 2:
            at |= {"rotation": 90, "fontsize": 5.5, "color": palette.muted}
        middle = glyph.start - begin + (glyph.num_bytes - 1) / 2
        axes.annotate(glyph.text, (middle, 0), xytext=(0, -4), textcoords="offset points", annotation_clip=False, **at)
    axes.set_xlim(-0.6, width - 0.4)
    axes.set_xticks([])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("entropy (nats)")


def glyphs_of(text: bytes, most: int = MOST_BYTES) -> list[Glyph]:
    """The characters of a text's first `most` bytes; a byte that is part of none is shown by its value."""
    glyphs, start = [], 0
    end = min(most, len(text))
    while end < len(text) and end > most - 4 and text[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    characters = text[:end].decode("utf-8", "surrogateescape")
    _, missing = fonts_for("".join(map(_as_written, characters)))
    # No font draws control characters, and another one would not help.
    printable = filter(str.isprintable, characters)
    warn_of_missing({character for character in printable if missing & set(_as_written(character))}, "their numbers")
    for character in characters:
        values = character.encode("utf-8", "surrogateescape")
        written = _as_written(character)
        if character == " ":
            written = SPACE
        elif len(values) == 1 and values[0] >= 0x80:
            written = f"{values[0]:02X}"
        elif missing & set(written):
            written = f"U+{ord(character):04X}"
        glyphs.append(Glyph(start, len(values), written))
        start += len(values)
    return glyphs


def glyph_rows(glyphs: Sequence[Glyph]) -> list[list[Glyph]]:
    """Rows of about the same length, of at most `ROW_BYTES` bytes."""
    num_bytes = glyphs[-1].start + glyphs[-1].num_bytes
    longest = ceil(num_bytes / ceil(num_bytes / ROW_BYTES)) + 3  # characters of several bytes leave gaps
    rows: list[list[Glyph]] = [[]]
    for glyph in glyphs:
        if rows[-1] and glyph.start + glyph.num_bytes - rows[-1][0].start > min(longest, ROW_BYTES):
            rows.append([])
        rows[-1].append(glyph)
    return rows


def _as_written(character: str) -> str:
    return visible(character).strip("<>") if len(visible(character)) > 2 else visible(character)
