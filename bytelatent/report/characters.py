"""The characters of a patch, each with its bytes and their entropies.

A patch may begin or end inside a character. `Patch.text` shows such bytes as U+FFFD: one for each byte of a
character's end and one for all bytes of a character's beginning, so their values are lost but their number is known.
In text that is not valid UTF-8, the distribution of the lost bytes over the U+FFFD of a patch is a guess.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from bytelatent.patching import Patch

LOST = "\ufffd"


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
    pieces: list[tuple[str, bytes | None]] = []
    encoded = [None if c == LOST else c.encode("utf-8", "surrogateescape") for c in patch.text]
    num_lost = patch.end - patch.start - sum(len(values) for values in encoded if values is not None)
    shares = _share_lost_bytes(num_lost, encoded.count(None))
    for character, values in zip(patch.text, encoded, strict=True):
        if values is None:
            pieces.extend([(LOST, None)] * shares.pop(0))
        else:
            pieces.append((character, values))

    found, offset = [], 0
    for text, values in pieces:
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
    code = ord(character)
    if character == "\n":
        return "↵"
    if character == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if character in (" ", LOST):
        return character
    category = unicodedata.category(character)
    if category in ("Mn", "Me") and not 0xFE00 <= code <= 0xFE0F:
        return "◌" + character
    if category[0] in "CZ" or category in ("Mn", "Me"):
        return f"<U+{code:04X}>"
    return character
