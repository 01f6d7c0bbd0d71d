"""Signals that ask a run to stop: the first is a wish, a second an order."""

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Self

from bytelatent.training.ranks import Ranks

ONE_PRESS = 2.0  # seconds in which a second signal is the same one: a double press, or one that torchrun passes on
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # Windows has but the first two
STOPPING = "stopping after this step; press again to quit without saving"
NOT_SAVED = "without saving; the same command goes on from the last checkpoint, if there is one"


class StopSignals:
    """Turns the first Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2 into a wish to stop after the step; a second quits at once.

    Called, it says whether there is such a wish. In another thread than the main one it hears nothing.

    Raises:
        KeyboardInterrupt: at the second signal, where the run stands; and from the block, whatever became of it there.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.quits = False
        self._asked: float | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
            self._previous = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        if self.quits and kind is not None:  # torch.save makes an error of its own of the order to quit
            raise self.ranks.told(KeyboardInterrupt(NOT_SAVED)) from None

    def __call__(self) -> bool:
        if self.quits:  # something between has caught the order, and may have left a file half written
            raise KeyboardInterrupt(NOT_SAVED)
        return self._asked is not None

    def _hear(self, _number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
            if self.ranks.is_first:
                with suppress(OSError):  # written past Python's streams: the signal may have come while one was written
                    os.write(2, f"{STOPPING}\n".encode())
        elif now - self._asked > ONE_PRESS:
            self.quits = True
            raise KeyboardInterrupt(NOT_SAVED)
