"""xz as the yardstick: what a good compressor makes of the same held-out bytes."""

import lzma
from concurrent.futures import ThreadPoolExecutor

PRESET = 9 | lzma.PRESET_EXTREME
DICTIONARY = 64 * 2**20  # bytes that xz -9 looks back


def xz_bits_per_byte(train: bytes, valid: bytes) -> tuple[float, str]:
    """Bits per byte of `valid` under xz -9e, and how it was measured.

    xz takes no dictionary, but what it has just packed is one: the training text is packed with and without the
    held-out text behind it, and the difference is what the held-out text costs. That works as long as both fit its
    window; otherwise the held-out text is packed alone.
    """
    if len(train) + len(valid) <= DICTIONARY:
        with ThreadPoolExecutor(2) as pool:  # lzma lets go of the interpreter's lock
            both, alone = pool.map(_packed_size, [train + valid, train])
        return 8 * (both - alone) / len(valid), "xz -9e with the training text as a prefix"
    return 8 * _packed_size(valid) / len(valid), "xz -9e alone: the training text is longer than its window"


def _packed_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=PRESET))
