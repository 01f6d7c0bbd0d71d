"""What the demo's models make of held-out text: bits per byte, patches, continuations. Each part ends with its time."""

import time
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from bytelatent.blt import BLT
from bytelatent.commands.demo.xz import xz_bits_per_byte
from bytelatent.data import Patcher, SourceSettings, batches_once
from bytelatent.evaluation import Evaluation, evaluate
from bytelatent.log import Console
from bytelatent.model import BLTModel, ByteLM
from bytelatent.patching import Patch
from bytelatent.progress import Progress
from bytelatent.text import read_documents
from bytelatent.threads import Threads

BATCH_BYTES = 2048
SHOWN_BYTES = 2_000  # of held-out text in the report
PROMPTS = ("def read(self, ", "The history of ", "import ")
SAMPLE_BYTES = 200
LEAST = 0.05  # of the minutes: what each next part has at least, however late it is


class Clock:
    """What is left of the minutes that the demo may take.

    Args:
        minutes: from now on.
    """

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
        """Seconds, some even when all of them are over."""
        return max(self._all - self.passed, LEAST * self._all)


@dataclass(frozen=True)
class Measured:
    """
    Attributes:
        bits: per byte, of `blt`, `byte_lm` and `xz`.
        num_bytes: held-out text that they were measured on, from its start.
        xz: how xz was measured.
        patches: of the held-out text, documents one after another.
        samples: prompts and what the BLT wrote after them.
    """

    bits: dict[str, float]
    num_bytes: int
    xz: str
    patches: list[Patch]
    samples: list[tuple[str, str]]

    @property
    def shown(self) -> list[Patch]:
        """The patches of the first bytes, as many as a page should show."""
        return [patch for patch in self.patches if patch.end <= SHOWN_BYTES]


def measure(
    model: BLT, train: Path, valid: Path, max_bytes: int, seed: int, clock: Clock, console: Console
) -> Measured:
    """Measure a BLT, its byte LM and xz on the same bytes.

    Args:
        train: the training text, JSONL, that xz has read before.
        valid: the held-out text, JSONL.
        max_bytes: of the held-out text.
        seed: of the continuations.
        clock: each part takes at most a share of what is left on it.
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
    return Measured(bits, blt.num_bytes, how, patches, samples)


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
    """The patches of the documents, each cut by itself as the model reads it, counted through from the first byte."""
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
    """The prompts and what comes after them, written in turn, so that each has its share of the time."""
    written = dict.fromkeys(PROMPTS, "")
    streams = [model.stream(prompt, SAMPLE_BYTES, temperature=0.7, seed=seed) for prompt in PROMPTS]
    for pieces in progress.within(zip_longest(*streams, fillvalue="")):
        for prompt, piece in zip(PROMPTS, pieces, strict=True):
            written[prompt] += piece
            progress.advance(len(piece.encode()))
    return list(written.items())
