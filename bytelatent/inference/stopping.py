"""Texts that end an output, found as its bytes come."""

from collections import deque
from collections.abc import Sequence


class StopWatch:
    """Watches the bytes of one output for stop texts.

    A match begins and ends at any byte; characters and patches play no part. The first to be completed counts, and
    among those completed by the same byte the longest.

    Args:
        stops: texts to watch for; none may be empty.

    Source: Aho and Corasick 1975, with one step a byte whatever the number of texts.
    """

    def __init__(self, stops: Sequence[bytes]):
        assert all(stops), "an empty text would end every output before it begins"
        # A node stands for a beginning of some stop text; node 0 for none of it.
        self._next: list[dict[int, int]] = [{}]
        self._depth = [0]  # how long that beginning is
        self._longest = [0]  # the longest stop text that it ends with; 0: none
        for stop in stops:
            node = 0
            for byte in stop:
                if byte not in self._next[node]:
                    self._next[node][byte] = len(self._next)
                    self._next.append({})
                    self._depth.append(self._depth[node] + 1)
                    self._longest.append(0)
                node = self._next[node][byte]
            self._longest[node] = len(stop)
        self._fallback = [0] * len(self._next)  # the longest other beginning that this one ends with
        waiting = deque(self._next[0].values())
        while waiting:  # shorter beginnings first, since longer ones fall back on them
            node = waiting.popleft()
            self._longest[node] = self._longest[node] or self._longest[self._fallback[node]]
            for byte, after in self._next[node].items():
                self._fallback[after] = self._step(self._fallback[node], byte)
                waiting.append(after)
        self._node = 0
        self._num_bytes = 0

    def feed(self, byte: int) -> int | None:
        """Watch the output's next byte.

        Returns:
            How many bytes of output precede the stop text that this byte completes; None if it completes none.
        """
        self._num_bytes += 1
        self._node = self._step(self._node, byte)
        found = self._longest[self._node]
        return self._num_bytes - found if found else None

    def held_back(self) -> int:
        """How many of the newest bytes may turn out to begin a stop text, and should not be shown yet."""
        return self._depth[self._node]

    def _step(self, node: int, byte: int) -> int:
        """The longest beginning of a stop text with which the output ends once `byte` follows."""
        while node and byte not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(byte, 0)
