"""A queue between two threads that ends when either of them fails."""

from collections import deque
from threading import Condition
from typing import Generic, TypeVar

Item = TypeVar("Item")


class BrokenOff(Exception):
    """Another worker met an error."""


class Channel(Generic[Item]):
    """A queue of bounded length from one thread to another."""

    def __init__(self, size: int):
        self.size = size
        self._items: deque[Item] = deque()
        self._changed = Condition()
        self._broken = False

    def put(self, item: Item) -> None:
        """Append an item, once there is room.

        Raises:
            BrokenOff: another worker met an error.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._broken or len(self._items) < self.size)
            if self._broken:
                raise BrokenOff
            self._items.append(item)
            self._changed.notify_all()

    def get(self) -> Item:
        """The oldest item, once there is one.

        Raises:
            BrokenOff: another worker met an error.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._broken or self._items)
            if self._broken:
                raise BrokenOff
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def break_off(self) -> None:
        """Let both sides end."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()
