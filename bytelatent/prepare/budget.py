"""How a number of gigabytes is shared out among the processes."""

import math
import os
from dataclasses import dataclass

from bytelatent.errors import UserError
from bytelatent.prepare.settings import GB

MB = 1_000_000
WORKING_BYTES = 24 * MB  # of a worker beside its run or range: blocks read, slices written, what Arrow keeps
MIN_RUN_BYTES = 20 * MB  # a block of the shortest lines takes 18
MAX_RUN_BYTES = 1 << 30
MAX_RANGE_BYTES = 1 << 28  # more is not faster
BINS_IN_RANGE = 16
MAX_BITS = 17


@dataclass(frozen=True)
class Budget:
    """
    Args:
        workers: processes beside the first.
        run_bytes: a worker has for a sorted run, or for a range of bins, with the index.
    """

    workers: int
    run_bytes: int

    @property
    def range_bytes(self) -> int:
        return min(self.run_bytes, MAX_RANGE_BYTES)

    def bits(self, likely_bytes: int) -> int:
        """Bits of a key that name a bin, so that a range has several bins to be cut at."""
        bins = likely_bytes * BINS_IN_RANGE / self.range_bytes
        return min(max(math.ceil(math.log2(max(bins, 1))), 4), MAX_BITS)


def share_out(memory: float, workers: int | None, own_bytes: int | None = None) -> Budget:
    """The memory for each worker.

    Args:
        memory: GB for all processes.
        workers: how many; if nobody says, the number of cores, or fewer where the memory is little.
        own_bytes: that a process has before it does anything; measured if left out.

    Raises:
        UserError: it is too little.
    """
    own = memory_of_this_process() if own_bytes is None else own_bytes
    for count in [workers] if workers else range(os.cpu_count() or 1, 0, -1):
        left = (memory * GB - own * (count + 1)) / count - WORKING_BYTES
        if left >= MIN_RUN_BYTES:
            return Budget(count, int(min(left, MAX_RUN_BYTES)))
    least = ((workers or 1) * (own + WORKING_BYTES + MIN_RUN_BYTES) + own) / GB
    fewer = ", or fewer --workers" if (workers or 1) > 1 else ""
    raise UserError(f"--memory: {memory:g} GB are too little; the least is {math.ceil(least * 100) / 100:.2f}{fewer}")


def memory_of_this_process() -> int:
    """Bytes resident now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 120 * MB  # no Linux
