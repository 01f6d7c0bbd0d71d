"""How many threads a CPU computes with.

The threads of an operation wait for one another. Where other programs take the cores, all of them wait for the one
that has none, and a single thread can be faster than all.
"""

import os
from collections import deque
from collections.abc import Sequence
from typing import Self

import torch

TRIAL = 3  # pieces of work that a number of threads is tried on
SHARE = 0.05  # of the time, about, goes into trials


class Threads:
    """Times pieces of work with one thread and with more, and keeps to what is fastest.

    The machine's other work comes and goes, so the others are tried again from time to time. The pieces have to be of
    about one size. When the block ends, torch has as many threads as before it.

    Args:
        counts: numbers of threads to choose from, the first to begin with; one alone leaves torch as it is.

    Attributes:
        count: the number in use.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts = counts
        self.count = counts[0]
        self._times: deque[float] = deque(maxlen=TRIAL)  # of the last pieces with the number that is kept to
        self._kept = 0  # its place in `counts`
        self._tried: int | None = None  # the place of the number on trial
        self._trial: list[float] = []
        self._until_trial = 0.0  # seconds of work
        self._turn = 0

    @classmethod
    def of(cls, device: torch.device, may_choose: bool = True) -> Self:
        """For work on a device: one thread, half of torch's, or all of them.

        Nothing is chosen where there is nothing to choose: on another device than the CPU, where OMP_NUM_THREADS has
        the say, or where the same bits have to come each time (`may_choose`).
        """
        most = torch.get_num_threads()
        if not may_choose or device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
            return cls([most])
        return cls(sorted({1, max(most // 2, 1), most}))

    def __enter__(self) -> Self:
        self._before = torch.get_num_threads()
        self._use(self._kept)
        return self

    def __exit__(self, *_: object) -> None:
        if torch.get_num_threads() != self._before:
            torch.set_num_threads(self._before)

    def took(self, seconds: float) -> None:
        """Count a piece of work, done with the present number of threads."""
        if len(self.counts) == 1:
            return
        if self._tried is None:
            self._times.append(seconds)
            self._until_trial -= seconds
            if len(self._times) == TRIAL and self._until_trial <= 0:
                self._try_another()
            return
        self._trial.append(seconds)
        usual = sum(self._times) / len(self._times)
        if len(self._trial) == TRIAL or seconds > 2 * usual:  # one piece that takes as long says enough
            if sum(self._trial) / len(self._trial) < usual:
                self._kept = self._tried
                self._times = deque(self._trial, maxlen=TRIAL)
            self._until_trial = sum(self._trial) / SHARE
            self._tried, self._trial = None, []
            self._use(self._kept)

    def _try_another(self) -> None:
        others = [place for place in range(len(self.counts)) if place != self._kept]
        self._tried = others[self._turn % len(others)]
        self._turn += 1
        self._use(self._tried)

    def _use(self, place: int) -> None:
        self.count = self.counts[place]
        if torch.get_num_threads() != self.count:
            torch.set_num_threads(self.count)
