"""Patched texts for the tests of this folder, and what a browser would read out of a page."""

from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise

from bytelatent.patching import Patch


def patched(data: bytes, starts: Sequence[int], entropies: Sequence[float] | None = None) -> list[Patch]:
    """Cut a text at byte offsets."""
    bounds = [*sorted({0, *starts}), len(data)] if data else []
    return [
        Patch(a, b, data[a:b].decode("utf-8", "replace"), None if entropies is None else entropies[a:b])
        for a, b in pairwise(bounds)
    ]


class Page(HTMLParser):
    """The tags of a page, its characters with their tooltips, and its patches."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.facts: list[str] = []
        self.patches: list[str] = []
        self.all_text = ""
        self._in_patch = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "data-byte" in attributes:
            self.facts.append(attributes["data-byte"] or "")
        if tag == "b":
            self._in_patch = True
            self.patches.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "b":
            self._in_patch = False

    def handle_data(self, data: str) -> None:
        self.all_text += data
        if self._in_patch:
            self.patches[-1] += data
