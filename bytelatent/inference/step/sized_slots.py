"""Slots for a number of sequences that changes: a step of few slots is faster, so there are sets of several sizes.

The smallest set that holds what is decoded is at work. When it is full the sequences move to the next larger one, and
back some steps after they would fit a smaller one.
"""

from collections.abc import Callable, Sequence

from bytelatent.inference.continuation import Drawn
from bytelatent.inference.engine import Admission
from bytelatent.inference.kv_cache import DecodeState
from bytelatent.inference.prefix_cache import Prefix
from bytelatent.inference.step.slots import CapturedSlots

GROWTH = 8  # slots of a set for each one of the next smaller set
PATIENCE = 64  # steps before sequences move to a smaller set


class SizedSlots:
    """Sets of slots, of which one is at work.

    Args:
        make: makes a set of a number of slots that shares the weights of another one.
        num_slots: of the largest set.
    """

    def __init__(self, make: Callable[[int, CapturedSlots | None], CapturedSlots], num_slots: int):
        sizes = [num_slots]
        while sizes[0] > 1:
            sizes.insert(0, -(-sizes[0] // GROWTH))
        self.sets: dict[int, CapturedSlots] = {}
        for size in sizes:
            self.sets[size] = make(size, next(iter(self.sets.values()), None))
        self.size = sizes[0]
        self._index: dict[int, int] = {}  # of each occupied slot in the set at work
        self._drawn: list[Drawn] = []
        self._patience = PATIENCE

    @property
    def at_work(self) -> CapturedSlots:
        return self.sets[self.size]

    def admit(self, state: DecodeState, admitted: Sequence[Admission]) -> None:
        for each in admitted:
            self._index.pop(each.slot, None)  # where admitting it with others has failed
        if (count := len(self._index) + len(admitted)) > self.size:
            self._move_to(self._size_for(count))
        unused = sorted(set(range(self.size)) - set(self._index.values()))
        moved = [each._replace(slot=index) for each, index in zip(admitted, unused, strict=False)]
        self._index |= {each.slot: there.slot for each, there in zip(admitted, moved, strict=True)}
        self.at_work.admit(state, moved)

    def release(self, slot: int) -> None:
        if slot in self._index:
            self.at_work.release(self._index.pop(slot))

    def advance(self) -> None:
        fitting = self._size_for(len(self._index))
        self._patience = PATIENCE if fitting == self.size else self._patience - 1
        if self._patience < 0:
            self._move_to(fitting)
        self.at_work.advance()

    def drawn(self) -> list[Drawn]:
        drawn, self._drawn = self._drawn, []
        return drawn + self.at_work.drawn()

    def newest(self, slot: int) -> Prefix | None:
        return self.at_work.newest(self._index[slot])

    def _size_for(self, count: int) -> int:
        return next(size for size in self.sets if size >= count)

    def _move_to(self, size: int) -> None:
        before, after = self.at_work, self.sets[size]
        self._drawn += before.finish()
        try:
            if self._index:
                after.take_over(range(len(self._index)), before, list(self._index.values()))
        except BaseException:
            after.clear()
            raise
        before.clear()
        self._index = {slot: index for index, slot in enumerate(self._index)}
        self.size, self._patience = size, PATIENCE
