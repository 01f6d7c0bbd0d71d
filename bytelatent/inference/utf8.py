"""Valid UTF-8 as an automaton, and whole characters out of bytes.

A state is what the character that has begun still needs; state 0 is between characters.

Source: The Unicode Standard, table 3-7: no overlong form, no surrogate, nothing above U+10FFFF.
"""

import torch
from torch import Tensor

# Shapes: S states of the automaton

Ranges = tuple[tuple[int, int], ...]  # the range of each byte that a character still needs, ends included

_ANY = (0x80, 0xBF)
_CHARACTERS: list[tuple[tuple[int, int], Ranges]] = [  # first byte, then the others
    ((0x00, 0x7F), ()),
    ((0xC2, 0xDF), (_ANY,)),
    ((0xE0, 0xE0), ((0xA0, 0xBF), _ANY)),
    ((0xE1, 0xEC), (_ANY, _ANY)),
    ((0xED, 0xED), ((0x80, 0x9F), _ANY)),
    ((0xEE, 0xEF), (_ANY, _ANY)),
    ((0xF0, 0xF0), ((0x90, 0xBF), _ANY, _ANY)),
    ((0xF1, 0xF3), (_ANY, _ANY, _ANY)),
    ((0xF4, 0xF4), ((0x80, 0x8F), _ANY, _ANY)),
]


def _states() -> list[Ranges]:
    """What may still follow, for each state; those that need fewer bytes first."""
    tails = {rest[begin:] for _, rest in _CHARACTERS for begin in range(len(rest) + 1)}
    return sorted(tails, key=lambda rest: (len(rest), rest))


def _transitions(states: list[Ranges]) -> Tensor:
    table = torch.full((len(states) + 1, 256), len(states), dtype=torch.int64)
    for (low, high), rest in _CHARACTERS:
        table[0, low : high + 1] = states.index(rest)
    for state, rest in enumerate(states[1:], start=1):
        (low, high), *after = rest
        table[state, low : high + 1] = states.index(tuple(after))
    return table


def _resumed(transitions: Tensor, error: int) -> Tensor:
    begin = torch.where(transitions[0] == error, 0, transitions[0])
    return torch.where(transitions == error, begin, transitions)


_STATES = _states()
ERROR = len(_STATES)  # the state after an invalid byte; it is never left
TRANSITIONS = _transitions(_STATES)  # [S, 256] the state after a byte, int64
NEEDED = torch.tensor([len(rest) for rest in _STATES] + [4])  # [S] bytes needed at least; of ERROR more than any
RESUMED = _resumed(TRANSITIONS, ERROR)  # [S, 256] the same, but invalid bytes are skipped, int64


def state_after(data: bytes) -> int:
    """The automaton's state after `data`; never ERROR.

    An invalid byte is skipped, along with the character it broke off; it may begin the next. So the state is that of
    the longest end of the data that can still become a character.
    """
    state = 0
    for byte in data[-3:]:  # no character needs more once three of its bytes are there
        state = int(RESUMED[state, byte])
    return state


def whole_characters(data: bytes) -> bytes:
    """`data` without a last character that has begun and may still become valid."""
    if state_after(data) == 0:
        return data
    return data[: max(index for index in range(max(len(data) - 3, 0), len(data)) if data[index] >= 0xC0)]


class CharacterStream:
    """Whole characters out of bytes that come a few at a time.

    What it gives, all put together, is `data.decode("utf-8", errors="replace")`. Only a character that has begun and
    can still become valid is withheld. (Python's incremental decoder also withholds the beginnings of surrogates.)
    """

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, data: bytes) -> str:
        data = self._begun + data
        whole = whole_characters(data)
        self._begun = data[len(whole) :]
        return whole.decode("utf-8", errors="replace")

    def finish(self) -> str:
        """U+FFFD for what is left of a broken character, once nothing more comes."""
        begun, self._begun = self._begun, b""
        return begun.decode("utf-8", errors="replace")
