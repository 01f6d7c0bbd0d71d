"""From logits to an id."""

from collections import Counter

import numpy as np
import pytest
import torch

from bytelatent.errors import UserError
from bytelatent.inference import Sampling
from bytelatent.inference.sampling import sample
from bytelatent.vocab import BOE, BOS, BPE_DELIMITER, EOS

SPECIAL = [BOE, BOS, BPE_DELIMITER]


def draws(logits: torch.Tensor, sampling: Sampling, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return [sample(logits, sampling, generator) for _ in range(count)]


def few_likely(*probabilities: float) -> torch.Tensor:
    """Logits of ids 100, 101, ... with these probabilities; what is left goes to BOS, which may not be drawn."""
    logits = torch.full([260], -40.0)
    logits[100 : 100 + len(probabilities)] = torch.tensor(probabilities).log()
    logits[BOS] = np.log(max(1 - sum(probabilities), 1e-9))
    return logits


@pytest.mark.parametrize("seed", range(20))
def test_temperature_zero_takes_the_likeliest(seed: int) -> None:
    logits = torch.randn(260, generator=torch.Generator().manual_seed(seed))
    logits[SPECIAL] = 10.0
    allowed = [i for i in range(260) if i not in SPECIAL]
    best = max(allowed, key=lambda i: float(logits[i]))
    assert draws(logits, Sampling(temperature=0), 2) == [best, best]


def test_special_ids_are_never_drawn_but_eos_is() -> None:
    logits = torch.zeros(260)
    logits[:4] = 5.0
    for sampling in (Sampling(temperature=1), Sampling(temperature=1, top_k=3), Sampling(temperature=1, top_p=0.5)):
        drawn = set(draws(logits, sampling, 200))
        assert not drawn & set(SPECIAL)
        assert EOS in drawn


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(260, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    draws(logits, Sampling(top_k=5), 1)
    assert logits.equal(before)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"top_k": 1}, {100}),
        ({"top_k": 2}, {100, 101}),
        ({"top_k": 1000}, {100, 101, 102, 103}),
        ({"top_p": 0.3}, {100}),
        ({"top_p": 0.41}, {100, 101}),  # the first that reaches the share is still in
        ({"top_p": 0.75}, {100, 101, 102}),
        ({"top_p": 1.0}, {100, 101, 102, 103}),
        ({"top_p": 0.75, "top_k": 2}, {100, 101}),
        ({"top_p": 0.3, "top_k": 2}, {100}),
    ],
)
def test_top_k_and_top_p(sampling: dict[str, float], allowed: set[int]) -> None:
    logits = few_likely(0.4, 0.3, 0.2, 0.1)
    assert set(draws(logits, Sampling(temperature=1, **sampling), 200)) == allowed  # type: ignore[arg-type]


def test_seed() -> None:
    logits = torch.zeros(260)
    assert draws(logits, Sampling(seed=1), 20) == draws(logits, Sampling(seed=1), 20)
    assert draws(logits, Sampling(seed=1), 20) != draws(logits, Sampling(seed=2), 20)


@pytest.mark.parametrize(
    ("sampling", "probabilities"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        # p^(1/T), normalised again
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9]),
    ],
)
def test_frequencies(sampling: dict[str, float], probabilities: list[float]) -> None:
    """Chi-square; the bounds are the 99.9 % points for one to three degrees of freedom."""
    count = 4000
    # BOS would be as likely as all the others together; what is left when it is ruled out keeps its proportions.
    counts = Counter(draws(few_likely(0.2, 0.15, 0.1, 0.05), Sampling(**sampling), count))  # type: ignore[arg-type]
    expected = [count * p for p in probabilities]
    statistic = sum((counts[100 + i] - e) ** 2 / e for i, e in enumerate(expected))
    assert sum(counts[100 + i] for i in range(len(expected))) == count
    assert statistic < {2: 10.83, 3: 13.82, 4: 16.27}[len(expected)]


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"topk": 1}])
def test_wrong_values(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling.parse(values)
