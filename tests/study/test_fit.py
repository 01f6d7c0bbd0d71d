"""Power laws against data of known laws, numpy.polyfit, a slow search, and the coverage of their intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent.study.fit import Overtaking, Points, PowerLaw, _fit, fit_power_laws, overtaking

FLOPS = np.geomspace(1e15, 1e18, 7)
exponents = st.floats(0.01, 0.5)


def points(bits: "np.ndarray", flops: "np.ndarray", num_seeds: list[int] | None = None) -> Points:
    return Points(list(flops), list(bits), num_seeds or [1] * len(flops))


def fitted(own: Points, seeds: tuple[float, int] = (0.0, 0), replicates: int = 50, seed: int = 0) -> PowerLaw:
    return fit_power_laws({"one": own}, seeds, replicates, seed)["one"]


def exact(scale: float, exponent: float, limit: float = 0.0, flops: "np.ndarray" = FLOPS[:4]) -> PowerLaw:
    """A law without noise."""
    return fitted(points(limit + scale * (flops / flops[-1]) ** -exponent, flops))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.5, 3.0), min_size=2, max_size=4), st.data())
def test_two_parameters_are_those_of_polyfit(bits: list[float], data: st.DataObject) -> None:
    flops, num_seeds = FLOPS[: len(bits)], [data.draw(st.integers(1, 4)) for _ in bits]
    law = fitted(points(np.array(bits), flops, num_seeds))
    slope, offset = np.polyfit(np.log(flops / flops[-1]), np.log(bits), 1, w=np.sqrt(num_seeds))
    assert law.exponent == pytest.approx(-slope, abs=1e-9)
    assert law.scale == pytest.approx(math.exp(offset))
    assert law.limit == 0
    assert law.form.startswith(f"A (C/C₀)^-α, since {len(bits)} budgets are too few")


@settings(max_examples=40, deadline=None)
@given(st.floats(0.2, 1.5), st.floats(0.1, 2.0), st.floats(0.05, 1.0))
def test_three_parameters_of_a_known_law(limit: float, scale: float, exponent: float) -> None:
    law = fitted(points(limit + scale * (FLOPS / FLOPS[-1]) ** -exponent, FLOPS))
    assert (law.limit, law.scale, law.exponent) == pytest.approx((limit, scale, exponent), rel=1e-3)
    assert law.largest_distance < 1e-6
    assert law.form == "E + A (C/C₀)^-α, with 7 budgets"


def test_a_law_without_a_limit_has_the_limit_0() -> None:
    law = fitted(points(1.1 * (FLOPS / FLOPS[-1]) ** -0.06, FLOPS))
    assert law.limit < 1e-3
    assert law.exponent == pytest.approx(0.06, rel=1e-3)
    assert law.form.endswith("the best E is 0")


@pytest.mark.parametrize("seed", range(4))
def test_three_parameters_are_the_best_of_a_slow_search(seed: int) -> None:
    """Each limit and exponent of a fine grid, in logarithms; the scale of each is exact."""
    random = np.random.default_rng(seed)
    num_seeds = random.integers(1, 4, 7)
    bits = (0.6 + 0.5 * (FLOPS / FLOPS[-1]) ** -0.2) * np.exp(random.normal(0, 0.01, 7))
    x, y, weights = np.log(FLOPS / FLOPS[-1]), np.log(bits), num_seeds / num_seeds.sum()
    [[limit, scale, exponent]] = _fit(points(bits, FLOPS, list(num_seeds)), FLOPS[-1])

    def squares(ratio: "np.ndarray | float", alpha: "np.ndarray | float") -> "np.ndarray":
        left = y - np.log(np.expand_dims(ratio, -1) + np.exp(-np.expand_dims(alpha, -1) * x))
        return ((left - (left @ weights)[..., None]) ** 2) @ weights

    ratios, alphas = np.meshgrid(np.geomspace(1e-6, 1e3, 400), np.geomspace(1e-3, 2, 400))
    slow = squares(ratios, alphas).min()
    assert squares(limit / scale, exponent) <= slow
    assert np.exp(y @ weights) == pytest.approx(np.exp(weights @ np.log(limit + scale * np.exp(-exponent * x))))


def coverage(law: PowerLaw, flops: "np.ndarray", num_seeds: list[int], far: float, tries: int) -> tuple[float, float]:
    """How often the intervals of the exponent, and of the law at some FLOPs, hold the true values."""
    random, deviation, hits = np.random.default_rng(7), 0.004, np.zeros(2)
    for number in range(tries):
        seeds = random.normal(0, deviation, (3, 3))  # three other configurations with three seeds each
        squares = float(((seeds - seeds.mean(1, keepdims=True)) ** 2).sum())
        bits = law(flops) * np.exp(random.normal(0, deviation, len(flops)) / np.sqrt(num_seeds))
        found = fitted(points(bits, flops, num_seeds), (squares, 6), 300, number)
        low, high = found.exponent_interval or (math.nan, math.nan)
        (lowest,), (highest,) = found.band([far]) or ([math.nan], [math.nan])
        hits += [low <= law.exponent <= high, lowest <= law([far])[0] <= highest]
    return hits[0] / tries, hits[1] / tries


def test_the_interval_holds_the_truth_in_95_of_100_cases() -> None:
    """With 500 cases, 3 standard errors are 2.9 %."""
    flops = FLOPS[:3]
    of_exponent, of_law = coverage(exact(1.1, 0.07, flops=flops), flops, [3, 1, 1], 1e18, 500)
    assert 0.921 <= of_exponent <= 0.979
    assert 0.921 <= of_law <= 0.979


def test_the_interval_with_a_limit_holds_the_truth_about_as_often() -> None:
    of_exponent, of_law = coverage(exact(0.5, 0.2, 0.6, FLOPS), FLOPS, [3, 1, 1, 1, 1, 1, 1], 1e19, 60)
    assert 0.87 <= of_exponent <= 1
    assert 0.87 <= of_law <= 1


def test_without_seeds_and_budgets_to_spare_there_are_no_intervals() -> None:
    law = fitted(points(np.array([1.3, 1.2]), FLOPS[:2]))
    assert law.replicates is None
    assert (law.exponent_interval, law.limit_interval, law.band([1e18])) == (None, None, None)
    assert overtaking(law, exact(1.0, 0.1), 1e15, 1e16).interval is None
    assert fit_power_laws({"one budget": points(np.array([1.3]), FLOPS[:1])}) == {}


@settings(max_examples=60, deadline=None)
@given(st.floats(0.8, 1.6), exponents, st.floats(0.8, 1.6), exponents)
def test_crossings_are_where_two_laws_meet(a: float, alpha: float, b: float, beta: float) -> None:
    one, other = exact(a, alpha), exact(b, beta)
    lowest, highest = FLOPS[0], FLOPS[3]
    found = overtaking(one, other, lowest, highest)
    assert found.highest == pytest.approx(100 * highest)
    if alpha > beta * (1 + 1e-9):
        meets = highest * (a / b) ** (1 / (alpha - beta))
        if lowest * 1.001 < meets < found.highest / 1.001:
            assert found.flops == pytest.approx(meets, rel=1e-6)
        elif meets < lowest / 1.001:
            assert found.flops == 0
        elif meets > found.highest * 1.001:
            assert math.isinf(found.flops)
    elif float(one([found.highest])[0]) > float(other([found.highest])[0]) * (1 + 1e-9):
        assert math.isinf(found.flops)  # it does not fall faster: above at the end of the range


def test_the_interval_of_a_crossing() -> None:
    """Of a certain one it is around it; of one that the noise hides it is open."""
    random = np.random.default_rng(0)
    flops, num_seeds = FLOPS[:4], [1] * 4

    def crossing(alpha: float, noise: float) -> Overtaking:
        own = {
            name: points(law(flops) * np.exp(random.normal(0, noise, 4)), flops, num_seeds)
            for name, law in (("one", exact(1.1, alpha)), ("other", exact(1.0, 0.05)))
        }
        laws = fit_power_laws(own, (10 * noise**2, 10))
        return overtaking(laws["one"], laws["other"], flops[0], flops[-1])

    clear = crossing(0.15, 0.002)
    assert clear.interval is not None
    assert clear.interval[0] < flops[-1] * 1.1**10 < clear.interval[1]
    assert clear.interval[1] / clear.interval[0] < 2
    hidden = crossing(0.06, 0.01)
    assert hidden.interval is not None
    assert math.isinf(hidden.interval[1])


def test_a_bootstrap_gives_the_same_numbers_again() -> None:
    own = points(np.array([1.3, 1.25, 1.12]), FLOPS[:3])
    assert fitted(own).exponent_interval == fitted(own).exponent_interval
    assert fitted(own).exponent_interval != fitted(own, seed=1).exponent_interval
