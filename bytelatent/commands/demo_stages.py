"""Stages of the demo beside training: collecting text, and measuring on held-out text within a share of the time."""

import hashlib
import json
import lzma
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from bytelatent.blt import BLT
from bytelatent.commands.options import DemoSettings
from bytelatent.device import Threads
from bytelatent.errors import UserError
from bytelatent.evaluation import PackedModel, Texts
from bytelatent.files import whole_file
from bytelatent.model.loss import bits_per_byte
from bytelatent.patching import Patch
from bytelatent.progress import Progress
from bytelatent.text import BadRows, find_files, read_documents
from bytelatent.text.documents import must_have_read

HELD_OUT_ONE_IN = 16  # documents, chosen by a hash of their names
CHUNK = 8192  # bytes; longer documents are split, so that the held-out text is not from a few of them only
LEAST_TEXT = 100_000  # bytes of training text
# Not installed everywhere, of other packages, or (encodings) tables of characters rather than text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}

BATCH_BYTES = 2048
PROMPTS = ("def read(self, ", "The history of ", "import ")
SAMPLE_BYTES = 200
LEAST_SHARE = 0.05  # of the minutes: the least time for each part, even when all time is up
XZ_PRESET = 9 | lzma.PRESET_EXTREME
XZ_WINDOW = 64 * 2**20  # bytes, of xz -9
XZ_PART = 2**18  # bytes of training text compressed between checks of the time


@dataclass(frozen=True)
class DemoText:
    train: Path  # JSONL
    valid: Path
    train_bytes: int
    valid_bytes: int
    name: str  # in a few words


def collect(settings: DemoSettings, bad: BadRows) -> DemoText:
    """Write the text, Python's standard library or the user's own, as `text/train.jsonl` and `text/valid.jsonl`.

    Args:
        bad: counts bad rows and files.

    Raises:
        UserError: there is too little text.
    """
    documents = list(_standard_library() if settings.text is None else _own(settings, bad))
    name = "Python's standard library" if settings.text is None else f"'{settings.text}'"
    parts: dict[str, list[tuple[str, bytes]]] = {"train": [], "valid": []}
    held_out = _held_out([name for name, _ in documents])
    for document, text in documents:
        parts["valid" if document in held_out else "train"].extend(_chunks(document, text))
    train_bytes, valid_bytes = (sum(len(text) for _, text in rows) for rows in parts.values())
    if train_bytes < LEAST_TEXT or not valid_bytes:
        must_have_read(bad.unread)  # an error that names a file comes before one about too little text
        raise UserError(
            f"demo: {name} holds {train_bytes + valid_bytes:,} bytes, {valid_bytes:,} of them held out; "
            f"it takes {LEAST_TEXT:,} bytes at the least, in one file or many"
        )
    train, valid = (settings.out / "text" / f"{part}.jsonl" for part in parts)
    for path, rows in zip((train, valid), parts.values(), strict=True):
        with whole_file(path) as aside, aside.open("w", encoding="utf-8") as lines:
            for document, text in sorted(rows, key=lambda row: _hash(row[0])):  # any prefix is a fair sample
                row = {"id": document, "text": text.decode("utf-8", errors="surrogateescape")}
                lines.write(json.dumps(row) + "\n")
    return DemoText(train, valid, train_bytes, valid_bytes, name)


def _standard_library() -> Iterator[tuple[str, bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not LEFT_OUT & set(name.parts):
            yield str(name), file.read_bytes()
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"pydoc_data/{name}", text.encode("utf-8")


def _own(settings: DemoSettings, bad: BadRows) -> Iterator[tuple[str, bytes]]:
    """The user's documents; a few documents are split into chunks."""
    found: list[tuple[str, bytes]] = []
    how = {"bad_rows": bad, "stored": False, "max_row_bytes": settings.max_row_bytes}
    for file in find_files(str(settings.text)):
        documents = read_documents(file, settings.text_key, **how)
        found += [(f"{file}:{row}", document.text) for row, document in documents]
    for name, text in found:
        yield from _chunks(name, text) if len(found) < HELD_OUT_ONE_IN else [(name, text)]


def _chunks(name: str, text: bytes) -> Iterator[tuple[str, bytes]]:
    """Parts of at most `CHUNK` bytes, which end with a line if possible."""
    at = 0
    while at < len(text):
        line_end = text.rfind(b"\n", at + CHUNK // 2, at + CHUNK)
        end = line_end + 1 if line_end >= 0 else at + CHUNK
        yield f"{name}:{at}", text[at:end]
        at = end


def _held_out(names: list[str]) -> set[str]:
    """The names chosen by their hash; if there are too few names for that, those with the smallest hash."""
    chosen = {name for name in names if _hash(name) % HELD_OUT_ONE_IN == 0}
    return chosen or set(sorted(names, key=_hash)[: max(1, len(names) // HELD_OUT_ONE_IN)])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")


class Clock:
    """The time left of the minutes of the demo, which begin now."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self._began = time.monotonic()

    @property
    def passed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds; never less than a small share of all."""
        return 60 * max(self.minutes - self.passed / 60, LEAST_SHARE * self.minutes)


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


def measure(model: BLT, text: DemoText, max_bytes: int, seed: int, clock: Clock) -> DemoMeasurements:
    """Measure a BLT, its byte LM and xz on the same bytes.

    Args:
        text: the held-out text to measure, and the training text, a prefix for xz.
        max_bytes: of the held-out text.
        seed: of the continuations.
        clock: each part takes at most a share of the time left.
    """
    with Threads.of(model.device) as threads:
        with Progress("measuring the BLT", max_bytes, 0.5 * clock.left) as progress:
            blt, num_bytes = _evaluate(model, True, text.valid, max_bytes, progress, threads)
        with Progress("measuring the byte LM", num_bytes, 0.4 * clock.left) as progress:
            byte_lm, _ = _evaluate(model, False, text.valid, num_bytes, progress, threads)
        with Progress("finding patches", num_bytes, 0.4 * clock.left) as progress:
            patches = _patches(model, text.valid, num_bytes, progress)
        with Progress("writing", len(PROMPTS) * SAMPLE_BYTES, 0.5 * clock.left) as progress:
            samples = _continued(model, seed, progress)
    train, held_out = _read(text.train), _read(text.valid)[:num_bytes]
    with Progress("xz", len(train), clock.left) as progress:
        xz, how = xz_bits_per_byte(train, held_out, progress)
    bits = {"blt": blt, "byte_lm": byte_lm, "xz": xz}
    return DemoMeasurements(bits, num_bytes, how, patches, samples)


def _read(jsonl: Path) -> bytes:
    return b"".join(document.text for _, document in read_documents(str(jsonl)))


def _evaluate(
    model: BLT, is_blt: bool, text: Path, max_bytes: int, progress: Progress, threads: Threads
) -> tuple[float, int]:
    """Bits per byte of the BLT, whose batches count for the threads, or of the byte LM, and of how many bytes."""
    network = model.model if is_blt else model.entropy_model
    assert network is not None
    since = time.perf_counter()

    def done(num_bytes: int) -> None:
        nonlocal since
        before, since = since, time.perf_counter()
        if is_blt:
            threads.took(since - before)
        progress.advance(num_bytes)

    patcher = model.patcher if is_blt else None
    reader = PackedModel(model.source, network, model.device, model.context, batch_ids=BATCH_BYTES, patcher=patcher)
    samples = Texts([str(text)], max_bytes=max_bytes).read()
    costs = list(progress.within(reader.costs((sample.document for sample in samples), done)))
    num_bytes = sum(cost.num_bytes for cost in costs)
    return bits_per_byte(sum(cost.nats for cost in costs), num_bytes), num_bytes


def _patches(model: BLT, text: Path, max_bytes: int, progress: Progress) -> list[Patch]:
    """The patches of each document on its own, with positions from the start of the first one."""
    found: list[Patch] = []
    for _, document in progress.within(read_documents(str(text))):
        begin = progress.done
        part = document.text[: max_bytes - begin]
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


def xz_bits_per_byte(train: bytes, valid: bytes, progress: Progress) -> tuple[float, str]:
    """Bits per byte of `valid` under xz -9e, and how it was measured.

    xz takes no dictionary, but the training text before the held-out text acts as one: the training text is compressed
    with and without the held-out text after it, and the difference is the size of the held-out text. If both do not
    fit into its window, the held-out text is compressed alone.

    Args:
        progress: shows how much of the training text is compressed; once its time is up, the rest is left out.
    """
    if len(train) + len(valid) > XZ_WINDOW:
        alone = len(lzma.compress(valid, preset=XZ_PRESET))
        return 8 * alone / len(valid), "xz -9e alone: the training text is longer than its window"
    packers = [lzma.LZMACompressor(preset=XZ_PRESET) for _ in range(2)]  # without the held-out text, and with it
    sizes = [0, 0]
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        for at in progress.within(range(0, len(train), XZ_PART)):
            part = train[at : at + XZ_PART]
            sizes = [size + new for size, new in zip(sizes, pool.map(_pack, packers, (part, part)), strict=True)]
            progress.advance(len(part))
        ends = pool.map(lambda packer, text: _pack(packer, text) + len(packer.flush()), packers, (b"", valid))
        sizes = [size + end for size, end in zip(sizes, ends, strict=True)]
    prefix = "the training text" if progress.done == len(train) else f"{progress.done:,} bytes of the training text"
    return 8 * (sizes[1] - sizes[0]) / len(valid), f"xz -9e with {prefix} as a prefix"


def _pack(packer: lzma.LZMACompressor, text: bytes) -> int:
    return len(packer.compress(text))
