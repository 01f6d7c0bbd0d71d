"""The kernels in Triton's interpreter, against what they must equal."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent.inference import FastEntropies
from bytelatent.kernels.gated_product import interleaved, plain_gated_product, plain_row_scale
from bytelatent.kernels.rotary import cos_sin, rotary_embedding, rotate
from bytelatent.kernels.window_attention import first_seen, plain_window_attention
from bytelatent.model import ByteLM, ByteLMSettings
from bytelatent.model.attention import build_mask
from tests.kernels.interpreter import interpreted
from tests.kernels.streams import stream_of_sizes

pytest.importorskip("triton")


def in_the_interpreter(case: str, **arguments: object) -> dict:
    """Run a case of `cases.py`."""
    return interpreted("tests.kernels.cases", [(case, arguments)])[0]


@pytest.mark.parametrize("window", [None, 1, 64, 100, 130])
def test_window_attention(window: int | None) -> None:
    found = in_the_interpreter("attention", window=window, sizes=[1, 70, 3, 130, 52], heads=3, head_dim=16)
    assert found["error"] < 2e-5
    assert found["scale"] > 0.1


@pytest.mark.parametrize(("rows", "width", "dim"), [(128, 128, 64), (256, 384, 128), (1280, 128, 64)])
def test_gated_product(rows: int, width: int, dim: int) -> None:
    found = in_the_interpreter("gated_product", rows=rows, width=width, dim=dim)
    assert found["error"] < 2e-5
    assert found["row_scale_error"] < 1e-6
    assert found["scale"] > 0.1


def test_the_byte_lm_with_kernels_is_the_byte_lm() -> None:
    found = in_the_interpreter("byte_lm", sizes=[30, 90, 1, 100], padding=35)
    assert found["error"] < 1e-4
    assert found["spread"] > 0.1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.sampled_from([None, 1, 5, 16, 200]))
def test_plain_attention_is_the_models(sizes: list[int], window: int | None) -> None:
    """The plain form that the kernel must equal, against the model's attention and its masks."""
    stream = stream_of_sizes(sizes, padding=3)
    q, k, v = (torch.randn(len(stream.ids), 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    rotary = rotary_embedding(stream.position, 8, 10_000.0)
    rotated = rotate(k, rotary)
    expected = build_mask(stream.document, window).attend(rotate(q, rotary), rotated, v)
    low, (cos, sin) = first_seen(stream.position, window), cos_sin(stream.position, 8, 10_000.0)
    torch.testing.assert_close(plain_window_attention(q, k, v, low, cos, sin), expected)
    torch.testing.assert_close(k, rotated)


def test_plain_gated_product_is_norm_and_swiglu() -> None:
    torch.manual_seed(0)
    x, gate, up, norm = torch.randn(5, 8), torch.randn(6, 8), torch.randn(6, 8), torch.rand(8) + 0.5
    found = plain_gated_product(x, plain_row_scale(x, 1e-5), interleaved(gate * norm, up * norm))
    normed = F.rms_norm(x, (8,), norm, 1e-5)
    torch.testing.assert_close(found, F.silu(normed @ gate.T) * (normed @ up.T))


def test_what_is_supported() -> None:
    shape = {"dim": 128, "num_layers": 1, "num_heads": 2, "multiple_of": 128}
    assert FastEntropies.supports(ByteLMSettings.parse(shape))
    assert not FastEntropies.supports(ByteLMSettings.parse(shape | {"num_kv_heads": 1}))
    assert not FastEntropies.supports(ByteLMSettings.parse(shape | {"dim": 96}))
    assert isinstance(ByteLM(ByteLMSettings.parse(shape)), ByteLM)
