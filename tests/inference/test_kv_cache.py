"""New positions against counting them one by one; what a KV cache holds of a stream, position by position."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bytelatent.inference.cached_attention import NewPositions, PerDocument, StoreNewest
from bytelatent.inference.kv_cache import KVCache
from bytelatent.model.attention import build_mask

# of each row: its number, what it has read, and the sizes of its runs
ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 20), st.lists(st.integers(1, 6), min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
    unique_by=lambda row: row[0],
)


@given(rows=ROWS, count=st.integers(1, 20))
def test_new_positions(rows: list[tuple[int, int, list[int]]], count: int) -> None:
    entries = [(row, read, run, i) for row, read, sizes in rows for run, n in enumerate(sizes) for i in range(n)]
    row_of = torch.tensor([row for row, *_ in entries])
    new = NewPositions(row_of, torch.tensor([read + i for _, read, _, i in entries]))
    assert new.offset.tolist() == [i for *_, i in entries]
    assert new.slot.tolist() == [row for row, _, _ in rows]
    assert new.num_read.tolist() == [read for _, read, _ in rows]
    indices = torch.arange(len(entries))
    laid_out = new.padded(indices, fill=-1)
    assert laid_out.shape == (len(rows), max(sum(sizes) for *_, sizes in rows))
    assert torch.equal(new.unpadded(laid_out), indices)
    for line, (row, _, _) in enumerate(rows):
        of_row = (row_of == row).nonzero()[:, 0].tolist()
        assert laid_out[line].tolist() == of_row + [-1] * (laid_out.shape[1] - len(of_row))
        assert [i for i in indices[new.newest(count)].tolist() if i in of_row] == of_row[-count:]
        for i, query in enumerate(of_row):
            for j, key in enumerate(of_row):
                same_run = entries[query][:3] == entries[key][:3]
                assert bool(new.seen[line, i, j]) == (same_run and j <= i)


@given(
    sizes=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    num_slots=st.integers(1, 12),
    together=st.booleans(),
    as_indices=st.booleans(),
)
def test_a_cache_holds_the_newest_keys_and_values_of_each_slot(
    sizes: list[int], num_slots: int, together: bool, as_indices: bool
) -> None:
    shape = (2, len(sizes), num_slots, 3, 4)
    cache = KVCache(torch.zeros(shape), torch.zeros(shape), num_slots)
    k_LTJE, v_LTJE = torch.randn(2, 2, sum(sizes) + 5, 3, 4)  # the last five fill up
    begins = [sum(sizes[:row]) for row in range(len(sizes))]
    slots = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    position = torch.cat([torch.arange(size) for size in sizes])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(StoreNewest.most_slices, "cpu", 0 if as_indices else 99)  # more than there are
        store = StoreNewest(cache, NewPositions(slots, position))
    assert isinstance(store.parts[0][0], torch.Tensor) == as_indices
    if together:
        store.all_layers(k_LTJE, v_LTJE)
    else:
        for k_TJE, v_TJE in zip(k_LTJE, v_LTJE, strict=True):
            store(k_TJE, v_TJE)
    k_LBRJE, v_LBRJE = torch.zeros(2, *shape)
    for row, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        for position in range(size):  # later ones take the place of earlier ones
            k_LBRJE[:, row, position % num_slots] = k_LTJE[:, begin + position]
            v_LBRJE[:, row, position % num_slots] = v_LTJE[:, begin + position]
    assert torch.equal(cache.k, k_LBRJE)
    assert torch.equal(cache.v, v_LBRJE)


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), kv_heads=st.sampled_from([1, 2, 4]))
def test_documents_alone_are_documents_under_the_mask(sizes: list[int], kv_heads: int) -> None:
    document = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    document[document == len(sizes) - 1] = -1  # padding
    q_THE = torch.randn(len(document), 4, 8)
    k_TJE, v_TJE = torch.randn(2, len(document), kv_heads, 8)
    found = PerDocument(sizes).attend(q_THE, k_TJE, v_TJE)
    torch.testing.assert_close(found, build_mask(document, None).attend(q_THE, k_TJE, v_TJE), rtol=1e-5, atol=1e-5)
