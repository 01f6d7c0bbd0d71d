"""Measurements of the demo on held-out text: bits per byte, patches, continuations; each within its share of time."""

import lzma
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from bytelatent.blt import BLT
from bytelatent.data import Patcher, SourceSettings, batches_once
from bytelatent.device import Threads
from bytelatent.evaluation import Evaluation, evaluate
from bytelatent.model import BLTModel, ByteLM
from bytelatent.patching import Patch
from bytelatent.progress import Progress
from bytelatent.text import read_documents

BATCH_BYTES = 2048
SHOWN_BYTES = 2_000  # of held-out text in the report
PROMPTS = ("def read(self, ", "The history of ", "import ")
SAMPLE_BYTES = 200
LEAST = 0.05  # of the minutes: the least time for each part, even when all time is up
XZ_PRESET = 9 | lzma.PRESET_EXTREME
XZ_WINDOW = 64 * 2**20  # bytes, of xz -9
XZ_PART = 2**18  # bytes of training text compressed between checks of the time


class Clock:
    """The time left of the minutes of the demo, which begin now."""

    def __init__(self, minutes: float):
        self._began = time.monotonic()
        self.minutes = minutes
        self._all = 60 * minutes

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds; never less than a small share of all."""
        return max(self._all - self.passed, LEAST * self._all)


@dataclass(frozen=True)
class DemoMeasurements:
    """
    Attributes:
        bits: per byte, of `blt`, `byte_lm` and `xz`.
        num_bytes: size of the beginning of the held-out text that was measured.
        xz: how xz was measured.
        patches: of the held-out text, document after document.
        samples: prompts and their continuations.
    """

    bits: dict[str, float]
    num_bytes: int
    xz: str
    patches: list[Patch]
    samples: list[tuple[str, str]]

    @property
    def shown(self) -> list[Patch]:
        """The first patches, for a page."""
        return [patch for patch in self.patches if patch.end <= SHOWN_BYTES]


def measure(model: BLT, train: Path, valid: Path, max_bytes: int, seed: int, clock: Clock) -> DemoMeasurements:
    """Measure a BLT, its byte LM and xz on the same bytes.

    Args:
        train: the training text, JSONL, as a prefix for xz.
        valid: the held-out text, JSONL.
        max_bytes: of the held-out text.
        seed: of the continuations.
        clock: each part takes at most a share of the time left.
    """
    assert model.entropy_model is not None
    with Threads.of(model.device) as threads:
        with Progress("measuring the BLT", max_bytes, 0.5 * clock.left) as progress:
            blt = _evaluate(model.model, valid, model.context, model.patcher, max_bytes, progress, threads)
        with Progress("measuring the byte LM", blt.num_bytes, 0.4 * clock.left) as progress:
            byte_lm = _evaluate(model.entropy_model, valid, model.context, None, blt.num_bytes, progress)
        with Progress("finding patches", blt.num_bytes, 0.4 * clock.left) as progress:
            patches = _patches(model, valid, blt.num_bytes, progress)
        with Progress("writing", len(PROMPTS) * SAMPLE_BYTES, 0.5 * clock.left) as progress:
            samples = _continued(model, seed, progress)
    packed, held_out = text_of(train), text_of(valid)[: blt.num_bytes]
    with Progress("xz", len(packed), clock.left) as progress:
        xz, how = xz_bits_per_byte(packed, held_out, progress)
    bits = {"blt": blt.bits_per_byte, "byte_lm": byte_lm.bits_per_byte, "xz": xz}
    return DemoMeasurements(bits, blt.num_bytes, how, patches, samples)


def text_of(jsonl: Path) -> bytes:
    return b"".join(document.text for _, document in read_documents(str(jsonl)))


def _evaluate(
    network: BLTModel | ByteLM,
    text: Path,
    context: int,
    patcher: Patcher | None,
    max_bytes: int,
    progress: Progress,
    threads: Threads | None = None,
) -> Evaluation:
    since = time.perf_counter()

    def done(num_bytes: int) -> None:
        nonlocal since
        now = time.perf_counter()
        if threads is not None:
            threads.took(now - since)
        since = now
        progress.advance(num_bytes)

    sources = [SourceSettings(path=str(text))]
    batches = batches_once(sources, context, BATCH_BYTES, patcher, max_bytes)
    return evaluate(network, progress.within(batches), done)


def _patches(model: BLT, text: Path, max_bytes: int, progress: Progress) -> list[Patch]:
    """The patches of each document on its own, with positions from the start of the first one."""
    found: list[Patch] = []
    documents = (document.text for _, document in read_documents(str(text)))
    for document in progress.within(documents):
        begin = progress.done
        part = document[: max_bytes - begin]
        found.extend(replace(it, start=it.start + begin, end=it.end + begin) for it in model.patch(part))
        progress.advance(len(part))
        if progress.done >= max_bytes:
            break
    return found


def _continued(model: BLT, seed: int, progress: Progress) -> list[tuple[str, str]]:
    """The prompts and their continuations, generated in turns, so that each gets its share of the time."""
    written = dict.fromkeys(PROMPTS, "")
    streams = [model.stream(prompt, SAMPLE_BYTES, temperature=0.7, seed=seed) for prompt in PROMPTS]
    for pieces in progress.within(zip_longest(*streams, fillvalue="")):
        for prompt, piece in zip(PROMPTS, pieces, strict=True):
            written[prompt] += piece
            progress.advance(len(piece.encode()))
    return list(written.items())


def xz_bits_per_byte(train: bytes, valid: bytes, progress: Progress | None = None) -> tuple[float, str]:
    """Bits per byte of `valid` under xz -9e, and how it was measured.

    xz takes no dictionary, but the training text before the held-out text acts as one: the training text is compressed
    with and without the held-out text after it, and the difference is the size of the held-out text. If both do not
    fit into its window, the held-out text is compressed alone.

    Args:
        progress: shows how much of the training text is compressed; once its time is up, the rest is left out.
    """
    progress = progress or Progress("xz")
    if len(train) + len(valid) > XZ_WINDOW:
        alone = len(lzma.compress(valid, preset=XZ_PRESET))
        return 8 * alone / len(valid), "xz -9e alone: the training text is longer than its window"
    both, alone = _XzSize(), _XzSize()
    packed = 0
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        for at in progress.within(range(0, len(train), XZ_PART)):
            part = train[at : at + XZ_PART]
            list(pool.map(lambda packing, part=part: packing.add(part), (both, alone)))
            packed += len(part)
            progress.advance(len(part))
        sizes = list(pool.map(_XzSize.end, (both, alone), (valid, b"")))
    what = "the training text" if packed == len(train) else f"{packed:,} bytes of the training text"
    return 8 * (sizes[0] - sizes[1]) / len(valid), f"xz -9e with {what} as a prefix"


class _XzSize:
    """The compressed size of text under xz."""

    def __init__(self) -> None:
        self._packing = lzma.LZMACompressor(preset=XZ_PRESET)
        self._size = 0

    def add(self, text: bytes) -> None:
        self._size += len(self._packing.compress(text))

    def end(self, text: bytes) -> int:
        """The size with `text` at the end."""
        self.add(text)
        return self._size + len(self._packing.flush())
