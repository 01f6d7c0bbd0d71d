"""A patch of a text, for people to look at."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Patch:
    """Bytes `start` to `end` (exclusive) of a text.

    Attributes:
        start, end: byte offsets in the text.
        text: those bytes as text; what is no UTF-8 (a patch may cut a character) shows as U+FFFD.
        entropies: nats, one a byte: how uncertain the byte LM was about the byte before it read it. None for rules
            that need no byte LM.
    """

    start: int
    end: int
    text: str
    entropies: Sequence[float] | None = None
