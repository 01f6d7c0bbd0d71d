"""What a `BLT` reads in texts: one alignment, the same borders everywhere, the end paid for or not."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent import BLT
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from tests.model.tiny import tiny_blt
from tests.test_blt import CONTEXT, TEXTS, slow_entropies, wrap

MODES = [
    PatchSettings(threshold=5.12),
    PatchSettings(mode="space"),
    PatchSettings(mode="static", patch_size=3),
    PatchSettings(threshold=0.1, monotonicity=True, reset_at_newline=True),
]


@pytest.fixture(scope="module")
def blt() -> BLT:
    return wrap(tiny_blt(window=6))


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=40), max_size=4), st.sampled_from(MODES), st.sampled_from([None, 7, CONTEXT]))
def test_value_i_is_about_byte_i(texts: list[bytes], patching: PatchSettings, context: int | None) -> None:
    ours = wrap(tiny_blt(window=6), patching)
    for text, read in zip(texts, ours.read(texts, context=context, end=True), strict=True):
        size = len(text)
        logits = ours.logits(text, context=context)[0].log_softmax(-1)
        expected = [logits[at, target].item() for at, target in enumerate([*(byte + 4 for byte in text), 2])]
        assert read.data == text
        np.testing.assert_allclose(read.log_probabilities.numpy(), expected, atol=2e-5)
        patches = ours.patch(text, context)
        assert read.starts.nonzero()[:, 0].tolist() == [patch.start for patch in patches]
        assert (read.entropies is None) == (not patching.needs_entropies)
        if read.entropies is not None:
            entropies = [entropy for patch in patches for entropy in patch.entropies or ()]
            np.testing.assert_allclose(read.entropies.numpy(), entropies, atol=1e-5)
        assert len(read.starts) == size


def test_entropies_are_those_of_a_slow_model(blt: BLT) -> None:
    for text in TEXTS:
        data = text.encode()
        read = blt.read(text)
        assert read.entropies is not None
        expected = slow_entropies(blt, [1, *(byte + 4 for byte in data)])[:-1]
        np.testing.assert_allclose(read.entropies.numpy(), expected, atol=1e-4)
        assert len(read.log_probabilities) == len(data)
        forward = blt(blt.encode(text))
        assert forward.entropies is not None
        torch.testing.assert_close(forward.entropies[0, 1:], read.entropies)
        assert forward.entropies[0, 0] == 0
        assert forward.starts[0, 1:].equal(read.starts)


def test_many_texts_are_read_in_groups(blt: BLT, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [blt.read(text) for text in TEXTS]
    monkeypatch.setattr("bytelatent.blt.reading.READ_IDS", 20)
    for one, other in zip(alone, blt.read(TEXTS), strict=True):
        torch.testing.assert_close(one.log_probabilities, other.log_probabilities, atol=1e-5, rtol=0)
    assert blt.read([]) == []
    assert blt.read("").log_probabilities.shape == (0,)


@pytest.mark.parametrize("patching", MODES, ids=lambda patching: patching.mode)
@pytest.mark.parametrize("context", [None, 7])
def test_states_are_those_of_forward(patching: PatchSettings, context: int | None) -> None:
    ours = wrap(tiny_blt(window=6), patching)
    texts = [*TEXTS, "", b"\xff\xfe"]
    for text, states in zip(texts, ours.states(texts, context=context), strict=True):
        patches = ours.patch(text, context)
        data = text.encode() if isinstance(text, str) else text
        assert states.data == data
        assert states.patch_states.shape == (len(patches), 24)
        assert states.byte_states.shape == states.decoder_states.shape == (len(data), 16)
        spans = [(patch.start, patch.end) for patch in patches]
        found = [states.patch_of_byte.eq(number).nonzero()[:, 0].tolist() for number in range(len(patches))]
        assert found == [list(range(*span)) for span in spans]
        if context is None and data:
            out = ours(ours.encode(text), output_hidden_states=True)
            torch.testing.assert_close(states.byte_states, out.byte_states[0, 1:], atol=1e-5, rtol=0)
            torch.testing.assert_close(states.patch_states, out.patch_states[0, -len(patches) :], atol=1e-5, rtol=0)
            first = ours.states(text, layer=0).patch_states
            torch.testing.assert_close(first, out.hidden_states.global_transformer[0][0, -len(patches) :])
    with pytest.raises(UserError, match="layer: 3 is not one of the global transformer, which has 2"):
        ours.states("x", layer=3)


def test_the_end_is_paid_for_where_asked(blt: BLT) -> None:
    for text in TEXTS:
        read, size = blt.read(text, context=CONTEXT, end=True), len(text.encode())
        with_end = -read.log_probabilities.double().sum().item() / math.log(2) / size
        without = -read.log_probabilities[:-1].double().sum().item() / math.log(2) / size
        assert blt.bits_per_byte(text) == pytest.approx(with_end, rel=1e-5)
        assert blt.bits_per_byte(text, end=False) == pytest.approx(without, rel=1e-5)
        whole = blt.read(text, end=True).log_probabilities
        assert blt.score("", [text], end=True)[0] == pytest.approx(whole.sum().item(), abs=1e-4)
        assert blt.score("", [text])[0] == pytest.approx(whole[:-1].sum().item(), abs=1e-4)


def test_bits_per_byte_of_texts(blt: BLT) -> None:
    texts = [text[: size + 1] for size in range(5) for text in TEXTS[1:]]
    found = blt.bits_per_byte(texts)
    np.testing.assert_allclose(found.per_text, [blt.bits_per_byte(text) for text in texts], rtol=1e-5)
    sizes = [len(text.encode()) for text in texts]
    assert found.mean == pytest.approx(np.average(found.per_text, weights=sizes))
    draws = np.random.default_rng(3).integers(len(texts), size=(4000, len(texts)))
    sums = (np.array(found.per_text) * sizes)[draws].sum(1) / np.array(sizes)[draws].sum(1)
    for confidence in (0.95, 0.5):
        interval = blt.bits_per_byte(texts, confidence=confidence).interval
        assert interval is not None
        share = 100 * (1 - confidence) / 2
        assert interval == pytest.approx(np.percentile(sums, [share, 100 - share]), rel=0.02)
    assert blt.bits_per_byte(texts[:9]).interval is None
    for call, message in (
        (lambda: blt.bits_per_byte([]), "^bits_per_byte: there is no text$"),
        (lambda: blt.bits_per_byte(["a", ""]), r"^bits_per_byte: text 1 of 2 \(from 0\) is empty$"),
        (lambda: blt.bits_per_byte(texts, confidence=95), "^confidence: 95 is not between 0 and 1"),
        (lambda: blt.read(5), "a text is str or bytes, not int"),
        (lambda: blt.states(["a", None]), "a text is str or bytes, not NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_encode_and_decode(blt: BLT) -> None:
    ids = blt.encode(["ab", "é"], end=True)
    assert ids.tolist() == [[1, 101, 102, 2], [1, 0xC3 + 4, 0xA9 + 4, 2]]
    assert blt.encode("a").tolist() == [[1, 101]]
    assert blt.encode([b"a", ""]).tolist() == [[1, 101], [1, -1]]
    assert blt.encode([]).shape == (0, 0)
    assert blt.decode(ids) == ["ab", "é"]
    assert blt.decode(ids[0]) == blt.decode(ids[0].tolist()) == "ab"
