"""The byte LM run once over all text, its entropies (or a rule's patch starts) stored beside it.

A thread reads and packs, the device computes, and a thread writes; a few batches are on the way. What is written does
not depend on their timing, nor on how the files are divided among processes: a batch holds text of one file only.
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from bytelatent.config import Settings
from bytelatent.data.channel import Channel
from bytelatent.data.packing import pack
from bytelatent.data.pieces import Piece, cut
from bytelatent.data.settings import MOST
from bytelatent.data.shards import Shard, divide, hold, shards_of
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

ON_THE_WAY = 2  # batches between the reader and the device, and between the device and the writer
TEXT_PER_COMPRESSED_BYTE = 3.0  # a guess, for the progress bar alone

EntropiesOf = Callable[[Stream], Tensor]


class EntropySettings(Settings):
    """How entropies are computed and what is stored of them.

    Attributes:
        context: ids that the byte LM reads at once; longer documents are cut.
        batch_bytes: ids in a batch.
        text_key: the key or column that holds the text.
        dtype: precision of the byte LM's matrix products; `auto` is bfloat16 where the device computes in it.
        rule: the patching rule whose starts are stored instead of entropies.
        max_bad_rows: bad rows and files that are left out; one more is an error.
        max_row_bytes: a longer row is a bad one.
    """

    context: int = Field(default=8192, ge=2, le=MOST)
    batch_bytes: int = Field(default=131_072, ge=2, le=MOST)
    text_key: str = "text"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    rule: PatchSettings | None = None
    max_bad_rows: int = Field(default=MAX_BAD_ROWS, ge=0)
    max_row_bytes: int = Field(default=MAX_ROW_BYTES, ge=1, le=MAX_TEXT_BYTES)

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.context > self.batch_bytes:
            raise ValueError(
                f"context ({self.context}) is more than batch_bytes ({self.batch_bytes}), but a piece of so many ids "
                "is read at once; make batch_bytes larger or context smaller"
            )
        if self.rule is not None and not self.rule.needs_entropies:
            raise ValueError(f"rule '{self.rule.mode}' needs no byte LM: patch with it in training, nothing is stored")
        return self


@dataclass
class Summary:
    """What was done."""

    num_shards: int  # of this rank
    num_skipped: int  # of these, those that stood there already
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
    world: int = 1,
    entropies_of: EntropiesOf | None = None,
    static_shapes: bool | None = None,
    on_start: Callable[[int], None] = lambda input_bytes: None,
    on_progress: Callable[[int, int], None] = lambda input_bytes, text_bytes: None,
) -> Summary:
    """Write each file of the sources, with entropies or starts beside its text, as Parquet below `out`.

    Files that stand there already are left as they are, so a job that was stopped goes on from there.

    Args:
        byte_lm: on the device that computes.
        fingerprint: the byte LM's.
        sources: files, folders or globs.
        out: a folder on this machine.
        rank, world: the part of the files that is this process's.
        entropies_of: the entropies of a stream, nats, float32 [T]; None for the byte LM's own forward pass.
        static_shapes: pad every stream to `batch_bytes`; None: on a GPU, or where `entropies_of` is given.
        on_start: told how many bytes the files have that are to be read.
        on_progress: told how many bytes of the files, and of the text in them, are done since the last time.
            It is called from another thread.

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
    shards = divide(shards_of(sources, out), world)[rank]
    made_by = Stored(
        byte_lm=fingerprint,
        window=byte_lm.settings.window,
        context=settings.context,
        dtype=str(dtype).removeprefix("torch."),
        rule=settings.rule.plain() if settings.rule is not None else None,
    )
    if static_shapes is None:
        static_shapes = entropies_of is not None or device.type == "cuda"
    with hold(out, shards):
        _remove_leftovers(out, shards)
        todo = [shard for shard in shards if not _is_done(shard, out / shard.output, _of(shard, made_by))]
        summary = Summary(num_shards=len(shards), num_skipped=len(shards) - len(todo))
        if summary.num_skipped:
            LOGGER.info(f"{summary.num_skipped} of {len(shards)} files are done already")
        on_start(sum(shard.size for shard in todo))
        damaged = BadRows(settings.max_bad_rows)
        job = Job(todo, out, made_by, settings, device, summary, damaged, on_progress)
        job.run(entropies_of or _forward(byte_lm, device, dtype), static_shapes)
    summary.seconds = time.monotonic() - begin
    damaged.must_have_read()
    return summary


class _NothingRead(Exception):
    """Nothing of a file could be read."""


@dataclass(frozen=True)
class Load:
    """A batch to read, and the documents that end in it: these have all their entropies after it."""

    stream: Stream
    num_ids: int  # before the padding
    documents: list[tuple[str, bytes]]  # id and text
    position: int  # bytes of the file that are read after it


@dataclass(frozen=True)
class Result:
    """What the device makes of a load, perhaps still on its way to this side."""

    load: Load
    values: Tensor  # [T] float16 nats, or bool starts
    sum_of_entropies: Tensor  # nats, without padding
    arrived: torch.cuda.Event | None


class Job:
    """The shards that are to be written, and the three workers."""

    def __init__(
        self,
        shards: Sequence[Shard],
        out: Path,
        made_by: Stored,
        settings: EntropySettings,
        device: torch.device,
        summary: Summary,
        damaged: BadRows,
        on_progress: Callable[[int, int], None],
    ):
        self.shards, self.out, self.made_by, self.settings = shards, out, made_by, settings
        self.device, self.summary, self.damaged, self.on_progress = device, summary, damaged, on_progress
        # None ends a shard.
        self.loads: Channel[Load | None] = Channel(ON_THE_WAY)
        self.results: Channel[Result | None] = Channel(ON_THE_WAY)
        self.errors: list[BaseException] = []

    def run(self, entropies_of: EntropiesOf, static_shapes: bool) -> None:
        """Write all shards.

        Raises:
            The first error of any worker.
        """
        size = self.settings.batch_bytes if static_shapes else None
        threads = [
            Thread(target=self._guarded, args=(lambda: self._read(size),), daemon=True),
            Thread(target=self._guarded, args=(self._write,), daemon=True),
        ]
        for thread in threads:
            thread.start()
        self._guarded(lambda: self._compute(entropies_of))
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.errors.append(error)  # before the others break off, so that the cause comes first
            self.loads.break_off()
            self.results.break_off()

    def _read(self, size: int | None) -> None:
        for shard in self.shards:
            for load in loads_of(shard, self.settings, size, self.damaged):
                self.loads.put(replace(load, stream=_pinned(load.stream)) if self.device.type == "cuda" else load)
            self.loads.put(None)

    def _compute(self, entropies_of: EntropiesOf) -> None:
        for _ in self.shards:
            while (load := self.loads.get()) is not None:
                self.results.put(self._result(load, entropies_of))
            self.results.put(None)

    @torch.no_grad()
    def _result(self, load: Load, entropies_of: EntropiesOf) -> Result:
        stream = load.stream.to(self.device, non_blocking=True)
        entropies = entropies_of(stream).float()
        total = torch.where(stream.document >= 0, entropies, 0.0).sum()
        if self.settings.rule is None:
            values = entropies.half()
        else:
            values = next_starts(stream.ids, entropies, stream.position, self.settings.rule)
        if self.device.type != "cuda":
            return Result(load, values.cpu(), total.cpu(), None)
        with torch.cuda.device(self.device):
            values, total = _to_pinned(values), _to_pinned(total)
            arrived = torch.cuda.Event()
            arrived.record()
        return Result(load, values, total, arrived)

    def _write(self) -> None:
        for shard in self.shards:
            position = 0
            with suppress(_NothingRead), StoredWriter(self.out / shard.output, _of(shard, self.made_by)) as file:
                position = self._write_rows(file)
                if shard.source in self.damaged.unread:
                    raise _NothingRead  # and so no file appears
            self.on_progress(shard.size - position, 0)

    def _write_rows(self, file: StoredWriter) -> int:
        """Write one shard's rows; returns the progress in its file that was told of."""
        position = 0
        parts: list[np.ndarray] = []  # of documents that have not ended yet
        while (result := self.results.get()) is not None:
            if result.arrived is not None:
                result.arrived.synchronize()
            load, summary = result.load, self.summary
            parts.append(result.values[: load.num_ids].numpy().copy())  # the pinned memory is free again
            if load.documents:
                values = np.concatenate(parts)
                at = 0
                for id_, text in load.documents:
                    file.add(id_, text, values[at : at + len(text) + 1])
                    at += len(text) + 1
                parts = [values[at:]]
            total = float(result.sum_of_entropies)
            if not math.isfinite(total):
                raise UserError(f"entropies: the byte LM's entropies are not finite in '{file.path.name}'; try another")
            num_bytes = sum(len(text) for _, text in load.documents)
            summary.num_documents += len(load.documents)
            summary.num_bytes += num_bytes
            summary.num_ids += load.num_ids
            summary.sum_of_entropies += total
            self.on_progress(load.position - position, num_bytes)
            position = load.position
        assert not any(map(len, parts))
        return position


def loads_of(
    shard: Shard, settings: EntropySettings, size: int | None = None, damaged: BadRows | None = None
) -> Iterator[Load]:
    """The batches of a shard, in order; a piece is never split over two.

    Args:
        size: T, filled up with padding; None for as many ids as there are.
        damaged: is told of rows without text, which are left out; None to raise the first.

    Raises:
        UserError: the file cannot be read, or too many rows hold no text; the file and row are named.
    """
    pieces: list[Piece] = []
    ended: list[tuple[str, bytes]] = []
    num_ids = position = 0
    for row, document, position in _documents(shard, settings, damaged or BadRows(0)):
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


def _documents(shard: Shard, settings: EntropySettings, damaged: BadRows) -> Iterator[tuple[int, Document, int]]:
    """Row, document, and about how many bytes of the file are read with it."""
    share: float | None = None

    def on_block(of_file: float | None) -> None:
        nonlocal share
        share = of_file

    how = {"bad_rows": damaged, "stored": False, "max_row_bytes": settings.max_row_bytes, "on_block": on_block}
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
    """Whether a shard stands there already.

    Raises:
        UserError: what stands there is something else.
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
        f"entropies: '{output}' was made otherwise: {differences}; remove it to make it again, or choose another --out"
    )


def _remove_leftovers(out: Path, shards: Sequence[Shard]) -> None:
    """Remove what killed processes left of these shards; they are held, so no living one writes them."""
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
