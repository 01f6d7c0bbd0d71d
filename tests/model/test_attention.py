"""Masks: what each position sees, and what it does not."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent.model import block, compile_regions
from bytelatent.model.attention import BandedMask, DenseMask, build_mask, packed_mask
from tests.model.slow import attention
from tests.model.tiny import patched_stream_of as patched
from tests.model.tiny import random_ids, random_starts, stream_of, tiny_blt, tiny_byte_lm

WINDOW = 4


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("off", [-1, 0, 1, 5])
def test_attend_equals_a_loop(window: int | None, off: int, kv_heads: int) -> None:
    """A stream just below, at and above twice the window: where the mask changes its form."""
    size = 2 * (window or 8) + off
    random = torch.Generator().manual_seed(size)
    document = (torch.rand(size, generator=random) < 0.15).cumsum(0)
    document[-2:] = -1
    q, k, v = (torch.randn(size, heads, 6, generator=random) for heads in (4, kv_heads, kv_heads))
    mask = build_mask(document, window)
    assert isinstance(mask, DenseMask if window is None or off <= 0 else BandedMask)

    def seen(at: int) -> list[int]:
        return [i for i in range(at + 1) if document[i] == document[at] and (window is None or at - i < window)]

    flat = [list(x.flatten(1).double().numpy()) for x in (q, k, v)]
    expected = np.stack(attention(*flat, seen, 4, 6, kv_heads))
    np.testing.assert_allclose(mask.attend(q, k, v).flatten(1).numpy(), expected, atol=1e-5)


def changed(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    return set(torch.nonzero((before - after).abs().amax(-1) > 1e-6).flatten().tolist())


@pytest.mark.parametrize("sizes", [[7], [8], [9], [30], [3, 20, 1, 9]], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_byte_lm_sees_its_window_and_nothing_else(sizes: list[int], layers: int) -> None:
    random = torch.Generator().manual_seed(0)
    stream = stream_of([random_ids(random, size) for size in sizes], padding=2)
    model = tiny_byte_lm(window=WINDOW, num_layers=layers)
    with torch.no_grad():
        before = model(stream)
        for at in range(sum(sizes)):
            ids = stream.ids.clone()
            ids[at] = (ids[at] + 1) % 260
            after = model(type(stream)(ids, stream.document, stream.position))
            reach = range(at, at + layers * (WINDOW - 1) + 1)
            assert changed(before, after) == {
                i for i in reach if i < len(ids) and stream.document[i] == stream.document[at]
            }


@pytest.mark.parametrize(
    ("stop_at_document", "changes"),
    [
        (True, {}),
        (False, {}),
        (True, {"cross_attention": None, "joined_bytes": 3}),
        (True, {"cross_attention": None, "added_to": "closing"}),
    ],
)
def test_blt_sees_neither_the_future_nor_other_documents(stop_at_document: bool, changes: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(1)
    sizes = [6, 18, 11]
    documents, starts = [random_ids(random, n) for n in sizes], [random_starts(random, n) for n in sizes]
    model = tiny_blt(window=WINDOW, stop_at_document=stop_at_document, **changes)
    owner = [number for number, size in enumerate(sizes) for _ in range(size)]
    reached_over = 0
    with torch.no_grad():
        before = model(patched(documents, starts, padding=3, more_slots=2))
        for at in range(sum(sizes)):
            number, place = owner[at], at - owner.index(owner[at])
            others = [row.clone() for row in documents]
            others[number][place] = (others[number][place] + 1) % 260
            moved = changed(before, model(patched(others, starts, padding=3, more_slots=2)))
            assert at in moved
            assert min(moved) == at
            if stop_at_document:
                assert {owner[i] for i in moved} == {number}
            else:
                reached_over += {owner[i] for i in moved if i < len(owner)} != {number}
    # The largest n-gram is 4 ids: the last three of each document reach into the next one.
    assert reached_over == (0 if stop_at_document else 6)


def test_blt_reads_the_whole_document_through_its_patches() -> None:
    """The window bounds the local models only."""
    random = torch.Generator().manual_seed(2)
    ids, starts = random_ids(random, 40), random_starts(random, 40)
    model = tiny_blt(window=WINDOW)
    with torch.no_grad():
        before = model(patched([ids], [starts]))
        ids[1] = (ids[1] + 1) % 260
        assert 39 in changed(before, model(patched([ids], [starts])))


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.none() | st.integers(1, 12),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_packed_documents_as_each_alone(
    sizes: list[int], window: int | None, padding: int, more_slots: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    documents, starts = [random_ids(random, n) for n in sizes], [random_starts(random, n) for n in sizes]
    documents.append(documents[0])  # two identical ones
    starts.append(starts[0])
    stream = patched(documents, starts, padding, more_slots + (padding == 0))
    for model in (tiny_byte_lm(window=window), tiny_blt(window=window)):
        with torch.no_grad():
            rows = model(stream).split([*map(len, documents), padding])
            for row, ids, next_starts in zip(rows, documents, starts, strict=False):
                torch.testing.assert_close(row, model(patched([ids], [next_starts])), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(rows[0], rows[len(documents) - 1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_with_packed_masks(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits and gradients, padding's too, in one mask for bytes and one for patches."""
    random = torch.Generator().manual_seed(3)
    sizes = [1, 30, 7, 1, 44]
    documents, starts = [random_ids(random, n) for n in sizes], [random_starts(random, n) for n in sizes]
    stream = replace(patched(documents, starts, padding=9, more_slots=4), num_documents=len(sizes))
    model: Any = tiny_blt(window=WINDOW)
    found = []
    for packs in (False, True):
        if packs:
            monkeypatch.setattr(
                block, "build_mask", lambda document, window, heads, n: packed_mask(document, window, n)
            )
        if packs and compiled:
            monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
            compile_regions(model)
        model.zero_grad()
        logits = model(stream)
        logits.square().sum().backward()
        found.append((logits, {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-4)
    for name, gradient in found[0][1].items():
        assert float((found[1][1][name] - gradient).norm() / gradient.norm()) < 1e-4, name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.sampled_from([None, 1, 100, 128, 300, 2000]))
def test_blocks_of_the_flex_mask(sizes: list[int], window: int | None) -> None:
    """FlexAttention looks only at the blocks named; those named whole it does not mask."""
    from bytelatent.model.attention import FLEX_BLOCK, _flex_mask

    document = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    document[-sizes[-1] :] = -1  # padding
    size = len(document)
    place = torch.arange(size)
    allowed = (document[:, None] == document[None, :]) & (place[:, None] >= place[None, :])
    if window is not None:
        allowed &= place[:, None] - place[None, :] < window
    mask = _flex_mask(document, window).block_mask
    for row in range(-(-size // FLEX_BLOCK)):
        partial = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].tolist()
        whole = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].tolist()
        assert len(set(partial + whole)) == len(partial + whole)
        for column in range(-(-size // FLEX_BLOCK)):
            pairs = allowed[row * FLEX_BLOCK :][:FLEX_BLOCK, column * FLEX_BLOCK :][:, :FLEX_BLOCK]
            if column in whole:
                assert bool(pairs.all())
            elif column not in partial:
                assert not bool(pairs.any())
