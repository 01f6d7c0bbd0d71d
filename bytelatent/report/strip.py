"""Entropies over the bytes of a text, as the geometry of a drawing; the template turns it into SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

from bytelatent.patching import Patch
from bytelatent.report.characters import Character, characters, finite, visible

COLUMN = 12  # units of the drawing that a byte is wide
HEIGHT = 84  # units above the base line
MOST_BYTES = 1000  # drawn; a longer text's strip stops here


@dataclass(frozen=True)
class Label:
    """A character under its bars."""

    x: float
    text: str


@dataclass(frozen=True)
class Strip:
    """Bars over bytes: x to the right, y down from the top.

    Attributes:
        width: of the whole drawing.
        bars: one SVG path for the bars of the first, third, ... patch and one for those between.
        labels: the characters under the bars.
        ticks: nats and their y.
        threshold: y of the threshold, where one is given.
        num_bytes: how many bytes are drawn.
    """

    width: int
    bars: tuple[str, str]
    labels: list[Label]
    ticks: list[tuple[float, float]]
    threshold: float | None
    num_bytes: int


def entropy_strip(patches: Sequence[Patch], threshold: float | None) -> Strip | None:
    """The drawing for a text; None where its patches have no entropies.

    Args:
        patches: of one text, in order.
        threshold: of the entropy rule, nats; None where there is no single level to draw.
    """
    entropies = [value for patch in patches for value in map(finite, patch.entropies or ()) if value is not None]
    if not entropies:
        return None
    threshold = finite(threshold)
    top = max(*entropies, 1.15 * (threshold or 0.0), 0.5)
    paths: tuple[list[str], list[str]] = ([], [])
    labels: list[Label] = []
    num_bytes = 0
    for index, patch in enumerate(patches):
        for character in characters(patch):
            if num_bytes >= MOST_BYTES:
                break
            labels.append(_label(character, num_bytes))
            for offset, entropy in enumerate(character.entropies or ()):
                paths[index % 2].append(_bar(num_bytes + offset, finite(entropy) or 0.0, top))
            num_bytes += character.num_bytes
    step = next(step for step in (0.5, 1, 2, 5, 10, 100, float("inf")) if top / step <= 4)
    ticks = [(tick * step, _y(tick * step, top)) for tick in range(5) if tick * step <= top]
    return Strip(
        width=num_bytes * COLUMN,
        bars=("".join(paths[0]), "".join(paths[1])),
        labels=labels,
        ticks=ticks,
        threshold=None if threshold is None else _y(threshold, top),
        num_bytes=num_bytes,
    )


def _label(character: Character, position: int) -> Label:
    shown = visible(character.text)
    shown = "␣" if shown == " " else shown
    x = COLUMN * (position + character.num_bytes / 2)
    return Label(x, shown if len(shown) <= 2 else "∙")


def _bar(position: int, entropy: float, top: float) -> str:
    y = _y(max(entropy, 0.0), top)
    return f"M{COLUMN * position + 1} {HEIGHT}V{y:g}h{COLUMN - 2}V{HEIGHT}z"


def _y(entropy: float, top: float) -> float:
    return round(HEIGHT * (1 - entropy / top), 1)
