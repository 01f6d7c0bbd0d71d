"""The byte LM run once over all text, its entropies (or patch starts) stored beside it.

A thread reads and packs, a thread computes, each a few batches ahead of the next, and this one writes. What is written
does not depend on their timing, nor on how the files are divided among processes: a batch holds text of one file only.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from bytelatent.config import Settings
from bytelatent.data.packing import Piece, pack, split_document
from bytelatent.data.settings import MOST
from bytelatent.data.shards import Shard, divide_shards, is_done, lock_shards, remove_leftovers, shards_of
from bytelatent.device import autocast, choose_dtype
from bytelatent.errors import UserError
from bytelatent.model import ByteLM, Stream, lines_as_documents
from bytelatent.patching import PatchSettings, next_starts
from bytelatent.progress import Progress
from bytelatent.text import MAX_ROW_BYTES, BadRows, Document, read_documents
from bytelatent.text.documents import MAX_BAD_ROWS, forget_logged, id_of, must_have_read
from bytelatent.text.stored import MAX_TEXT_BYTES, Stored, StoredWriter, stored_writer
from bytelatent.text.streams import is_remote

# Shapes: T ids in a batch

LOGGER = logging.getLogger(__name__)

QUEUED = 2  # batches that the reading is ahead of the computing, and that of the writing
TEXT_PER_COMPRESSED_BYTE = 3.0  # a guess, for the progress bar alone

EntropiesOf = Callable[[Stream], Tensor]
Item = TypeVar("Item")


class EntropySettings(Settings):
    """How entropies are computed and what is stored of them.

    Attributes:
        context: ids that the byte LM reads at once; longer documents are cut.
        batch_bytes: ids in a batch.
        text_key: the key or column that holds the text.
        dtype: precision of the byte LM's matrix products; `auto` is bfloat16 where the device computes in it.
        patching: the patching settings whose starts are stored instead of entropies.
        reset_at_newline: reset the byte LM's context at each newline, as patching settings of this name want.
        max_bad_rows: bad rows and files that are left out; one more is an error.
        max_row_bytes: a longer row is a bad one.
    """

    context: int = Field(default=8192, ge=2, le=MOST)
    batch_bytes: int = Field(default=131_072, ge=2, le=MOST)
    text_key: str = "text"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    patching: PatchSettings | None = None
    reset_at_newline: bool = False
    max_bad_rows: int = Field(default=MAX_BAD_ROWS, ge=0)
    max_row_bytes: int = Field(default=MAX_ROW_BYTES, ge=1, le=MAX_TEXT_BYTES)

    @property
    def resets(self) -> bool:
        """Whether the context is reset at newlines."""
        return self.reset_at_newline or (self.patching is not None and self.patching.reset_at_newline)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.context > self.batch_bytes:
            raise ValueError(
                f"context ({self.context}) is more than batch_bytes ({self.batch_bytes}), the ids that are read at "
                "once; make batch_bytes larger or context smaller"
            )
        if self.patching is not None and not self.patching.needs_entropies:
            mode = self.patching.mode
            raise ValueError(f"patching mode '{mode}' needs no byte LM: patch with it in training, nothing is stored")
        if self.reset_at_newline and self.patching is not None:
            raise ValueError("reset_at_newline is one of the patching settings here; give it there")
        return self


@dataclass
class Summary:
    """What was done."""

    num_shards: int  # of this rank
    num_skipped: int  # of these, those that were there already
    num_documents: int = 0
    num_bytes: int = 0  # of text
    num_ids: int = 0  # that were read: bytes and one BOS per document
    sum_of_entropies: float = 0.0  # nats
    seconds: float = 0.0

    @property
    def mean_entropy(self) -> float | None:
        """Mean entropy in nats per id; None if there was nothing to do."""
        return self.sum_of_entropies / self.num_ids if self.num_ids else None


def store_entropies(
    byte_lm: ByteLM,
    fingerprint: str,
    sources: Sequence[str],
    out: str | Path,
    settings: EntropySettings,
    rank: int = 0,
    world_size: int = 1,
    entropies_of: EntropiesOf | None = None,
    static_shapes: bool | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write each file of the sources, with entropies or starts beside its text, as Parquet below `out`.

    Files that are there already are left as they are, so the same call resumes a job that was stopped.

    Args:
        byte_lm: on the device that computes.
        fingerprint: the byte LM's.
        sources: files, folders or globs.
        out: a folder on this machine.
        rank, world_size: this process's part of the files.
        entropies_of: the entropies of a stream, nats, float32 [T]; None for the byte LM's own forward pass.
        static_shapes: pad every stream to `batch_bytes`; None: on a GPU, or where `entropies_of` is given.
        progress: shows the bytes of the files that are read.

    Raises:
        UserError: there are too many bad rows, `out` cannot be written or holds files that were made otherwise, the
            byte LM's entropies are not finite, or, once all else is done, nothing of a file could be read.
    """
    begin = time.monotonic()
    forget_logged()
    if is_remote(str(out)):
        raise UserError(f"entropies: --out '{out}' must be a folder on this machine")
    out = Path(out).expanduser()
    device = next(byte_lm.parameters()).device
    dtype = choose_dtype(settings.dtype, device)
    shards = divide_shards(shards_of(sources, out), world_size)[rank]
    made_by = Stored(
        byte_lm=fingerprint,
        window=byte_lm.settings.window,
        context=settings.context,
        dtype=str(dtype).removeprefix("torch."),
        patching=settings.patching.plain() if settings.patching is not None else None,
        reset_at_newline=settings.resets,
    )
    if static_shapes is None:
        static_shapes = entropies_of is not None or device.type == "cuda"
    with lock_shards(out, shards):
        remove_leftovers(out, shards)
        todo = [shard for shard in shards if not is_done(shard, out, _of(made_by, shard))]
        summary = Summary(num_shards=len(shards), num_skipped=len(shards) - len(todo))
        if summary.num_skipped:
            LOGGER.info(f"{summary.num_skipped} of {len(shards)} files are done already")
        progress = progress or Progress("entropies", bar=False)
        progress.total = sum(shard.size for shard in todo)
        bad_rows = BadRows(settings.max_bad_rows)
        size = settings.batch_bytes if static_shapes else None
        compute = entropies_of or _forward(byte_lm, device, dtype)
        batches = prefetched(_all_batches(todo, settings, size, bad_rows, device.type == "cuda"), QUEUED)
        results = prefetched(_results(batches, settings, device, compute), QUEUED)
        with closing(batches), closing(results):
            for shard in todo:
                with suppress(_NothingRead), stored_writer(out / shard.output, _of(made_by, shard)) as file:
                    _write_shard(file, shard, results, summary, progress)
                    if shard.source in bad_rows.unread:
                        raise _NothingRead
    summary.seconds = time.monotonic() - begin
    must_have_read(bad_rows.unread)
    return summary


@dataclass(frozen=True)
class EntropyBatch:
    """A batch to read, and the documents that end in it: these have all their entropies after it."""

    stream: Stream
    num_ids: int  # before the padding
    documents: list[tuple[str, bytes]]  # id and text
    position: int  # bytes of the file that are read after it


@dataclass(frozen=True)
class EntropyResult:
    """Output for a batch, perhaps still being copied from the device."""

    batch: EntropyBatch
    values: Tensor  # [T] float16 nats, or bool starts
    sum_of_entropies: Tensor  # nats, without padding
    arrived: torch.cuda.Event | None


def _results(
    batches: Iterator[EntropyBatch | None],
    settings: EntropySettings,
    device: torch.device,
    entropies_of: EntropiesOf,
) -> Iterator[EntropyResult | None]:
    for batch in batches:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # each thread has one of its own
            result = None if batch is None else _compute(batch, settings, device, entropies_of)
        yield result


@torch.no_grad()
def _compute(
    batch: EntropyBatch, settings: EntropySettings, device: torch.device, entropies_of: EntropiesOf
) -> EntropyResult:
    stream, patching = batch.stream.to(device, non_blocking=True), settings.patching
    entropies = entropies_of(lines_as_documents(stream) if settings.resets else stream).float()
    total = torch.where(stream.document >= 0, entropies, 0.0).sum()
    if patching is None:
        values = entropies.half()
    else:
        values = next_starts(stream.ids, entropies, stream.position, patching)
    if device.type != "cuda":
        return EntropyResult(batch, values.cpu(), total.cpu(), None)
    values, total = _to_pinned(values), _to_pinned(total)
    arrived = torch.cuda.Event()
    arrived.record()
    return EntropyResult(batch, values, total, arrived)


class _NothingRead(Exception):
    """Nothing of a file could be read, and so no file appears."""


def _write_shard(
    file: StoredWriter,
    shard: Shard,
    results: Iterator[EntropyResult | None],
    summary: Summary,
    progress: Progress,
) -> None:
    """Write the results of a shard, after which comes None."""
    parts: list[np.ndarray] = []  # values of documents that have not ended yet
    position = 0  # bytes of the shard's file that `progress` has counted
    for result in iter(lambda: next(results), None):
        if result.arrived is not None:
            result.arrived.synchronize()
        batch, total = result.batch, float(result.sum_of_entropies)
        if not math.isfinite(total):
            raise UserError(f"entropies: the byte LM's entropies are not finite in '{shard.output}'; try another")
        parts.append(result.values[: batch.num_ids].numpy().copy())  # the pinned memory is free again
        if batch.documents:
            values, at = np.concatenate(parts), 0
            for id_, text in batch.documents:
                file.add(id_, text, values[at : at + len(text) + 1])
                at += len(text) + 1
            parts = [values[at:]]
        summary.num_documents += len(batch.documents)
        summary.num_bytes += sum(len(text) for _, text in batch.documents)
        summary.num_ids += batch.num_ids
        summary.sum_of_entropies += total
        progress.advance(batch.position - position)
        position = batch.position
    assert not any(map(len, parts))
    progress.advance(shard.size - position)


def prefetched(items: Iterator[Item], count: int) -> Generator[Item]:
    """The items, made by a thread that is at most `count` of them ahead."""
    thread, end = ThreadPoolExecutor(1, "ahead"), object()
    try:
        made: deque[Future[Any]] = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := made.popleft().result()) is not end:
            made.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def _all_batches(
    shards: Sequence[Shard], settings: EntropySettings, size: int | None, bad_rows: BadRows, pinned: bool
) -> Iterator[EntropyBatch | None]:
    """The batches of all shards; None after the last one of each."""
    for shard in shards:
        for batch in batches_of_shard(shard, settings, size, bad_rows):
            if pinned:
                batch = replace(batch, stream=batch.stream.pin_memory())
            yield batch
        yield None


def batches_of_shard(
    shard: Shard, settings: EntropySettings, size: int | None = None, bad_rows: BadRows | None = None
) -> Iterator[EntropyBatch]:
    """The batches of a shard, in order; a piece is never split over two.

    Args:
        size: T, filled up with padding; None for as many ids as there are.
        bad_rows: receives rows without text, which are left out; None to raise the first.

    Raises:
        UserError: the file cannot be read, or too many rows hold no text; the file and row are named.
    """
    pieces: list[Piece] = []
    ended: list[tuple[str, bytes]] = []
    num_ids = position = 0
    for row, document, position in _documents(shard, settings, bad_rows or BadRows(0)):
        if len(document.text) > MAX_TEXT_BYTES:
            raise UserError(
                f"entropies: '{shard.source}' row {row} is a document of {len(document.text)} bytes; "
                f"cut it into some of at most {MAX_TEXT_BYTES}"
            )
        for piece in split_document(Document(document.text), settings.context):
            if num_ids + len(piece) > settings.batch_bytes:
                yield EntropyBatch(pack(pieces, size).stream, num_ids, ended, position)
                pieces, ended, num_ids = [], [], 0
            pieces.append(piece)
            num_ids += len(piece)
        ended.append((document.id if document.id is not None else id_of(f"{shard.name}/{row}"), document.text))
    if pieces:
        yield EntropyBatch(pack(pieces, size).stream, num_ids, ended, position)


def _documents(shard: Shard, settings: EntropySettings, bad_rows: BadRows) -> Iterator[tuple[int, Document, int]]:
    """Row, document, and about how many bytes of the file are read with it."""
    share: float | None = None

    def on_block(of_file: float | None) -> None:
        nonlocal share
        share = of_file

    how = {"bad_rows": bad_rows, "stored": False, "max_row_bytes": settings.max_row_bytes, "on_block": on_block}
    text_bytes = 0
    for row, document in read_documents(shard.source, settings.text_key, **how):
        text_bytes += len(document.text)
        position = text_bytes / TEXT_PER_COMPRESSED_BYTE if share is None else shard.size * share
        yield row, document, min(shard.size, int(position))


def _of(made_by: Stored, shard: Shard) -> Stored:
    return made_by.model_copy(update={"source_bytes": shard.size})


def _forward(byte_lm: ByteLM, device: torch.device, dtype: torch.dtype) -> EntropiesOf:
    def entropies_of(stream: Stream) -> Tensor:
        with autocast(device, dtype):
            return byte_lm.entropies(stream)

    return entropies_of


def _to_pinned(values: Tensor) -> Tensor:
    buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return buffer.copy_(values, non_blocking=True)
