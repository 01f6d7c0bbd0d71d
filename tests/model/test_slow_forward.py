"""The models against loops in float64 that share nothing with them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent.model import BLTSettings, ByteLMSettings, add_patches
from bytelatent.model.settings import StackSettings
from tests.model import slow
from tests.model.tiny import blt_settings, byte_lm_settings, make, random_ids, random_starts, stream_of, tiny_blt


@settings(max_examples=40)
@given(byte_lm_settings(), st.integers(1, 24), st.integers(0, 1000))
def test_byte_lm(shape: ByteLMSettings, size: int, seed: int) -> None:
    ids = random_ids(torch.Generator().manual_seed(seed), size)
    model = make(shape, seed).double()
    with torch.no_grad():
        logits = model(stream_of([ids]))
    np.testing.assert_allclose(logits.numpy(), slow.byte_lm(shape, model.state_dict(), ids.tolist()), atol=1e-4)


@settings(max_examples=80)
@given(blt_settings(), st.integers(1, 24), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 1000))
def test_blt(shape: BLTSettings, size: int, share: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    ids, starts = random_ids(random, size), random_starts(random, size, share)
    model = make(shape, seed).double()  # norms of a few numbers can make float32's rounding a hundred times as large
    with torch.no_grad():
        logits = model(add_patches(stream_of([ids]), starts))
    expected = slow.blt(shape, model.state_dict(), ids.tolist(), starts.tolist())
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stop_at_document", [True, False])
def test_second_document_of_a_stream(stop_at_document: bool) -> None:
    """Where both are of one row, as in the published training, n-grams reach over a document's start; else never."""
    random = torch.Generator().manual_seed(3)
    first, second = random_ids(random, 7), random_ids(random, 9)
    starts = random_starts(random, 16)
    model = tiny_blt(stop_at_document=stop_at_document)
    stream = stream_of([first, second])
    with torch.no_grad():
        logits = model(add_patches(stream, starts))[7:]
        in_one_row = model(add_patches(stream, starts, history=torch.arange(16)))[7:]
    state, over = model.state_dict(), first.tolist()
    alone = slow.blt(model.settings, state, second.tolist(), starts[7:].tolist())
    reaching = slow.blt(model.settings, state, second.tolist(), starts[7:].tolist(), before=over)
    assert np.abs(alone - reaching).max() > 0.05
    np.testing.assert_allclose(logits.numpy(), alone, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(in_one_row.numpy(), alone if stop_at_document else reaching, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple_of", "published"),
    [(32, 1.0, 16, 96), (64, 1.0, 16, 176), (96, 1.0, 16, 256), (48, 1.0, 16, 128), (1024, 1.0, 256, 2816)],
)
def test_feed_forward_width(dim: int, multiplier: float, multiple_of: int, published: int) -> None:
    """The widths of the golden files, and the released 1B's local models'."""
    shape = StackSettings(dim=dim, num_layers=1, num_heads=1, ffn_dim_multiplier=multiplier, multiple_of=multiple_of)
    assert shape.hidden_dim == published


def test_feed_forward_width_truncates_each_factor() -> None:
    # 2/3 * 4 * 100 = 266.67 -> 266; 266 * 1.3 = 345.8 -> 345, and not int(266.67 * 1.3) = 346.
    assert StackSettings(dim=100, num_layers=1, num_heads=1, ffn_dim_multiplier=1.3, multiple_of=1).hidden_dim == 345
