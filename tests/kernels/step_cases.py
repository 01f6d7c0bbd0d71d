"""Whole decode steps in Triton's interpreter: what kernels write beside plain PyTorch's engine."""

import torch

from bytelatent.inference import Engine, Sampling
from bytelatent.inference.step import packed_weights
from bytelatent.kernels import skinny_linear
from tests.inference.test_engine import decoder_of, engine_of, generated

packed_weights._laid_out = lambda matrix: matrix  # the kernels take no other layout


def steps(name: str, kind: str, prompts: list[str], new: int) -> dict[str, float]:
    """The bytes that differ, how far log-probabilities do, and the sums of squares that were left."""
    made, sampling = [], Sampling(temperature=1.0, seed=3)
    expected = generated(Engine.plain(decoder_of(name), len(prompts)), prompts, new, sampling)
    before = skinny_linear.Squares.__setattr__

    def counted(squares: skinny_linear.Squares, field: str, value: torch.Tensor | None) -> None:
        made.append(value is not None)
        before(squares, field, value)

    skinny_linear.Squares.__setattr__ = counted  # type: ignore[method-assign]
    try:
        found = generated(engine_of(decoder_of(name), kind, len(prompts)), prompts, new, sampling)
    finally:
        skinny_linear.Squares.__setattr__ = before  # type: ignore[method-assign]
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one.ids, other.ids, strict=True)]
    far = [
        abs(p - q)
        for one, other in zip(found, expected, strict=True)
        for p, q in zip(one.log_probabilities, other.log_probabilities, strict=True)
    ]
    return {"unequal": float(sum(a != b for a, b in pairs)), "error": max(far), "left": float(sum(made))}


def run(cases: list[tuple[str, dict]]) -> list[dict[str, float]]:
    return [steps(**arguments) for _, arguments in cases]
