"""Matrices of one byte a number: what a row is divided by is kept beside it, so that its largest number just fits.

Only memory is saved, and the time of reading it: kernels make floating-point numbers of the bytes, sum as they always
do, and multiply by a row's scale at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bytelatent.errors import UserError

# Shapes: N rows, a result each, K width of the states

Rounding = Literal["int8", "fp8"]
DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # -128 is left out: symmetric
SMALLEST = torch.finfo(torch.float32).tiny  # of a scale: below, a division by it would lose digits


@dataclass(frozen=True)
class QuantizedMatrix:
    """values * scale, row by row."""

    values: Tensor  # [N, K] int8 or float8_e4m3fn
    scale: Tensor  # [N] float32

    def __post_init__(self) -> None:
        assert self.values.dtype in LARGEST, f"values of {self.values.dtype}"
        assert self.scale.dtype == torch.float32, f"scales of {self.scale.dtype}"
        assert self.scale.shape == self.values.shape[:1], f"{len(self.scale)} scales of {len(self.values)} rows"

    @classmethod
    def of(cls, weight_NK: Tensor, rounding: Rounding, name: str = "the matrix") -> "QuantizedMatrix":
        """The nearest one with scale = max|row| / 127, or / 448.

        Args:
            name: of the matrix, for the error.

        Raises:
            UserError: it holds NaN or infinity.
        """
        dtype, weight_NK = DTYPES[rounding], weight_NK.float()
        highest_N = weight_NK.abs().amax(1)
        if not bool(highest_N.isfinite().all()):
            raise UserError(
                f"weights: {rounding} cannot hold '{name}', in which there is NaN or infinity; mend it, or use full"
            )
        scale_N = (highest_N / LARGEST[dtype]).clamp(min=SMALLEST)
        values_NK = weight_NK / scale_N[:, None]
        return cls((values_NK.round() if dtype == torch.int8 else values_NK).to(dtype), scale_N)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix, [N, K]."""
        exact_NK = self.values.to(dtype)  # both types' values are numbers of bfloat16 and of float16, too
        return torch.mul(exact_NK, self.scale[:, None], out=torch.empty_like(exact_NK))


Matrix = Tensor | QuantizedMatrix


def dense(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """A matrix as it is, or the numbers of a quantized one, [N, K]."""
    return matrix.dense(dtype) if isinstance(matrix, QuantizedMatrix) else matrix


def by_rows(arrange: Callable[..., Tensor], *matrices: Matrix) -> Matrix:
    """Rearrange whole rows, with their scales.

    Args:
        arrange: makes one tensor of several, without looking beyond their first axis.
    """
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    if not quantized:
        return arrange(*matrices)
    assert len(quantized) == len(matrices), "some matrices are quantized, others are not"
    values = [matrix.values.view(torch.int8) for matrix in quantized]  # float8 knows few operations
    return QuantizedMatrix(
        arrange(*values).view(quantized[0].values.dtype), arrange(*(matrix.scale for matrix in quantized))
    )
