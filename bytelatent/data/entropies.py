"""The byte LM run once over all text, its entropies (or patch starts) stored beside it.

A thread reads and packs, the device computes, and a thread writes; each a few batches ahead. What is written does
not depend on their timing, nor on how the files are divided among processes: a batch holds text of one file only.
"""

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from bytelatent.config import Settings
from bytelatent.data.packing import Piece, cut, pack
from bytelatent.data.settings import MOST
from bytelatent.data.shards import Shard, divide_shards, lock_shards, shards_of
from bytelatent.device import autocast, choose_dtype
from bytelatent.errors import UserError
from bytelatent.model import ByteLM, Stream
from bytelatent.patching import PatchSettings, next_starts
from bytelatent.text import MAX_ROW_BYTES, BadRows, Document, read_documents
from bytelatent.text.bad_rows import MAX_BAD_ROWS
from bytelatent.text.documents import id_of
from bytelatent.text.stored import MAX_TEXT_BYTES, Stored, StoredWriter, read_stored
from bytelatent.text.streams import is_remote

# Shapes: T ids in a batch

LOGGER = logging.getLogger(__name__)

QUEUED = 2  # batches that the reader is ahead of the device, and the device of the writer
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
        max_bad_rows: bad rows and files that are left out; one more is an error.
        max_row_bytes: a longer row is a bad one.
    """

    context: int = Field(default=8192, ge=2, le=MOST)
    batch_bytes: int = Field(default=131_072, ge=2, le=MOST)
    text_key: str = "text"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    patching: PatchSettings | None = None
    max_bad_rows: int = Field(default=MAX_BAD_ROWS, ge=0)
    max_row_bytes: int = Field(default=MAX_ROW_BYTES, ge=1, le=MAX_TEXT_BYTES)

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
        return self


@dataclass
class Summary:
    """What was done."""

    num_shards: int  # of this rank
    num_skipped: int  # of these, those that were there already
    num_documents: int = 0
    num_bytes: int = 0  # of text
    num_ids: int = 0  # that were read: bytes and one BOS a document
    sum_of_entropies: float = 0.0  # nats
    seconds: float = 0.0

    @property
    def mean_entropy(self) -> float | None:
        """Nats an id; None where nothing was left to do."""
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
    on_start: Callable[[int], None] = lambda input_bytes: None,
    on_progress: Callable[[int, int], None] = lambda input_bytes, text_bytes: None,
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
        on_start: called with the bytes of the files that are to be read.
        on_progress: called from another thread with the bytes of the files, and of the text in them, that were read
            since the last call.

    Raises:
        UserError: there are too many bad rows, `out` cannot be written or holds files that were made otherwise, the
            byte LM's entropies are not finite, or, once all else is done, nothing of a file could be read.
    """
    begin = time.monotonic()
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
        rule=settings.patching.plain() if settings.patching is not None else None,
    )
    if static_shapes is None:
        static_shapes = entropies_of is not None or device.type == "cuda"
    with lock_shards(out, shards):
        _remove_leftovers(out, shards)
        todo = [shard for shard in shards if not _is_done(shard, out / shard.output, _of(shard, made_by))]
        summary = Summary(num_shards=len(shards), num_skipped=len(shards) - len(todo))
        if summary.num_skipped:
            LOGGER.info(f"{summary.num_skipped} of {len(shards)} files are done already")
        on_start(sum(shard.size for shard in todo))
        bad_rows = BadRows(settings.max_bad_rows)
        size = settings.batch_bytes if static_shapes else None
        compute = entropies_of or _forward(byte_lm, device, dtype)
        loads = prefetched(_all_loads(todo, settings, size, bad_rows, device.type == "cuda"), QUEUED)
        with closing(loads), _ShardWriter(out, made_by, summary, bad_rows, on_progress) as writer:
            for shard, load in loads:
                result = None if load is None else _compute(load, settings.patching, device, compute)
                writer.put(shard, result)
    summary.seconds = time.monotonic() - begin
    bad_rows.must_have_read()
    return summary


@dataclass(frozen=True)
class Load:
    """A batch to read, and the documents that end in it: these have all their entropies after it."""

    stream: Stream
    num_ids: int  # before the padding
    documents: list[tuple[str, bytes]]  # id and text
    position: int  # bytes of the file that are read after it


@dataclass(frozen=True)
class Result:
    """What the device makes of a load, perhaps still being copied from it."""

    load: Load
    values: Tensor  # [T] float16 nats, or bool starts
    sum_of_entropies: Tensor  # nats, without padding
    arrived: torch.cuda.Event | None


@torch.no_grad()
def _compute(load: Load, patching: PatchSettings | None, device: torch.device, entropies_of: EntropiesOf) -> Result:
    stream = load.stream.to(device, non_blocking=True)
    entropies = entropies_of(stream).float()
    total = torch.where(stream.document >= 0, entropies, 0.0).sum()
    if patching is None:
        values = entropies.half()
    else:
        values = next_starts(stream.ids, entropies, stream.position, patching)
    if device.type != "cuda":
        return Result(load, values.cpu(), total.cpu(), None)
    with torch.cuda.device(device):
        values, total = _to_pinned(values), _to_pinned(total)
        arrived = torch.cuda.Event()
        arrived.record()
    return Result(load, values, total, arrived)


class _NothingRead(Exception):
    """Nothing of a file could be read, and so no file appears."""


class _ShardWriter:
    """Writes the results of one shard after the other, in a thread that is a few of them behind."""

    def __init__(
        self, out: Path, made_by: Stored, summary: Summary, bad_rows: BadRows, on_progress: Callable[[int, int], None]
    ):
        self.out, self.made_by, self.summary = out, made_by, summary
        self.bad_rows, self.on_progress = bad_rows, on_progress
        self._thread = ThreadPoolExecutor(1, "write")
        self._pending: deque[Future[None]] = deque()
        self._file: StoredWriter | None = None
        self._parts: list[np.ndarray] = []  # values of documents that have not ended yet
        self._position = 0  # bytes of the shard's file that `on_progress` has counted

    def put(self, shard: Shard, result: Result | None) -> None:
        """Write a result; None ends the shard.

        Raises:
            The first error of an earlier one.
        """
        while len(self._pending) >= QUEUED:
            self._pending.popleft().result()
        self._pending.append(self._thread.submit(self._write, shard, result))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            while self._pending and error is None:
                self._pending.popleft().result()
        except BaseException as failed:
            error = failed
            raise
        finally:
            self._thread.shutdown(cancel_futures=True)
            if error is not None:
                self._close(error)

    def _write(self, shard: Shard, result: Result | None) -> None:
        if self._file is None:
            self._file = StoredWriter(self.out / shard.output, _of(shard, self.made_by)).__enter__()
            self._parts, self._position = [], 0
        if result is not None:
            self._write_rows(self._file, result)
            return
        assert not any(map(len, self._parts))
        self._close(_NothingRead() if shard.source in self.bad_rows.unread else None)
        self.on_progress(shard.size - self._position, 0)

    def _write_rows(self, file: StoredWriter, result: Result) -> None:
        if result.arrived is not None:
            result.arrived.synchronize()
        load, summary = result.load, self.summary
        self._parts.append(result.values[: load.num_ids].numpy().copy())  # the pinned memory is free again
        if load.documents:
            values = np.concatenate(self._parts)
            at = 0
            for id_, text in load.documents:
                file.add(id_, text, values[at : at + len(text) + 1])
                at += len(text) + 1
            self._parts = [values[at:]]
        total = float(result.sum_of_entropies)
        if not math.isfinite(total):
            raise UserError(f"entropies: the byte LM's entropies are not finite in '{file.path.name}'; try another")
        num_bytes = sum(len(text) for _, text in load.documents)
        summary.num_documents += len(load.documents)
        summary.num_bytes += num_bytes
        summary.num_ids += load.num_ids
        summary.sum_of_entropies += total
        self.on_progress(load.position - self._position, num_bytes)
        self._position = load.position

    def _close(self, error: BaseException | None) -> None:
        """End the open file: it appears if there was no error."""
        file, self._file = self._file, None
        if file is not None:
            file.__exit__(None if error is None else type(error), error, None)


def prefetched(items: Iterator[Item], count: int) -> Generator[Item]:
    """The items, made by a thread that is at most `count` of them ahead."""
    thread, end = ThreadPoolExecutor(1, "read"), object()
    try:
        made: deque[Future[Any]] = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := made.popleft().result()) is not end:
            made.append(thread.submit(next, items, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


def _all_loads(
    shards: Sequence[Shard], settings: EntropySettings, size: int | None, bad_rows: BadRows, pinned: bool
) -> Iterator[tuple[Shard, Load | None]]:
    """The batches of all shards; None after the last one of each."""
    for shard in shards:
        for load in loads_of(shard, settings, size, bad_rows):
            yield shard, replace(load, stream=_pinned(load.stream)) if pinned else load
        yield shard, None


def loads_of(
    shard: Shard, settings: EntropySettings, size: int | None = None, bad_rows: BadRows | None = None
) -> Iterator[Load]:
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
        for piece in cut(Document(document.text), settings.context):
            if num_ids + len(piece) > settings.batch_bytes:
                yield Load(pack(pieces, size).stream, num_ids, ended, position)
                pieces, ended, num_ids = [], [], 0
            pieces.append(piece)
            num_ids += len(piece)
        ended.append((document.id if document.id is not None else id_of(f"{shard.name}/{row}"), document.text))
    if pieces:
        yield Load(pack(pieces, size).stream, num_ids, ended, position)


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


def _forward(byte_lm: ByteLM, device: torch.device, dtype: torch.dtype) -> EntropiesOf:
    def entropies_of(stream: Stream) -> Tensor:
        with autocast(device, dtype):
            return byte_lm.entropies(stream)

    return entropies_of


def _of(shard: Shard, made_by: Stored) -> Stored:
    return made_by.model_copy(update={"source_bytes": shard.size})


def _is_done(shard: Shard, output: Path, wanted: Stored) -> bool:
    """Whether a shard is done already.

    Raises:
        UserError: there is something else.
    """
    if not output.exists():
        return False
    found = read_stored(output)
    if found == wanted:
        if not is_remote(shard.source) and os.stat(shard.source).st_mtime_ns > os.stat(output).st_mtime_ns:
            raise UserError(
                f"entropies: '{shard.source}' has changed since '{output}' was written; remove that, "
                "or choose another --out"
            )
        return True
    if found is None:
        raise UserError(f"entropies: '{output}' was not written by blt entropies; choose another --out")
    differences = "; ".join(found.differences(wanted))
    raise UserError(
        f"entropies: '{output}' was made with other settings: {differences}; remove it to make it again, or "
        "choose another --out"
    )


def _remove_leftovers(out: Path, shards: Sequence[Shard]) -> None:
    """Remove what killed processes left of these shards; they are locked, so no process writes them now."""
    own = {out / shard.output for shard in shards}
    for part in out.rglob(".*.part"):
        output = part.with_name(part.name[1:].removesuffix(".part").rpartition(".")[0] or part.name)
        if output in own:
            part.unlink(missing_ok=True)


def _pinned(stream: Stream) -> Stream:
    return replace(stream, **{name: tensor.pin_memory() for name, tensor in stream.tensors.items()})


def _to_pinned(values: Tensor) -> Tensor:
    buffer = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return buffer.copy_(values, non_blocking=True)
