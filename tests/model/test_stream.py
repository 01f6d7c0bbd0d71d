"""Streams cut into patches."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bytelatent.model import add_patches, lines_as_documents, pack_rows
from bytelatent.vocab import BOS, NEWLINE
from tests.model.tiny import random_lines, random_starts, stream_of, tiny_byte_lm


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_add_patches(sizes: list[int], padding: int, more_slots: int, seed: int) -> None:
    """Id i belongs to patch e(i) and reads patch e(i+1) - 1, counted inside its document."""
    starts = random_starts(torch.Generator().manual_seed(seed), sum(sizes) + padding)
    stream = stream_of([torch.arange(size) for size in sizes], padding)
    patch, read, patch_document, patch_position = [], [], [], []
    at = 0
    for document, size in [*enumerate(sizes), *([(-1, padding)] if padding else [])]:
        first = len(patch_document)
        is_start = [True, *starts[at : at + size].tolist()]
        within = [sum(is_start[: i + 1]) - 1 for i in range(size + 1)]
        patch += [first + within[i] for i in range(size)]
        read += [first + within[i + 1] - 1 if within[i + 1] > 0 else -1 for i in range(size)]
        count = within[size - 1] + 1
        patch_document += [document] * count
        patch_position += list(range(count))
        at += size
    slots = len(patch_document) + more_slots
    made = add_patches(stream, starts, slots if more_slots else None)
    assert made.patch.tolist() == patch
    assert made.read.tolist() == read
    assert made.patch_document.tolist() == patch_document + [-1] * more_slots
    assert made.patch_position[: len(patch_position)].tolist() == patch_position
    assert made.num_patches == slots
    assert made.history.tolist() == stream.position.tolist()


def test_pack_rows() -> None:
    stream = pack_rows([torch.tensor([5, 6, 7]), torch.tensor([8]), torch.tensor([9, 9])])
    assert stream.ids.tolist() == [5, 6, 7, 8, 9, 9]
    assert stream.document.tolist() == [0, 0, 0, 1, 2, 2]
    assert stream.position.tolist() == [0, 1, 2, 0, 0, 1]
    assert len(pack_rows([]).ids) == 0
    assert stream.num_documents == 3


def test_the_number_of_documents_goes_along() -> None:
    stream = pack_rows([torch.arange(4), torch.arange(2)])
    patched = add_patches(stream, torch.ones(6, dtype=torch.bool), 9)
    assert patched.to("meta").num_documents == 2
    assert patched.to("meta").patch_document.device.type == "meta"
    assert set(patched.tensors) == {
        *("ids", "document", "position", "patch", "read", "patch_document", "patch_position", "history")
    }
    assert stream_of([torch.arange(3)]).num_documents is None


def test_from_a_newline_on_the_rest_is_a_document_of_its_own() -> None:
    random = torch.Generator().manual_seed(0)
    rows = [torch.cat([torch.tensor([BOS]), random_lines(random, size)]) for size in (40, 1, 30)]
    byte_lm = tiny_byte_lm(window=9)
    found = byte_lm.entropies(lines_as_documents(stream_of(rows, padding=5))).split([41, 2, 31, 5])
    for row, entropies in zip(rows, found[:-1], strict=True):
        newlines = (row == NEWLINE).nonzero()[:, 0].tolist()
        for begin, end in zip([0, *newlines], [*newlines, len(row)], strict=True):
            line = torch.cat([torch.tensor([BOS]), row[begin + 1 : end]])
            torch.testing.assert_close(entropies[begin:end], byte_lm.entropies(pack_rows([line])))
    assert sum((row == NEWLINE).sum() for row in rows) > 5
