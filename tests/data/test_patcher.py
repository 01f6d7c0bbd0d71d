"""Pieces cut into patches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bytelatent.data import Patcher, Piece, patch_in_groups, patches_of, split_document
from bytelatent.errors import UserError
from bytelatent.model import Stream, pack_rows
from bytelatent.patching import PatchSettings, patch_lengths
from bytelatent.text import Document, read_documents
from bytelatent.vocab import OFFSET
from tests.model.tiny import tiny_byte_lm
from tests.text.text_files import write_stored

TEXTS = [b"the first of the texts", b"x", b"and a third one, a little longer than the first"]
THRESHOLD = 5.12  # nats; the tiny model's entropies lie around it


@pytest.fixture(scope="module")
def patcher() -> Patcher:
    return Patcher(PatchSettings(mode="entropy", threshold=THRESHOLD), tiny_byte_lm(window=6))


def pieces_of(texts: list[bytes], context: int = 100) -> list[Piece]:
    return [piece for text in texts for piece in split_document(Document(text), context)]


def test_starts_are_those_of_the_mode(patcher: Patcher) -> None:
    """Each piece alone, its entropies from the byte LM's own softmax."""
    patched = patcher(pieces_of(TEXTS))
    decided = []
    for piece in patched:
        ids = torch.from_numpy(piece.ids[:-1].astype(np.int64))
        assert patcher.byte_lm is not None
        with torch.no_grad():
            probabilities = patcher.byte_lm(pack_rows([ids])).double().softmax(-1)
        entropies = -(probabilities * probabilities.log()).sum(-1)
        np.testing.assert_allclose(piece.entropies, entropies, atol=1e-5)
        begun = torch.from_numpy(np.concatenate([[True], piece.next_starts]))
        lengths = torch.diff(torch.nonzero(begun).flatten(), append=torch.tensor([len(piece) + 1]))
        expected = patch_lengths(None, torch.from_numpy(piece.entropies)[None], patcher.settings)
        assert lengths.tolist() == expected[0].tolist()
        decided += piece.next_starts[1:].tolist()
    assert 0.1 < np.mean(decided) < 0.9  # the threshold lies among the entropies


def test_stored_entropies_give_the_same_patches(patcher: Patcher, tmp_path: Path) -> None:
    on_the_fly = patcher(pieces_of(TEXTS))
    stored = [piece.entropies.tolist() for piece in on_the_fly]
    file = write_stored(tmp_path / "a.parquet", TEXTS, stored)
    read = [piece for _, document in read_documents(str(file)) for piece in split_document(document, 100)]
    without_byte_lm = Patcher(patcher.settings)(read)
    for a, b in zip(on_the_fly, without_byte_lm, strict=True):
        assert a.entropies.tolist() == b.entropies.tolist()
        assert a.next_starts.tolist() == b.next_starts.tolist()


def test_entropies_are_asked_for(patcher: Patcher) -> None:
    with pytest.raises(UserError, match="needs a byte LM or entropies stored beside every text"):
        Patcher(patcher.settings)(pieces_of(TEXTS))


def test_entropies_may_be_computed_in_another_way(patcher: Patcher) -> None:
    def high(stream: Stream) -> torch.Tensor:
        return torch.where(stream.ids == OFFSET + ord("t"), 6.0, 0.0)

    for piece in Patcher(patcher.settings, patcher.byte_lm, entropies_of=high)(pieces_of(TEXTS)):
        assert (piece.next_starts[1:] == (piece.ids[1:-1] == OFFSET + ord("t"))).all()


@pytest.mark.parametrize("context", [5, 1000])
def test_groups_change_nothing(patcher: Patcher, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = patcher(pieces_of(TEXTS, context))
    monkeypatch.setattr("bytelatent.data.patcher.GROUP", 9)
    grouped = patch_in_groups(patcher, pieces_of(TEXTS, context))
    assert [piece.ids.tolist() for piece in grouped] == [piece.ids.tolist() for piece in whole]
    for a, b in zip(grouped, whole, strict=True):
        np.testing.assert_allclose(a.entropies, b.entropies, atol=1e-5)
        assert a.next_starts.tolist() == b.next_starts.tolist()
    assert patch_in_groups(patcher, []) == []


def test_patches_of_a_text_by_hand() -> None:
    found = patches_of(b"It is. Now", Patcher(PatchSettings(mode="space")), 100)
    # A patch ends with the first of each run of space-like bytes.
    assert [patch.text for patch in found] == ["It ", "is.", " Now"]
    assert [(patch.start, patch.end) for patch in found] == [(0, 3), (3, 6), (6, 10)]
    assert all(patch.entropies is None for patch in found)
    assert patches_of(b"", Patcher(PatchSettings(mode="space")), 100) == []
    split = patches_of("\u00e9".encode(), Patcher(PatchSettings(mode="byte")), 100)
    assert [patch.text for patch in split] == ["\ufffd", "\ufffd"]
