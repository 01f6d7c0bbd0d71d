"""xz as the yardstick: what a good compressor makes of the same held-out bytes."""

import lzma
from concurrent.futures import ThreadPoolExecutor

from bytelatent.progress import Progress

PRESET = 9 | lzma.PRESET_EXTREME
DICTIONARY = 64 * 2**20  # bytes that xz -9 looks back
PART = 2**18  # bytes of training text packed at once, after which the clock is asked


def xz_bits_per_byte(train: bytes, valid: bytes, progress: Progress | None = None) -> tuple[float, str]:
    """Bits per byte of `valid` under xz -9e, and how it was measured.

    xz takes no dictionary, but what it has just packed is one: the training text is packed with and without the
    held-out text behind it, and the difference is what the held-out text costs. That works as long as both fit its
    window; otherwise the held-out text is packed alone.

    Args:
        progress: is shown how much of the training text is packed; where its time is up, the rest is left out.
    """
    progress = progress or Progress("xz")
    if len(train) + len(valid) > DICTIONARY:
        alone = len(lzma.compress(valid, preset=PRESET))
        return 8 * alone / len(valid), "xz -9e alone: the training text is longer than its window"
    both, alone = _Packed(), _Packed()
    packed = 0
    with ThreadPoolExecutor(2) as pool:  # lzma lets go of the interpreter's lock
        for at in progress.within(range(0, len(train), PART)):
            part = train[at : at + PART]
            list(pool.map(lambda packing, part=part: packing.add(part), (both, alone)))
            packed += len(part)
            progress.advance(len(part))
        sizes = list(pool.map(_Packed.end, (both, alone), (valid, b"")))
    what = "the training text" if packed == len(train) else f"{packed:,} bytes of the training text"
    return 8 * (sizes[0] - sizes[1]) / len(valid), f"xz -9e with {what} as a prefix"


class _Packed:
    """Counts the bytes that text takes under xz."""

    def __init__(self) -> None:
        self._packing = lzma.LZMACompressor(preset=PRESET)
        self._size = 0

    def add(self, text: bytes) -> None:
        self._size += len(self._packing.compress(text))

    def end(self, text: bytes) -> int:
        """The size of all, `text` at its end."""
        self.add(text)
        return self._size + len(self._packing.flush())
