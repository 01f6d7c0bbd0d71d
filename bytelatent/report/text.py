"""Numbers, the characters of patches, and patched texts in the terminal, as people read them.

A patch may begin or end inside a character. `Patch.text` shows such bytes as U+FFFD: one for each byte of a
character's end and one for all bytes of a character's beginning, so their values are lost but their number is known.
In text that is not valid UTF-8, the distribution of the lost bytes over the U+FFFD of a patch is a guess.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style

from bytelatent.patching import Patch
from bytelatent.terminal import one_line

UNKNOWN = "–"
LOST = "\ufffd"
SHOWN = {"\n": "↵", "\t": "⇥", "\x7f": "␡", " ": " ", LOST: LOST}
# Foreground and background are both set, so that patches look the same on dark and light terminals.
PATCH_STYLES = (Style.parse("color(16) on color(117)"), Style.parse("color(16) on color(222)"))
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
BLOCKS, DIGITS = "▁▂▃▄▅▆▇█", "01234567"


def finite(value: object) -> float | None:
    """The value as a finite number; None if it is missing, text, infinite or NaN."""
    try:
        number = float(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def number(value: object, digits: int = 2) -> str:
    """`1.33`, or a dash if it is not a finite number."""
    known = finite(value)
    return UNKNOWN if known is None else f"{known:.{digits}f}"


def amount_of_bytes(value: object) -> str:
    """`4.2 MB`, in powers of 1000."""
    known = finite(value)
    if known is None:
        return UNKNOWN
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(known) < 999.5:
            return f"{known:.3g} {unit}"
        known /= 1000
    return f"{known:.4g} TB"


def amount_of_flops(value: object) -> str:
    """`3.2×10¹⁶`, or a dash if it is not a finite number."""
    known = finite(value)
    if known is None:
        return UNKNOWN
    digits, power = f"{known:.1e}".split("e")
    digits = digits.removesuffix(".0")
    ten = f"10{str(int(power)).translate(SUPERSCRIPTS)}"
    return ten if digits == "1" else f"{digits}×{ten}"


def duration(value: object) -> str:
    """`42 s`, `3 min 20 s` or `2 h 5 min`, from seconds."""
    known = finite(value)
    if known is None:
        return UNKNOWN
    if known < 9.95:
        return f"{known:.1f} s"
    seconds = round(known)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], num_texts: int, markdown: bool = False) -> str:
    """A table of plain text, or of Markdown.

    Args:
        num_texts: number of left-aligned columns at the left; the others are right-aligned.
    """
    lines = [[one_line(cell) for cell in row] for row in (header, *rows)]
    narrowest = 3 if markdown else 0  # for the line of dashes
    widths = [max(narrowest, *(cell_len(line[at]) for line in lines)) for at in range(len(header))]

    def padded(at: int, cell: str) -> str:
        space = " " * (widths[at] - cell_len(cell))
        return cell + space if at < num_texts else space + cell

    cells = [[padded(at, cell) for at, cell in enumerate(line)] for line in lines]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in cells)
    dashes = [":" + "-" * (width - 1) if at < num_texts else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [cells[0], dashes, *cells[1:]])


@dataclass(frozen=True)
class Character:
    """One character, or one byte of a character that a patch cuts.

    Attributes:
        start: byte offset in the text.
        text: the character; U+FFFD for a byte that is no character by itself.
        values: its bytes; None where only their number (one) is known.
        entropies: nats, one per byte; None if the patching mode needs none.
    """

    start: int
    text: str
    values: bytes | None
    entropies: Sequence[float] | None

    @property
    def num_bytes(self) -> int:
        return 1 if self.values is None else len(self.values)


def characters(patch: Patch) -> list[Character]:
    """The characters of a patch, in order; each byte of the patch belongs to exactly one."""
    encoded = [None if c == LOST else c.encode("utf-8", "surrogateescape") for c in patch.text]
    num_lost = patch.end - patch.start - sum(len(values) for values in encoded if values is not None)
    shares = _share_lost_bytes(num_lost, encoded.count(None))
    found, offset = [], 0
    for text, values in zip(patch.text, encoded, strict=True):
        for _ in range(shares.pop(0) if values is None else 1):
            length = 1 if values is None else len(values)
            entropies = None if patch.entropies is None else patch.entropies[offset : offset + length]
            found.append(Character(patch.start + offset, text, values, entropies))
            offset += length
    return found


def _share_lost_bytes(num_bytes: int, num_marks: int) -> list[int]:
    """The number of bytes of each U+FFFD of a patch: one, except at the end, where up to three share one."""
    shares = [1] * num_marks
    excess = num_bytes - num_marks
    for mark in reversed(range(num_marks)):
        more = min(2, max(0, excess))
        shares[mark] += more
        excess -= more
    return shares


def visible(character: str) -> str:
    """The character in visible form: characters that are invisible or control a terminal are shown by a name.

    A space stays a space, and a line feed becomes an arrow without a line break; the caller handles both.
    """
    code, category = ord(character), unicodedata.category(character)
    if character in SHOWN:
        return SHOWN[character]
    if code < 0x20:
        return chr(0x2400 + code)
    if category in ("Mn", "Me") and not 0xFE00 <= code <= 0xFE0F:
        return "◌" + character
    return f"<U+{code:04X}>" if category[0] in "CZ" or category in ("Mn", "Me") else character


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
        for line in _lines(self._cells(coloured, levels, highest, options), options.max_width):
            for style, cells in groupby(line, key=attrgetter("style")):
                yield Segment("".join(cell.text for cell in cells), style)
            yield Segment.line()
            if highest is not None:
                yield Segment("".join(cell.bars for cell in line).rstrip() + "\n")

    def _highest_entropy(self) -> float | None:
        """The top of the scale in nats; None if no entropies are shown."""
        if not self.show_entropies:
            return None
        known = [finite(entropy) for patch in self.patches for entropy in patch.entropies or ()]
        return max((entropy for entropy in known if entropy is not None), default=None)

    def _header(self, levels: str, highest: float | None, encoding: str) -> Iterator[Segment]:
        num_patches = len(self.patches)
        counts = f"{num_patches} {'patch' if num_patches == 1 else 'patches'}"
        if num_patches:
            num_bytes = sum(patch.end - patch.start for patch in self.patches)
            counts += f" over {num_bytes} bytes, {num_bytes / num_patches:.2f} bytes per patch on average"
        yield Segment(_encodable("".join(map(visible, self.name)), encoding), Style(bold=True))
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
                text, bars = visible(character.text), ""
                if text == mark and not coloured:
                    text = f"<U+{ord(mark):04X}>"
                text = _encodable(text, options.encoding)
                if highest is not None:
                    bars = "".join(_bar(entropy, highest, levels) for entropy in character.entropies or ())
                    width = max(cell_len(text), character.num_bytes)
                    text, bars = text + " " * (width - cell_len(text)), bars.ljust(width)
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
        if line and (line[-1].ends_line or used + columns > width):
            yield line
            line, used = [], 0
        line.append(cell)
        used += columns
    if line:
        yield line


def _encodable(text: str, encoding: str) -> str:
    """The text with escapes for characters that the terminal's encoding lacks."""
    return text.encode(encoding, "backslashreplace").decode(encoding)
