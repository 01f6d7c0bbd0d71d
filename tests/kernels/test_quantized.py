"""Matrices of one byte a number: how far off they are, and products with them in plain PyTorch, against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.kernels.quantized import QuantizedMatrix, Rounding, by_rows, dense
from bytelatent.kernels.skinny_linear import plain_skinny_linear, skinny_linear

BOTH: tuple[Rounding, ...] = ("int8", "fp8")
LARGEST = {"int8": 127, "fp8": 448}
TINY = 2.0**-126
ROWS = st.integers(1, 9).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=width, max_size=width), min_size=1, max_size=4
    )
)


def exact(matrix: QuantizedMatrix) -> Tensor:
    """The numbers it stands for, float64."""
    return matrix.values.double() * matrix.scale.double()[:, None]


@pytest.mark.parametrize("rounding", BOTH)
@given(rows=ROWS)
def test_rounding(rounding: Rounding, rows: list[list[float]]) -> None:
    weight = torch.tensor(rows)
    matrix = QuantizedMatrix.of(weight, rounding)
    highest = weight.double().abs().amax(1)
    torch.testing.assert_close(matrix.scale.double(), (highest / LARGEST[rounding]).clamp(min=TINY), rtol=1e-6, atol=0)
    error, scale = (weight.double() - exact(matrix)).abs(), matrix.scale.double()[:, None]
    more = 1 + 1e-4  # the division is in float32: up to 127 * 2^-24 of the 0.5
    if rounding == "int8":
        assert (error <= scale / 2 * more).all()
        assert matrix.values.abs().max() <= 127
    else:  # three bits after the first, and steps of 2^-9 where there is no first
        assert (error <= torch.maximum(weight.double().abs() * 2**-4, scale * 2**-10) * more).all()
    torch.testing.assert_close(matrix.dense(torch.float32).double(), exact(matrix), rtol=1e-6, atol=1e-44)
    again = QuantizedMatrix.of(matrix.dense(torch.float32), rounding)
    assert torch.equal(again.values.float(), matrix.values.float())


@pytest.mark.parametrize("rounding", BOTH)
def test_rows_of_zeros_and_a_single_huge_number(rounding: Rounding) -> None:
    weight = torch.zeros(4, 5)
    weight[1, 3], weight[1, 0] = 1e30, 1.0
    weight[2] = torch.tensor([-448.0, 127.0, 7.0, -1.0, 0.0])
    weight[3, 1] = -1e-44  # a number that 127 cannot divide
    matrix = QuantizedMatrix.of(weight, rounding)
    found = exact(matrix)
    assert bool(found.isfinite().all())
    assert not found[0].any()
    assert found[1].tolist() == pytest.approx([0, 0, 0, 1e30, 0], rel=1e-6)
    assert found[2, 0] == pytest.approx(-448)
    assert not found[3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rounding", BOTH)
def test_what_is_no_number_is_reported(rounding: Rounding, bad: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = bad
    with pytest.raises(UserError, match=f"weights: {rounding} cannot hold 'a.b', in which there is NaN or infinity"):
        QuantizedMatrix.of(weight, rounding, "a.b")


@pytest.mark.parametrize("rounding", BOTH)
def test_rows_take_their_scales_along(rounding: Rounding) -> None:
    torch.manual_seed(0)
    one, other = (QuantizedMatrix.of(torch.randn(4, 3) * torch.rand(4, 1), rounding) for _ in "ab")

    def arrange(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a.repeat_interleave(2, dim=0), b]).flip(0)

    found = by_rows(arrange, one, other)
    assert isinstance(found, QuantizedMatrix)
    assert torch.equal(exact(found), arrange(exact(one), exact(other)))
    assert torch.equal(dense(by_rows(arrange, exact(one), exact(other)), torch.float32), exact(found))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("rounding", BOTH)
def test_plain_products(rounding: Rounding, rows: int) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(rows, 19), torch.randn(rows, 7)
    matrix = QuantizedMatrix.of(torch.randn(7, 19) * torch.rand(7, 1), rounding)
    both = QuantizedMatrix.of(torch.randn(10, 19) * torch.rand(10, 1), rounding)
    normed = F.rms_norm(x.double(), (19,), None, 1e-5)
    y, (gate, up) = normed @ exact(matrix).T, (normed @ exact(both)[part::2].T for part in (0, 1))
    expected_gated = F.silu(gate) * up
    for linear in (plain_skinny_linear, skinny_linear):
        found = linear(x, matrix, eps=1e-5, residual_MN=residual, residual_scale=2.0)
        torch.testing.assert_close(found.double(), y + 2 * residual.double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(linear(x, matrix).double(), x.double() @ exact(matrix).T, atol=1e-5, rtol=0)
        torch.testing.assert_close(linear(x, both, gated=True, eps=1e-5).double(), expected_gated, atol=1e-5, rtol=0)
        rests = torch.zeros(1, dtype=torch.bool)
        assert linear(x, matrix, run=rests).shape == (rows, 7)
        assert linear(x, both, gated=True, run=rests).shape == (rows, 5)
