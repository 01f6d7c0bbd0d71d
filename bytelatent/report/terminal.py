"""A patched text in the terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style

from bytelatent.patching import Patch
from bytelatent.report.amounts import finite
from bytelatent.report.characters import characters, visible

# Foreground and background are both set, so that patches look the same on dark and light terminals.
PATCH_STYLES = (Style.parse("color(16) on color(117)"), Style.parse("color(16) on color(222)"))
BLOCKS, DIGITS = "▁▂▃▄▅▆▇█", "01234567"


def patched_text(name: str, patches: Sequence[Patch], show_entropies: bool = False) -> RenderableType:
    """The text with its patches in alternating colours, or separated by a mark without colours.

    Args:
        name: of the patching mode (or the text), for the line above it.
        patches: of one text, in order.
        show_entropies: show the entropy of each byte as a bar below it; a character of several bytes then has as many
            columns.

    Returns:
        A renderable for `rich.console.Console.print`. Markup and control codes in the text have no effect.
    """
    return _PatchedText(name, patches, show_entropies)


@dataclass(frozen=True)
class _Cell:
    """A part of a line that is never split: a character, or the mark between two patches."""

    text: str
    bars: str
    style: Style | None
    ends_line: bool = False


@dataclass(frozen=True)
class _PatchedText:
    name: str
    patches: Sequence[Patch]
    show_entropies: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        coloured = console.color_system is not None and not console.no_color
        levels = DIGITS if options.ascii_only else BLOCKS
        highest = self._highest_entropy()
        yield from self._header(levels, highest, options.encoding)
        cells = self._cells(coloured, levels, highest, options)
        for line in _lines(cells, options.max_width):
            yield from _merged((cell.text, cell.style) for cell in line)
            yield Segment.line()
            if highest is not None:
                yield Segment("".join(cell.bars for cell in line).rstrip())
                yield Segment.line()

    def _highest_entropy(self) -> float | None:
        """The top of the scale in nats; None if no entropies are shown."""
        if not self.show_entropies:
            return None
        known = [finite(entropy) for patch in self.patches for entropy in patch.entropies or ()]
        return max((entropy for entropy in known if entropy is not None), default=None)

    def _header(self, levels: str, highest: float | None, encoding: str) -> Iterator[Segment]:
        num_patches = len(self.patches)
        num_bytes = sum(patch.end - patch.start for patch in self.patches)
        counts = f"{num_patches} {'patch' if num_patches == 1 else 'patches'}"
        if num_patches:
            counts += f" over {num_bytes} bytes, {num_bytes / num_patches:.2f} bytes per patch on average"
        name = "".join(visible(character) for character in self.name)
        yield Segment(_encodable(name, encoding), Style(bold=True))
        yield Segment(f": {counts}\n")
        if highest is not None:
            yield Segment(f"entropy of each byte: {levels[0]} is 0, {levels[-1]} is {highest:.2f} nats\n")

    def _cells(self, coloured: bool, levels: str, highest: float | None, options: ConsoleOptions) -> Iterator[_Cell]:
        mark = "|" if options.ascii_only else "│"
        for index, patch in enumerate(self.patches):
            style = PATCH_STYLES[index % 2] if coloured else None
            if index and not coloured:
                yield _Cell(mark, mark, None)
            for character in characters(patch):
                text = visible(character.text)
                if text == mark and not coloured:
                    text = f"<U+{ord(mark):04X}>"
                text = _encodable(text, options.encoding)
                bars = ""
                if highest is not None:
                    bars = "".join(_bar(entropy, highest, levels) for entropy in character.entropies or ())
                    width = max(cell_len(text), character.num_bytes)
                    text += " " * (width - cell_len(text))
                    bars = bars.ljust(width)
                yield _Cell(text, bars, style, ends_line=character.text == "\n")


def _bar(entropy: float, highest: float, levels: str) -> str:
    """A block of a height for the entropy in nats; a blank if it is not a number."""
    known = finite(entropy)
    if known is None:
        return " "
    share = known / highest if highest > 0 else 0.0
    return levels[max(0, min(len(levels) - 1, round(share * (len(levels) - 1))))]


def _lines(cells: Iterator[_Cell], width: int) -> Iterator[list[_Cell]]:
    """Break into lines of at most `width` columns, and after each line feed of the text."""
    line: list[_Cell] = []
    used = 0
    for cell in cells:
        columns = cell_len(cell.text)
        if line and used + columns > width:
            yield line
            line, used = [], 0
        line.append(cell)
        used += columns
        if cell.ends_line:
            yield line
            line, used = [], 0
    if line:
        yield line


def _merged(pieces: Iterator[tuple[str, Style | None]]) -> Iterator[Segment]:
    """Merge neighbours of the same style into one segment."""
    text, style = "", None
    for piece, piece_style in pieces:
        if text and piece_style is not style:
            yield Segment(text, style)
            text = ""
        text, style = text + piece, piece_style
    if text:
        yield Segment(text, style)


def _encodable(text: str, encoding: str) -> str:
    """The text with escapes for characters that the terminal's encoding lacks."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
