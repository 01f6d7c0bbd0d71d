"""What texts cost models of any kind, on the same bytes, so that the numbers compare.

A document is read from its start (BOS) and pays for each of its ids and for its end (EOS). One that is longer than the
context is read in windows: each reads `overlap` ids that were counted before and counts only the new ones. Windows
of many documents are packed into a batch, which is patched and packed while the device computes the one before it.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.data import Batch, Patcher, Piece, pack
from bytelatent.data.entropies import prefetched
from bytelatent.device import is_out_of_memory
from bytelatent.errors import UserError
from bytelatent.model.loss import IGNORED
from bytelatent.text import Document
from bytelatent.vocab import BYTES, OFFSET, Vocabulary

# Shapes: T ids of a batch, B windows, N ids of a window, V vocabulary

AHEAD = 2  # batches that are made while the device computes
POOL = 16  # batches among which windows of about the same length are sought, where they are padded

Unit = Literal["patch", "token"]


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@dataclass
class Cost:
    """What a document costs, complete once no window is left."""

    num_bytes: int
    num_units: int = 0  # patches or tokens
    nats: float = 0.0
    num_windows: int = 0  # still to come
    is_known: bool = False  # from before: it is not computed again


@dataclass(frozen=True)
class Window:
    """Ids that are read at once, of which those that `first` and later ones predict are counted."""

    cost: Cost
    piece: Piece
    first: int
    num_bytes: int  # that are counted, for the progress


def windows_of(whole: Piece, context: int, overlap: int, cost: Cost) -> list[Window]:
    """A document's windows of at most `context` ids to read."""
    found, at = [], 0
    while at < len(whole):
        begin = max(at - overlap, 0)
        piece = whole.split(begin)[1] if begin else whole
        piece = piece.split(context)[0] if len(piece) > context else piece
        if overlap and len(whole) > context:  # what was stored belongs to other windows
            piece = Piece(piece.ids)
        end = begin + len(piece)
        num_bytes = cost.num_bytes * end // len(whole) - cost.num_bytes * at // len(whole)
        found.append(Window(cost, piece, at - begin, num_bytes))
        at = end
    cost.num_windows = len(found)
    return found


class TextModel:
    """A model that says how likely texts are.

    Args:
        name: for tables and messages.
        device: computes.
        context: ids it reads at once.
        overlap: ids that a window reads again, fewer than `context`.
        batch_ids: ids of a batch; one window at least.

    Attributes:
        unit: what its ids are cut or grouped into.
    """

    unit: Unit | None = None

    def __init__(self, name: str, device: torch.device, context: int, overlap: int = 0, batch_ids: int | None = None):
        self.name, self.device, self.context, self.overlap = name, device, context, overlap
        self.batch_ids = max(batch_ids or 0, context)

    @property
    def remarks(self) -> list[str]:
        """How its numbers differ from those of other models, in a line each."""
        return []

    def costs(
        self, documents: Iterable[Document], on_batch: Callable[[int], None] = lambda n: None, known: int = 0
    ) -> Iterator[Cost]:
        """What each document costs, in order.

        Args:
            on_batch: called with the number of bytes of each finished batch.
            known: documents at the beginning whose costs are known, and which are not computed unless they share a
                batch with others: batches are the same ones whatever is known. Their costs are not complete.
        """
        waiting: deque[Cost] = deque()
        batches = self._batches(self._windows(documents, waiting, known))
        made = prefetched(batches, AHEAD) if self.device.type == "cuda" else (batch for batch in batches)
        with closing(made):
            num_skipped = 0  # bytes of batches that are known, which would mislead who measures times
            while True:
                batch = next(made, None)
                if batch is not None:
                    windows, prepared = batch
                    measured = [0.0] * len(windows) if prepared is None else self._measured(prepared)
                    for window, nats in zip(windows, measured, strict=True):
                        window.cost.nats += nats
                        window.cost.num_windows -= 1
                    num_bytes = num_skipped + sum(window.num_bytes for window in windows)
                    num_skipped = num_bytes if prepared is None else 0
                    if prepared is not None:
                        on_batch(num_bytes)
                while waiting and waiting[0].num_windows == 0:
                    yield waiting.popleft()
                if batch is None:
                    return

    def begin(self, document: Document, cost: Cost) -> Piece:
        """A document's ids, with the one before its first and the one that ends it.

        Adds to the cost what is known before the model reads.
        """
        raise NotImplementedError

    def groups(self, windows: Iterator[Window]) -> Iterator[list[Window]]:
        """Windows that are read together."""
        group: list[Window] = []
        size = 0
        for window in windows:
            if group and size + len(window.piece) > self.batch_ids:
                yield group
                group, size = [], 0
            group.append(window)
            size += len(window.piece)
        if group:
            yield group

    def prepare(self, windows: list[Window]) -> Any:
        """What `nats` takes; runs beside it on a GPU."""
        raise NotImplementedError

    def nats(self, prepared: Any) -> Tensor:
        """What each window's counted ids cost, [B], nats."""
        raise NotImplementedError

    def _windows(self, documents: Iterable[Document], waiting: deque[Cost], known: int) -> Iterator[Window]:
        for number, document in enumerate(documents):
            cost = Cost(len(document.text), is_known=number < known)
            whole = self.begin(document, cost)
            found = windows_of(whole, self.context, self.overlap, cost) if len(whole.ids) > 1 else []
            waiting.append(cost)
            yield from found

    def _batches(self, windows: Iterator[Window]) -> Iterator[tuple[list[Window], Any]]:
        for group in self.groups(windows):
            if all(window.cost.is_known for window in group):
                yield group, None
                continue
            with torch.no_grad(), self._explained():
                prepared = self.prepare(group)
            yield group, prepared

    def _measured(self, prepared: Any) -> list[float]:
        with torch.no_grad(), self._explained():
            return self.nats(prepared).tolist()

    def _explained(self) -> Any:
        return _OutOfMemory(self)


class _OutOfMemory:
    def __init__(self, model: TextModel):
        self.model = model

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and is_out_of_memory(error):
            model = self.model
            raise UserError(
                f"eval: memory does not hold batches of {model.batch_ids:,} ids of '{model.name}'; lower --batch-size"
                + (", or --context" if model.batch_ids == model.context else "")
            ) from None


class PackedModel(TextModel):
    """A model of this package, which reads packed streams.

    Args:
        network: logits float32 [T, V] of a stream.
        patcher: finds its patches, if it has any.
        vocabulary: of its ids.
        size_multiple: streams are padded to a multiple of it.
        end: whether documents pay for their ends.
    """

    def __init__(
        self,
        name: str,
        network: Callable[..., Tensor],
        device: torch.device,
        context: int,
        overlap: int = 0,
        batch_ids: int | None = None,
        patcher: Patcher | None = None,
        vocabulary: Vocabulary = BYTES,
        size_multiple: int = 1,
        end: bool = True,
    ):
        super().__init__(name, device, context, overlap, batch_ids)
        self.network, self.patcher = network, patcher
        self.vocabulary, self.size_multiple, self.end = vocabulary, size_multiple, end
        self.unit = "patch" if patcher is not None else "token" if vocabulary.is_tokens else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the weights of what finds patches are there

    def begin(self, document: Document, cost: Cost) -> Piece:
        ids = self.vocabulary.encode(document.text, eos=self.end).astype(self.vocabulary.dtype)
        cost.num_units = len(ids) - 1 - self.end if self.vocabulary.is_tokens else 0
        return Piece(ids, document.entropies, document.starts)

    def prepare(self, windows: list[Window]) -> Batch:
        pieces = [window.piece for window in windows]
        if self.patcher is not None:
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                pieces = self.patcher(pieces)
            for window, piece in zip(windows, pieces, strict=True):
                window.cost.num_units += _num_patches(piece, window.first)
        size = sum(map(len, pieces))
        batch = pack(pieces, size + -size % self.size_multiple, vocabulary=self.vocabulary)
        at = 0
        for window, piece in zip(windows, pieces, strict=True):
            batch.targets[at : at + window.first] = IGNORED
            at += len(piece)
        return batch if self._stream is None else batch.pin_memory()

    def nats(self, prepared: Batch) -> Tensor:
        batch = prepared.to(self.device)
        each_T = F.cross_entropy(self.network(batch.stream), batch.targets, ignore_index=IGNORED, reduction="none")
        found = each_T.new_zeros(batch.stream.num_documents or 0, dtype=_precise(self.device))
        return found.index_add_(0, batch.stream.document.clamp(min=0), each_T.to(found.dtype))  # padding costs nothing


class TransformersModel(TextModel):
    """A causal language model of Hugging Face transformers, on the ids of its tokenizer.

    Args:
        network: as `AutoModelForCausalLM` gives it.
        encode, decode: from a text to ids without special ones, and back.
        start: the id that comes before a text; None: its first id costs as much as one of all that there are.
        end: the id that ends a text, which pays for it; None: the end costs nothing.
    """

    unit = "token"

    def __init__(
        self,
        name: str,
        network: Any,
        encode: Callable[[str], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        start: int | None,
        end: int | None,
        device: torch.device,
        context: int,
        overlap: int = 0,
        batch_ids: int | None = None,
    ):
        super().__init__(name, device, context, overlap, batch_ids)
        self.network, self.encode, self.decode, self.start, self.end = network, encode, decode, start, end
        self.num_changed = 0  # documents that the tokenizer does not give back
        self.vocab_size = int(network.config.get_text_config().vocab_size)

    @property
    def remarks(self) -> list[str]:
        found = []
        if self.start is None:
            found.append(f"{self.name} has neither BOS nor EOS: a document's first token costs it as much as any other")
        if self.end is None:
            found.append(f"{self.name} has no EOS: the ends of documents cost it nothing")
        if self.num_changed:
            amount = counted(self.num_changed, "document")
            found.append(f"{self.name}: its tokenizer loses a part of {amount}, which is free")
        return found

    def begin(self, document: Document, cost: Cost) -> Piece:
        text = document.text.decode("utf-8")
        ids = self.encode(text)
        self.num_changed += self.decode(ids).lstrip(" ") != text.lstrip(" ")  # some add a space before a text
        cost.num_units = len(ids)
        if self.start is None and ids:
            cost.nats += math.log(self.vocab_size)
        special = [[] if each is None else [each] for each in (self.start, self.end)]
        return Piece(np.array([*special[0], *ids, *special[1]], dtype=np.int64))

    def groups(self, windows: Iterator[Window]) -> Iterator[list[Window]]:
        """Of about the same length, so that there is little padding."""
        for pool in _pools(windows, POOL * self.batch_ids):
            pool.sort(key=lambda window: -len(window.piece))
            while pool:
                count = max(self.batch_ids // len(pool[0].piece), 1)
                yield pool[:count]
                del pool[:count]

    def prepare(self, windows: list[Window]) -> tuple[Tensor, Tensor]:
        shape = len(windows), len(windows[0].piece)
        ids_BN, targets_BN = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
        for row, window in enumerate(windows):
            ids = torch.from_numpy(window.piece.ids)
            ids_BN[row, : len(ids) - 1] = ids[:-1]
            targets_BN[row, window.first : len(ids) - 1] = ids[window.first + 1 :]
        return ids_BN, targets_BN

    def nats(self, prepared: tuple[Tensor, Tensor]) -> Tensor:
        ids_BN, targets_BN = (part.to(self.device) for part in prepared)
        # Padding follows what is read, which does not see it.
        logits = self.network(input_ids=ids_BN, use_cache=False).logits
        each = F.cross_entropy(
            logits.flatten(0, 1).float(), targets_BN.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return each.view(targets_BN.shape).to(_precise(self.device)).sum(1)


def _pools(windows: Iterator[Window], num_ids: int) -> Iterator[list[Window]]:
    pool: list[Window] = []
    size = 0
    for window in windows:
        pool.append(window)
        size += len(window.piece)
        if size >= num_ids:
            yield pool
            pool, size = [], 0
    yield pool


def _num_patches(piece: Piece, first: int) -> int:
    """Patches whose first byte is read from `first` on."""
    assert piece.next_starts is not None
    is_byte = piece.ids[:-1] >= OFFSET
    begins = np.concatenate([[True], piece.next_starts[:-1] | ~is_byte[:-1]]) & is_byte
    return int(begins[first:].sum())


def _precise(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
