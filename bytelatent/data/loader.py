"""Endless batches from weighted sources, made ahead; their state is part of the checkpoint. Batches read once."""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch

from bytelatent.data.packing import Batch, Piece, fill_batch, pack, split_document
from bytelatent.data.patcher import Patcher, StoredCheck, groups_of
from bytelatent.data.reading import PieceReader, ReaderPool
from bytelatent.data.settings import DataSettings, SourceSettings
from bytelatent.data.source import SourceReader
from bytelatent.errors import UserError
from bytelatent.text import MAX_ROW_BYTES, BadRows, Document, find_files, read_documents
from bytelatent.text.chat import DEFAULT_TEMPLATE, ChatTemplate
from bytelatent.vocab import BYTES, Vocabulary


class Loader:
    """Endless training batches of one rank.

    Documents are drawn from the sources by weight, cut into pieces, shuffled, patched where there is a patcher, and
    packed. `state_dict` holds all that the next batch depends on, the shuffle buffer too; the number of reading
    processes changes nothing.

    Args:
        settings: the sources and the shape of a batch.
        seed: seeds every choice.
        patcher: None for batches without patches.
        rank, world_size: no document is read by two ranks in the same epoch.
        vocabulary: of the ids.
        chat_template: writes conversations.
    """

    def __init__(
        self,
        settings: DataSettings,
        seed: int,
        patcher: Patcher | None = None,
        rank: int = 0,
        world_size: int = 1,
        vocabulary: Vocabulary = BYTES,
        chat_template: ChatTemplate = DEFAULT_TEMPLATE,
    ):
        self.settings, self.seed, self.patcher, self.vocabulary = settings, seed, patcher, vocabulary
        self.rank, self.world_size = rank, world_size
        self.pool = ReaderPool(
            [
                PieceReader(
                    source.text_key,
                    settings.context,
                    patcher,
                    settings.max_row_bytes,
                    vocabulary,
                    source.chat(chat_template),
                )
                for source in settings.train
            ],
            settings.workers,
        )
        check = StoredCheck(patcher)
        self.sources = [
            SourceReader(source, number, self.pool, seed, rank, world_size, settings.max_bad_rows, check)
            for number, source in enumerate(settings.train)
        ]
        weights = np.array([source.weight for source in settings.train])
        self.shares = weights / weights.sum()
        self.redistributions = 0  # how often the number of ranks changed
        self.random = self._new_random()
        self.buffer: list[Piece] = []
        self.ready: deque[Piece] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        settings = self.settings
        pieces = fill_batch(self.ready, settings.batch_ids, settings.patch_slots, self._prepare)
        apart = settings.has_chats  # a conversation is read as it is when the model answers in it
        return pack(pieces, settings.batch_ids, settings.patch_slots, as_one_row=not apart, vocabulary=self.vocabulary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reading processes."""
        self.pool.close()

    def _prepare(self) -> bool:
        """Move about a batch of pieces, patched, from the shuffle buffer to `ready`."""
        pieces, size = [], 0
        while size < self.settings.batch_ids:
            while len(self.buffer) < self.settings.shuffle_buffer:
                source = int(self.random.choice(len(self.sources), p=self.shares)) if len(self.sources) > 1 else 0
                self.buffer.extend(next(self.sources[source]))
            at = int(self.random.integers(len(self.buffer)))
            self.buffer[at], self.buffer[-1] = self.buffer[-1], self.buffer[at]
            pieces.append(self.buffer.pop())
            size += len(pieces[-1])
        if self.patcher is not None:
            pieces = [replace(piece, entropies=None) for piece in self.patcher(pieces)]
        self.ready.extend(pieces)
        return True

    def _new_random(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.rank, self.redistributions])

    def state_dict(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "world": self.world_size,
            "deals": self.redistributions,
            "sources": [source.state_dict() for source in self.sources],
            "random": self.random.bit_generator.state,
            "buffer": [_piece_state(piece) for piece in self.buffer],
            "ready": [_piece_state(piece) for piece in self.ready],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where this rank was.

        Raises:
            FilesChanged: the files differ from those of the state; see `redistribute`.
            UserError: the sources or the number of ranks differ.
        """
        self._check(state)
        if (state["rank"], state["world"]) != (self.rank, self.world_size):
            raise UserError(
                f"data: the position is that of rank {state['rank']} of {state['world']}, "
                f"and this is rank {self.rank} of {self.world_size}"
            )
        for source, source_state in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(source_state)
        self.redistributions = state["deals"]
        self.random = self._new_random()
        self.random.bit_generator.state = state["random"]
        self.buffer = [Piece(**piece) for piece in state["buffer"]]
        self.ready = deque(Piece(**piece) for piece in state["ready"])

    def redistribute(self, states: list[dict[str, Any]]) -> str:
        """Resume where another number of ranks was: each document that is not in a batch yet goes to one rank.

        All ranks pass the same states. Only the order of the documents differs from what it would have been. With
        `allow_changed` a source whose files changed begins a new epoch.

        Args:
            states: the `state_dict` of each rank.

        Returns:
            One line about what was done.

        Raises:
            FilesChanged: the files are not those of the states, and may not change.
            UserError: the sources are not, or states are missing.
        """
        states = sorted(states, key=lambda state: state["rank"])
        if [state["rank"] for state in states] != list(range(states[0]["world"])):
            raise UserError(f"data: there should be the positions of {states[0]['world']} ranks, not {len(states)}")
        for state in states:
            self._check(state)
        changed = [source.settings.path for source in self.sources if self._has_changed(source, states)]
        num_left = sum(self._redistribute_source(number, states) for number in range(len(self.sources)))
        pieces = [Piece(**piece) for state in states for piece in [*state["ready"], *state["buffer"]]]
        self.buffer = pieces[self.rank :: self.world_size]
        self.ready = deque()
        self.redistributions = max(state["deals"] for state in states) + 1
        self.random = self._new_random()
        if changed:
            return f"data: the files of {', '.join(map(repr, changed))} changed: a new epoch of them begins"
        return (
            f"data: the state of {len(states)} ranks is divided among {self.world_size}: {len(pieces)} waiting pieces "
            f"and {num_left} blocks half read; no document is lost or repeated, only their order changes"
        )

    def _redistribute_source(self, number: int, states: list[dict[str, Any]]) -> int:
        source = self.sources[number]
        if self.settings.allow_changed and self._has_changed(source, states):
            epoch = 1 + max(state["sources"][number]["place"][0] for state in states)
            begin = {"files": source.files, "place": [epoch, 0, 0], "item": 0, "left": [], "damaged": [epoch, 0]}
            source.load_state_dict(begin)
            return 0
        before = []
        for state in states:
            reader = SourceReader(source.settings, number, self.pool, self.seed, state["rank"], state["world"])
            reader.load_state_dict(state["sources"][number])
            before.append(reader)
        end = max(reader.end() for reader in before)
        left = sorted(itertools.chain.from_iterable(reader.unfinished(end) for reader in before))
        source.load_state_dict(
            {
                "files": source.files,
                "place": list(end),
                "item": 0,
                "left": [[*place, item] for place, item in left[self.rank :: self.world_size]],
                "damaged": [end.epoch, sum(r.bad_rows.count for r in before if r.bad_epoch == end.epoch)],
            }
        )
        return len(left)

    def _has_changed(self, source: SourceReader, states: list[dict[str, Any]]) -> bool:
        return not all(source.has_files_of(state["sources"][source.number]) for state in states)

    def _check(self, state: dict[str, Any]) -> None:
        if len(state["sources"]) != len(self.sources):
            raise UserError("data: the number of sources is not that of the checkpoint; start another run")


class PrefetchLoader:
    """Makes a loader's batches in a thread, one ahead: the same batches, with the same state after each.

    Until it is closed torch computes with one thread on the CPU.

    Args:
        loader: must not be used by anything else.
        device: a GPU where patches are found, on a stream of its own beside the training's.
    """

    def __init__(self, loader: Loader, device: torch.device):
        self.loader = loader
        self._thread = ThreadPoolExecutor(1, "next batch")
        # Operations on batches are small: threads, as many as there are cores, would only wait for one another.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the weights of what finds patches are there
        self._made: Future[tuple[Batch, dict[str, Any]]] | None = None
        self._state: dict[str, Any] | None = None  # after the batch that was returned last

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._made is None:
            self._made = self._thread.submit(self._make)
        made, self._made = self._made, None
        batch, self._state = made.result()
        self._made = self._thread.submit(self._make)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the thread finish its batch, and end the reading processes."""
        self._thread.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)
        self.loader.close()

    def state_dict(self) -> dict[str, Any]:
        """The state after the batch that was returned last."""
        return self.loader.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._forget()
        self.loader.load_state_dict(state)

    def redistribute(self, states: list[dict[str, Any]]) -> str:
        self._forget()
        return self.loader.redistribute(states)

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        if self._stream is None:
            return next(self.loader), self.loader.state_dict()
        with torch.cuda.stream(self._stream):  # its device, too: each thread has one of its own
            return next(self.loader).pin_memory(), self.loader.state_dict()

    def _forget(self) -> None:
        """Drop the batch that was made ahead, before the loader moves elsewhere."""
        if self._made is not None:
            self._made.exception()  # wait for it; what went wrong with it does not matter
        self._made = self._state = None


def batches_once(
    sources: list[SourceSettings],
    context: int,
    batch_bytes: int,
    patcher: Patcher | None = None,
    max_bytes: int | None = None,
    slots: int | None = None,
    padded: bool = False,
    bad_rows: BadRows | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    vocabulary: Vocabulary = BYTES,
    chat_template: ChatTemplate = DEFAULT_TEMPLATE,
) -> Iterator[Batch]:
    """The sources' documents once, in order: for validation.

    Args:
        max_bytes: stop after about as much text.
        slots: patches a batch, as `patch_slots` of training; None for no limit.
        padded: the last batch, and with `slots` each one's patches, are filled up, so that all are of one shape.
        bad_rows: receives bad rows and files; None to raise the first.
        max_row_bytes: a longer row is a bad one.
        vocabulary: of the ids.
        chat_template: writes conversations.
    """
    documents = _documents_once(sources, patcher, bad_rows, max_row_bytes, chat_template)
    pieces = _pieces_once(documents, context, max_bytes, vocabulary)
    ready: deque[Piece] = deque()

    def more() -> bool:
        group = next(groups_of(pieces, batch_bytes), [])  # not a whole document, which may be as long as memory
        ready.extend(patcher(group) if patcher else group)
        return bool(ready)

    while taken := fill_batch(ready, batch_bytes, slots, more):
        size = (batch_bytes, slots) if padded else (None, None)
        yield pack(taken, *size, vocabulary=vocabulary)


def held_out_batches(
    data: DataSettings,
    patcher: Patcher | None = None,
    max_bytes: int | None = None,
    vocabulary: Vocabulary = BYTES,
    chat_template: ChatTemplate = DEFAULT_TEMPLATE,
    bad_rows: BadRows | None = None,
) -> Iterator[Batch]:
    """The held-out text once, in batches of the shape of training's.

    Args:
        max_bytes: stop after about as much text.
        vocabulary: of the ids.
        chat_template: writes conversations.
    """
    return batches_once(
        data.valid,
        data.context,
        data.batch_ids,
        patcher,
        max_bytes,
        data.patch_slots if patcher is not None else None,
        padded=True,
        bad_rows=bad_rows or BadRows(data.max_bad_rows, "data.max_bad_rows"),
        max_row_bytes=data.max_row_bytes,
        vocabulary=vocabulary,
        chat_template=chat_template,
    )


def _documents_once(
    sources: list[SourceSettings],
    patcher: Patcher | None,
    bad_rows: BadRows | None,
    max_row_bytes: int,
    chat_template: ChatTemplate,
) -> Iterator[Document]:
    check = StoredCheck(patcher)
    stored = check.patcher is not None
    for source in sources:
        for file in find_files(source.path):
            how = {"max_row_bytes": max_row_bytes, "chat": source.chat(chat_template)}
            for _, document in read_documents(file, source.text_key, check, bad_rows, stored, **how):
                yield document


def _pieces_once(
    documents: Iterator[Document], context: int, max_bytes: int | None, vocabulary: Vocabulary
) -> Iterator[Piece]:
    num_bytes = 0
    while max_bytes is None or num_bytes < max_bytes:
        document = next(documents, None)
        if document is None:
            return
        if document.chat is None and max_bytes is not None:
            document = _first(document, max_bytes - num_bytes)
        num_bytes += len(document.text)
        yield from split_document(document, context, vocabulary)


def _first(document: Document, num_bytes: int) -> Document:
    """A document's first bytes, and what is stored for them."""
    entropies, starts = document.entropies, document.starts
    return Document(
        document.text[:num_bytes],
        document.id,
        None if entropies is None else entropies[: num_bytes + 1],
        None if starts is None else starts[: num_bytes + 1],
    )


def _piece_state(piece: Piece) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(piece).items() if value is not None}
