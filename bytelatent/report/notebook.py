"""Patches and figures as a notebook shows them: a piece of HTML with a style of its own, and axes of pyplot."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bytelatent.errors import UserError
from bytelatent.patching import Patch
from bytelatent.report.drawing import ON_PAPER, figure_settings, style_axes
from bytelatent.report.entropy_figure import BYTE_WIDTH, draw_entropies, glyphs_of
from bytelatent.report.figures import draw_histogram
from bytelatent.report.page import page_templates, page_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOGGER = logging.getLogger(__name__)

MOST_BYTES = 256  # of a text, on one pair of axes


def patches_in_notebook(name: str, patches: Sequence[Patch], threshold: float | None) -> str:
    """A patched text as HTML; pointing at a byte shows its entropy."""
    text = page_text(name, patches, threshold)
    return page_templates().get_template("notebook.html").render(text=text)


def draw_entropies_of(text: bytes, patches: Sequence[Patch], threshold: float | None, axes: "Axes | None") -> "Axes":
    """Draw the entropies of a text's first `MOST_BYTES` bytes on axes, or on those of a new figure."""
    glyphs = glyphs_of(text, MOST_BYTES)
    width = glyphs[-1].start + glyphs[-1].num_bytes
    if width < len(text):
        LOGGER.warning(f"the figure shows the first {width:,} bytes of {len(text):,}; blt plot entropies draws more")
    with figure_settings("".join(glyph.text for glyph in glyphs)):
        axes = _axes(axes, max(4.0, BYTE_WIDTH * width + 0.9), 2.2)
        draw_entropies(axes, glyphs, patches, threshold, width, ON_PAPER)
    return axes


def draw_patch_lengths(lengths: Mapping[int, int], axes: "Axes | None") -> "Axes":
    """Draw a histogram of patch lengths on axes, or on those of a new figure."""
    with figure_settings():
        axes = _axes(axes, 4.2, 3.1)
        draw_histogram(axes, lengths, ON_PAPER)
    return axes


def _axes(axes: "Axes | None", width: float, height: float) -> "Axes":
    if axes is not None:
        if not hasattr(axes, "bar"):
            raise UserError(f"ax: it takes matplotlib's axes, not {type(axes).__name__}; leave it out for a new figure")
        return axes
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    style_axes(axes, ON_PAPER)
    return axes
