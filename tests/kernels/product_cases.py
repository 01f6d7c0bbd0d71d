"""Cases of products of few rows, for `decode_cases.py`: kernels beside their plain twins."""

from typing import Any

import torch
from torch import Tensor

from bytelatent.kernels.gated_product import gate, plain_gate
from bytelatent.kernels.quantized import QuantizedMatrix, Rounding
from bytelatent.kernels.skinny_launch import SkinnyLaunch
from bytelatent.kernels.skinny_linear import Squares, plain_skinny_linear, skinny_linear

Errors = dict[str, float]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest one, where both are NaN none: what nobody writes is NaN."""
    found, expected = found.double(), expected.double()
    assert bool((found.isnan() == expected.isnan()).all()), "something was written, or not written, that should not be"
    return float((found - expected).nan_to_num().abs().max()) if found.numel() else 0.0


def skinny(
    M: int,
    N: int,
    K: int,
    dtype: str = "float32",
    gated: bool = False,
    norm: bool = True,
    residual: str | None = None,
    launch: list[int] | None = None,
    rounding: Rounding | None = None,
) -> Errors:
    """Also: a row of its own gives what it gave among others, if both launches are alike, and `run` is heeded."""
    kind = getattr(torch, dtype)
    x, weight = torch.randn(M, K + 4).to(kind)[:, :K], (torch.randn(N * (1 + gated), K) / K**0.5).to(kind)
    matrix = weight
    if rounding:  # rows of very different sizes, so that each needs its own scale
        matrix = QuantizedMatrix.of(weight * torch.rand(len(weight), 1).mul(2).add(0.1), rounding)
    eps = 1e-5 if norm else None
    options: dict = {"eps": eps, "gated": gated}
    if residual:
        options |= {"residual_MN": torch.randn(M, N, dtype=getattr(torch, residual)), "residual_scale": 2.0}
    cut = {"launch": SkinnyLaunch(*launch) if launch else None}
    found, expected = skinny_linear(x, matrix, **options, **cut), plain_skinny_linear(x, matrix, **options)
    assert found.dtype == expected.dtype
    x[1:] = x[:1]
    if residual:
        options["residual_MN"][1:] = options["residual_MN"][:1]
    alike = skinny_linear(x, matrix, **options, **cut)
    flag, out = torch.tensor([1, 0], dtype=torch.int32), torch.full((2, M, N), torch.nan)
    skinny_linear(x, matrix, **options, **cut, out=out[0], run=flag[:1])
    skinny_linear(x, matrix, **options, **cut, out=out[1], run=flag[1:])
    assert bool(out[1].isnan().all()), "a kernel that should not run wrote something"
    return {
        "error": difference(found, expected),
        "alike": difference(alike, alike[:1].expand_as(alike)) + difference(alike[0], found[0]),
        "run": difference(out[0].to(found.dtype), alike),
    }


def leaving(
    M: int,
    N: int,
    K: int,
    dtype: str = "float32",
    launch: list[int] | None = None,
    readers: list[int] | None = None,
    out: str | None = None,
    rounding: Rounding | None = None,
) -> Errors:
    """A product leaves its result's squares for the norms of two others, one of them gated."""
    kind = getattr(torch, dtype)
    x, residual = torch.randn(M, K).to(kind), 3 * torch.randn(M, N, dtype=getattr(torch, out or dtype))
    matrices: list[Any] = [(torch.randn(size) / size[1] ** 0.5).to(kind) for size in ((N, K), (24, N), (2 * 24, N))]
    if rounding:
        matrices = [QuantizedMatrix.of(matrix, rounding) for matrix in matrices]
    cut, by = ({"launch": SkinnyLaunch(*one) if one else None} for one in (launch, readers))
    squares, run = Squares(torch.empty(0)), torch.tensor([1], dtype=torch.int32)
    y = skinny_linear(x, matrices[0], residual_MN=residual, residual_scale=2.0, squares=squares, run=run, **cut)
    errors: Errors = {}
    for matrix, gated in ((matrices[1], False), (matrices[2], True)):
        given: dict[str, Any] = {"eps": 1e-5, "gated": gated}
        found = skinny_linear(y, matrix, squares=squares, **given, **by)
        errors[f"error {gated}"] = difference(found, plain_skinny_linear(y, matrix, **given))
        errors[f"summed by the reader {gated}"] = difference(found, skinny_linear(y, matrix, **given, **by))
    assert (squares.sums_MS is None) == (M == 1), "one row's norm needs none"
    if squares.sums_MS is not None:
        errors["squares"] = difference(squares.sums_MS.sum(1), y.double().pow(2).sum(1)) / N
        half = skinny_linear(y, matrices[1], squares=Squares(4 * squares.sums_MS), eps=4e-5, **by)
        errors["read"] = difference(2 * half, skinny_linear(y, matrices[1], squares=squares, eps=1e-5, **by))
        skinny_linear(y, matrices[1], squares=squares, launch=SkinnyLaunch(1, 4, 32, 4, 2))
        assert squares.sums_MS is None, "another result's squares are left"
    return errors


def gating(rows: int, columns: int) -> Errors:
    both = torch.randn(rows, 2 * columns)
    return {"error": difference(gate(both), plain_gate(both))}
