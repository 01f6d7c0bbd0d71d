"""Documents into pieces, pieces into batches."""

from collections import deque
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytelatent.data import Piece, fill_batch, pack, split_document
from bytelatent.errors import UserError
from bytelatent.model import PatchedStream
from bytelatent.text import Document
from bytelatent.vocab import OFFSET


def marked(documents: list[int], context: int, seed: int, patched: bool) -> tuple[deque[Piece], list[np.ndarray]]:
    """Pieces of documents of these many bytes, and the documents' ids: each byte another one where possible."""
    random = np.random.default_rng(seed)
    pieces: deque[Piece] = deque()
    ids = []
    for size in documents:
        text = random.bytes(size)
        ids.append(np.array([1, *(b + 4 for b in text), 2]))
        for piece in split_document(Document(text), context):
            starts = random.random(len(piece)) < 0.4 if patched else None
            pieces.append(Piece(piece.ids, next_starts=starts))
    return pieces, ids


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(sizes, st.integers(2, 30), st.integers(2, 32), st.none() | st.integers(2, 12), st.booleans(), st.integers(0, 99))
def test_every_id_is_predicted_exactly_once(
    documents: list[int], context: int, size: int, slots: int | None, padded: bool, seed: int
) -> None:
    pieces, ids = marked(documents, context, seed, patched=slots is not None)
    starts = [p.next_starts for p in pieces if p.next_starts is not None]
    owner = np.concatenate([[number] * (len(row) - 1) for number, row in enumerate(ids)])
    read, predicted, begins, done = [], [], [], 0
    while taken := fill_batch(pieces, size, slots, lambda: False):
        batch = pack(taken, size if padded else None, slots if padded else None)
        stream, real = batch.stream, batch.stream.document >= 0
        count = int(real.sum())
        assert count == batch.num_targets <= size
        assert real[:count].all()  # padding stands at the end
        assert len(stream.ids) == (size if padded else count)
        read += stream.ids[real].tolist()
        predicted += batch.targets[real].tolist()
        assert (batch.targets[~real] == -100).all()
        assert batch.num_bytes == sum(target >= 4 for target in batch.targets.tolist())
        assert stream.num_documents == len(taken)
        for row in [stream.document, *([stream.patch_document] if isinstance(stream, PatchedStream) else [])]:
            assert int((row.diff() != 0).sum()) == len(taken) - int(row[-1] >= 0)  # runs, the padding's too
        # Documents do not mix: another document means another number, and positions begin anew with each number.
        own, numbers, position = owner[done : done + count], stream.document.tolist(), stream.position.tolist()
        assert count == len(own)
        for i in range(count):
            first = i == 0 or numbers[i] != numbers[i - 1]
            assert position[i] == (0 if first else position[i - 1] + 1)
            assert first or own[i] == own[i - 1]
        done += count
        if slots is None:
            assert not isinstance(stream, PatchedStream)
            continue
        assert isinstance(stream, PatchedStream)
        assert stream.num_patches == slots if padded else stream.num_patches < slots
        assert stream.patch.max() < stream.num_patches
        assert batch.num_patches == len(set(stream.patch[real & (stream.ids >= OFFSET)].tolist()))
        assert not set(stream.patch[real].tolist()) & set(stream.patch[~real].tolist())
        patch = stream.patch.tolist()
        begins += [(i == 0 or patch[i] != patch[i - 1], position[i] == 0) for i in range(count)]
    assert read == np.concatenate([row[:-1] for row in ids]).tolist()
    assert predicted == np.concatenate([row[1:] for row in ids]).tolist()
    if slots is not None:
        wanted = np.concatenate([[False], np.concatenate(starts)[:-1]])
        assert [begun for begun, _ in begins] == [
            bool(start) or first for start, (_, first) in zip(wanted, begins, strict=True)
        ]


@given(sizes, st.integers(2, 30), st.integers(2, 32), st.none() | st.integers(2, 12), st.integers(0, 99))
def test_batches_are_full(documents: list[int], context: int, size: int, slots: int | None, seed: int) -> None:
    """Of bytes, or of patches but for the one slot that padding takes."""
    pieces, _ = marked(documents, context, seed, patched=slots is not None)
    full = []
    while taken := fill_batch(pieces, size, slots, lambda: False):
        batch = pack(taken, size, slots)
        in_use = int((batch.stream.patch_document >= 0).sum()) if isinstance(batch.stream, PatchedStream) else 0
        full.append(batch.num_targets == size or (slots is not None and in_use == slots - 1))
    assert all(full[:-1])


def test_more_is_asked_for_only_when_nothing_is_left() -> None:
    ready: deque[Piece] = deque()
    asked = 0

    def more() -> bool:
        nonlocal asked
        asked += 1
        ready.append(Piece(np.arange(6, dtype=np.uint16)))
        return True

    taken = fill_batch(ready, 12, None, more)
    assert (asked, [len(piece) for piece in taken], [len(piece) for piece in ready]) == (3, [5, 5, 2], [3])


@given(st.integers(1, 30), st.data())
def test_split(size: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, size))
    ids = np.arange(size + 1, dtype=np.uint16)
    entropies, starts = np.arange(size, dtype=np.float32), np.arange(size) % 3 == 0
    head, tail = Piece(ids, entropies, starts).split(at)
    assert (len(head), len(tail)) == (at, size - at)
    pairs = [pair for part in (head, tail) for pair in zip(part.ids[:-1], part.ids[1:], strict=True)]
    assert pairs == list(pairwise(ids))
    for name, whole in (("entropies", entropies), ("next_starts", starts)):
        assert np.concatenate([getattr(head, name), getattr(tail, name)]).tolist() == whole.tolist()
    bare, _ = Piece(ids).split(at)
    assert bare.entropies is None
    assert bare.next_starts is None


@given(st.integers(1, 60), st.integers(2, 20))
def test_cut(size: int, context: int) -> None:
    text = bytes(i % 256 for i in range(size))
    entropies = np.arange(size + 1, dtype=np.float32)
    pieces = list(split_document(Document(text, entropies=entropies), context))
    assert all(len(piece) == context for piece in pieces[:-1])
    assert 0 < len(pieces[-1]) <= context
    assert [i for piece in pieces for i in piece.ids[:-1].tolist()] == [1, *(b + 4 for b in text)]
    assert [i for piece in pieces for i in piece.ids[1:].tolist()] == [*(b + 4 for b in text), 2]
    assert np.concatenate([piece.entropies for piece in pieces]).tolist() == entropies.tolist()


def test_no_pieces() -> None:
    with pytest.raises(UserError, match="every document is empty"):
        pack([])


def test_ids_of_a_batch_can_be_embedded() -> None:
    """Padding is an id like any other to the model: only its target and its document tell."""
    pieces, _ = marked([5], 20, 0, patched=True)
    batch = pack(list(pieces), 16, 8)
    assert batch.stream.ids.min() >= 0
    assert batch.stream.ids.dtype == batch.targets.dtype == torch.long
