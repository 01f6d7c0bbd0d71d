"""A program: stores entropies again and again, each time killed after a random while, until it is left to end.

    python -m tests.data.killed_runs SOURCE OUT

Prints how often it was killed with a file half written.
"""

import random
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from bytelatent.data.entropies import EntropySettings, store_entropies
from bytelatent.model import Stream
from bytelatent.weights import fingerprint
from tests.model.tiny import tiny_byte_lm

SETTINGS = EntropySettings(context=16, batch_bytes=64, dtype="float32")


def store(source: str, out: Path, delay: float = 0.0) -> None:
    byte_lm = tiny_byte_lm(window=8)

    def slowly(stream: Stream) -> Tensor:
        time.sleep(delay)
        return byte_lm.entropies(stream)

    store_entropies(byte_lm, fingerprint(byte_lm), [source], out, SETTINGS, entropies_of=slowly)


def main(source: str, out: Path, times: int = 12) -> None:
    torch.set_num_threads(1)
    import pyarrow.parquet  # noqa: F401  (once, not in each child)

    draw = random.Random(0)
    num_halves = 0
    for number in range(times):
        child = get_context("fork").Process(target=store, args=(source, out, 0.004))
        child.start()
        if number % 3:  # else it may not have begun
            while child.is_alive() and not any(out.rglob(f"*.{child.pid}.part")):
                time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        num_halves += any(out.rglob("*.part"))
    store(source, out)
    print(num_halves)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
