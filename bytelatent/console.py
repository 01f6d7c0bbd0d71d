"""Consoles of `rich`, which takes out five control characters and leaves ESC; importing it takes its time."""

from collections.abc import Iterable

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from bytelatent.terminal import safe


class Console(rich.console.Console):
    """One of `rich` that sends a terminal nothing raw of what it shows: only its own colours and movements."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else safe(segment.text)
            yield segment if text is segment.text else Segment(text, segment.style)
