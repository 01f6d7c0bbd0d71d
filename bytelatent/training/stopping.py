"""Signals that ask a run to stop: the first is a wish, a second an order."""

import os
import time
from contextlib import ExitStack, suppress
from typing import Self

from bytelatent.signals import NOT_SAVED, ONE_PRESS, handling, stop_signals
from bytelatent.training.distributed.ranks import Ranks

PARENT = os.getppid()
STOPPING = "stopping after this step; press again to quit without saving"


class StopSignals:
    """Turns the first Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 into a wish to stop after the step; a second quits at
    once.

    Called, it says whether there is such a wish; that torchrun was killed is one, too. In another thread than the main
    one it hears no signals.

    Raises:
        KeyboardInterrupt: at the second signal, where the run stands; and from the block, whatever became of it there.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.quits = False
        self._asked: float | None = None
        self._handlers = ExitStack()

    def __enter__(self) -> Self:
        self._handlers.enter_context(handling(dict.fromkeys(stop_signals(), self._hear)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handlers.close()
        if self.quits and kind is not None:  # torch.save makes an error of its own of the order to quit
            raise self.ranks.common_error(KeyboardInterrupt(NOT_SAVED)) from None

    def __call__(self) -> bool:
        if self.quits:  # something between has caught the order, and may have left a file half written
            raise KeyboardInterrupt(NOT_SAVED)
        return self._asked is not None or ("TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT)

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
