"""What a scheduler counts."""

from bisect import bisect_left
from dataclasses import dataclass, field

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Histogram:
    """Durations in seconds.

    Attributes:
        counts: of durations up to each of `BOUNDS_S`, and of longer ones; not cumulated.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    sum_s: float = 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += times
        self.sum_s += seconds * times

    def copy(self) -> "Histogram":
        return Histogram(list(self.counts), self.sum_s)


@dataclass(frozen=True)
class Statistics:
    """What a scheduler has done and has to do.

    Attributes:
        slots, busy: sequences that are decoded at once at most, and now.
        waiting: sequences that are not decoded yet; their prompts may be being read.
        places: sequences that may be decoded and wait at most.
        requests, refused: jobs accepted, and refused because the queue was full.
        ended: sequences by why they ended.
        bytes, patches: generated.
        prefill_bytes: of prompts, read.
        reused_bytes: of prompts, whose state was in the prefix cache.
        hits: prompts of which a part was.
        lookups: prompts that were looked for.
        cached_bytes: memory that the prefix cache takes.
        time_to_first_byte, between_bytes: from submitting to a sample's first byte, and from byte to byte.
    """

    slots: int
    busy: int
    waiting: int
    places: int
    requests: int
    refused: int
    ended: dict[str, int]
    bytes: int
    patches: int
    prefill_bytes: int
    reused_bytes: int
    hits: int
    lookups: int
    cached_bytes: int
    time_to_first_byte: Histogram
    between_bytes: Histogram
