"""Power laws of bits per byte against training FLOPs, their bootstrap intervals, and where two of them cross.

    L(C) = E + A (C / C0)^-alpha        or, with few budgets,        L(C) = A (C / C0)^-alpha

by least squares of the logarithms, each budget weighted by its number of seeds. C0 is the largest budget of the study,
so that A is what is left above E there.

The bootstrap is one of seeds. The differences between seeds of one configuration and those between the points and the
laws are pooled into one relative standard deviation. Each replicate draws this deviation, which is itself an estimate,
then a point around the law for each budget, and is fitted as the data are. The held-out text is the same for all runs:
intervals hold for this text, and do not say how far another text would give other numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Shapes: R replicates, N budgets, G points of a grid; laws are [R, 3], their columns E, A and alpha

FEWEST_FOR_LIMIT = 5  # budgets for three parameters, so that two are left to see whether they fit
REPLICATES = 2000
LEVEL = 95  # percent, of intervals
FAR = 100.0  # crossings are sought up to this many times the largest budget
GRID = 400
STEPS = 60  # of the search for three parameters

Array = np.ndarray[Any, np.dtype[np.float64]]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Points:
    """The best runs of a family: what is fitted.

    Attributes:
        flops: training FLOPs that were spent, one per budget, increasing.
        bits: held-out bits per byte, means over seeds.
        num_seeds: at each budget.
    """

    flops: Sequence[float]
    bits: Sequence[float]
    num_seeds: Sequence[int]


@dataclass(frozen=True)
class FitNoise:
    """The relative deviation of a run from its law, and its degrees of freedom."""

    relative: float
    degrees: int


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law.

    Attributes:
        limit, scale, exponent: E, A and alpha. E is 0 in the form without it.
        reference: C0, FLOPs.
        has_limit: whether it is the form with E.
        form: which of the two forms it is, and why, in words.
        noise: from which the replicates are drawn.
        replicates: the laws of the bootstrap, [R, 3]; None if there is nothing to estimate the noise from.
        largest_distance: of a point from the law, relative.
    """

    limit: float
    scale: float
    exponent: float
    reference: float
    has_limit: bool
    form: str
    noise: FitNoise
    replicates: Array | None
    largest_distance: float

    def __call__(self, flops: Any) -> Array:
        """Bits per byte at some FLOPs."""
        return values_at(np.array([[self.limit, self.scale, self.exponent]]), flops, self.reference)[0]

    def band(self, flops: Any) -> tuple[Array, Array] | None:
        """The interval of the law at each of some FLOPs."""
        if self.replicates is None:
            return None
        low, high = np.quantile(values_at(self.replicates, flops, self.reference), _tails(), axis=0)
        return low, high

    @property
    def exponent_interval(self) -> Interval | None:
        return None if self.replicates is None else _interval(self.replicates[:, 2])

    @property
    def limit_interval(self) -> Interval | None:
        return None if self.replicates is None else _interval(self.replicates[:, 0])


@dataclass(frozen=True)
class Overtaking:
    """From how many training FLOPs on one law is at or below another.

    Attributes:
        flops: 0 if it is within the whole range, infinite if it is not at the range's end.
        interval: of `flops`; None without a bootstrap.
        lowest, highest: the range.
    """

    flops: float
    interval: Interval | None
    lowest: float
    highest: float


def values_at(laws: Array, flops: Any, reference: float) -> Array:
    """Bits per byte of some laws at some FLOPs, [R, G]."""
    logs = np.log(np.asarray(flops, dtype=float) / reference)
    limit, scale, exponent = (laws[:, [column]] for column in range(3))
    return limit + scale * np.exp(-exponent * logs)


def fit_power_laws(
    points: Mapping[str, Points], seeds: tuple[float, int] = (0.0, 0), replicates: int = REPLICATES, seed: int = 0
) -> dict[str, PowerLaw]:
    """Fit a law to each family with two budgets or more.

    Args:
        points: of each family, by its name.
        seeds: the sum of the squared deviations of log bits per byte between seeds, and its degrees of freedom.
        replicates: of the bootstrap.
        seed: of the bootstrap.
    """
    points = {name: own for name, own in points.items() if len(set(own.flops)) > 1}
    reference = max((max(own.flops) for own in points.values()), default=1.0)
    fits = {name: _fit(own, reference) for name, own in points.items()}
    noise = _noise(points, fits, reference, seeds)
    random = np.random.default_rng(seed)
    return {name: _power_law(own, fits[name], reference, noise, replicates, random) for name, own in points.items()}


def overtaking(one: PowerLaw, other: PowerLaw, lowest: float, highest: float) -> Overtaking:
    """From how many FLOPs on `one` is at or below `other`, up to `FAR` times `highest`.

    Args:
        lowest, highest: the budgets that were measured.
    """
    grid = np.geomspace(lowest, FAR * highest, GRID)
    [flops] = _last_crossings(np.log(one(grid)[None]) - np.log(other(grid)[None]), grid)
    interval = None
    if one.replicates is not None and other.replicates is not None:
        both = [np.log(values_at(law.replicates, grid, law.reference)) for law in (one, other)]  # pyright: ignore[reportArgumentType]
        # Without interpolation: some are 0 or infinite.
        low, high = np.quantile(_last_crossings(both[0] - both[1], grid), _tails(), method="inverted_cdf")
        interval = float(low), float(high)
    return Overtaking(float(flops), interval, lowest, float(grid[-1]))


def _last_crossings(distances: Array, grid: Array) -> Array:
    """Where each row of [R, G] is above 0 for the last time: 0 if nowhere, infinite if at the end."""
    above = distances > 0
    last = distances.shape[1] - 1 - above[:, ::-1].argmax(axis=1)
    inside = np.minimum(last, distances.shape[1] - 2)
    rows, logs = np.arange(len(distances)), np.log(grid)
    here, there = distances[rows, inside], distances[rows, inside + 1]
    share = np.clip(here / np.where(here == there, 1.0, here - there), 0, 1)
    found = np.exp(logs[inside] + share * (logs[inside + 1] - logs[inside]))
    return np.where(~above.any(axis=1), 0.0, np.where(above[:, -1], np.inf, found))


def _fit(points: Points, reference: float, bits: Array | None = None) -> Array:
    """The laws of some bits per byte, [R, N], or of the points' own, as [R, 3]."""
    x = np.log(np.asarray(points.flops, dtype=float) / reference)
    y = np.log(np.asarray(points.bits, dtype=float)[None] if bits is None else bits)
    weights = np.asarray(points.num_seeds, dtype=float) / sum(points.num_seeds)
    return (_with_limit if _has_limit(points) else _without_limit)(x, y, weights)


def _has_limit(points: Points) -> bool:
    return len(set(points.flops)) >= FEWEST_FOR_LIMIT


def _form(points: Points, law: Array) -> str:
    budgets = len(set(points.flops))
    if not _has_limit(points):
        return f"A (C/C₀)^-α, since {budgets} budgets are too few to know E ({FEWEST_FOR_LIMIT} are needed)"
    return f"E + A (C/C₀)^-α, with {budgets} budgets{'' if law[0] > 1e-3 * law[1] else '; the best E is 0'}"


def _noise(
    points: Mapping[str, Points], fits: Mapping[str, Array], reference: float, seeds: tuple[float, int]
) -> FitNoise:
    """Pool the differences between seeds and those of the points from their laws."""
    squares, degrees = seeds
    for name, own in points.items():
        distances = np.log(own.bits) - np.log(values_at(fits[name], own.flops, reference)[0])
        squares += float(np.sum(np.asarray(own.num_seeds) * distances**2))
        degrees += max(len(own.bits) - (3 if _has_limit(own) else 2), 0)
    return FitNoise(math.sqrt(squares / degrees) if degrees else 0.0, degrees)


def _power_law(
    points: Points, law: Array, reference: float, noise: FitNoise, replicates: int, random: np.random.Generator
) -> PowerLaw:
    expected, drawn = values_at(law, points.flops, reference), None
    if noise.degrees:
        deviation = noise.relative * np.sqrt(noise.degrees / random.chisquare(noise.degrees, (replicates, 1)))
        normal = random.standard_normal((replicates, len(points.bits)))
        drawn = _fit(points, reference, expected * np.exp(deviation * normal / np.sqrt(points.num_seeds)))
    distance = float(np.max(np.abs(np.asarray(points.bits) / expected - 1)))
    limit, scale, exponent = map(float, law[0])
    has_limit, form = _has_limit(points), _form(points, law[0])
    return PowerLaw(limit, scale, exponent, reference, has_limit, form, noise, drawn, distance)


def _without_limit(x: Array, y: Array, weights: Array) -> Array:
    """A straight line through logarithms."""
    centred = x - weights @ x
    slope = (y @ (weights * centred)) / (weights @ centred**2)
    scale = np.exp(y @ weights - slope * (weights @ x))
    return np.stack([np.zeros_like(slope), scale, -slope], axis=1)


def _with_limit(x: Array, y: Array, weights: Array) -> Array:
    """Three parameters, E and alpha not negative.

    L = A (ratio + exp(-alpha x)): log A is the weighted mean of what the rest leaves, so that two parameters, both
    positive, are sought: from the best of a grid by the method of Levenberg and Marquardt, all replicates at once.
    """
    x_mean = weights @ x  # near the middle, where exp(-alpha x) is about 1
    x = x - x_mean
    spread = float(np.ptp(x))
    low = np.log([1e-3 / spread, 1e-6])  # of alpha and the ratio
    high = np.log([50 / spread, 1e6])
    grid = np.stack(
        np.meshgrid(np.log(np.geomspace(0.02, 20, 50) / spread), np.log(np.geomspace(1e-4, 1e3, 50))), axis=-1
    ).reshape(-1, 2)
    shapes = _shapes(grid, x, weights)[0]
    centred = y - (y @ weights)[:, None]
    squares = (shapes**2 @ weights)[None] - 2 * centred @ (weights * shapes).T  # but for a constant
    found = grid[squares.argmin(axis=1)]
    damping = np.full(len(y), 1e-3)
    shape, slopes = _shapes(found, x, weights)
    left = centred - shape
    for _ in range(STEPS):
        weighted = slopes * weights
        matrix = np.einsum("rpn,rqn->rpq", weighted, slopes)
        diagonal = np.einsum("rpp->rp", matrix)
        matrix = matrix + np.eye(2) * (damping[:, None] * diagonal + 1e-30)[:, None]
        step = np.linalg.solve(matrix, np.einsum("rpn,rn->rp", weighted, left)[..., None])[..., 0]
        tried = np.clip(found + np.clip(step, -1, 1), low, high)
        tried_shape, tried_slopes = _shapes(tried, x, weights)
        tried_left = centred - tried_shape
        better = (tried_left**2) @ weights < (left**2) @ weights
        found, left = np.where(better[:, None], tried, found), np.where(better[:, None], tried_left, left)
        slopes = np.where(better[:, None, None], tried_slopes, slopes)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
    exponent, ratio = np.exp(found).T
    shape = np.log(ratio[:, None] + np.exp(-exponent[:, None] * x))
    scale = np.exp((y - shape) @ weights)
    return np.stack([ratio * scale, scale * np.exp(exponent * x_mean), exponent], axis=1)


def _shapes(logs: Array, x: Array, weights: Array) -> tuple[Array, Array]:
    """log(ratio + exp(-alpha x)) around its mean, [R, N], and its derivatives by log alpha and log ratio, [R, 2, N]."""
    alpha, ratio = np.exp(logs[:, [0]]), np.exp(logs[:, [1]])
    power = np.exp(-alpha * x)
    whole = ratio + power
    shape, slopes = np.log(whole), np.stack([-alpha * x * power / whole, ratio / whole + 0 * x], axis=1)
    return shape - (shape @ weights)[:, None], slopes - (slopes @ weights)[..., None]


def _tails() -> Interval:
    return (100 - LEVEL) / 200, (100 + LEVEL) / 200


def _interval(values: Array) -> Interval:
    low, high = np.quantile(values, _tails())
    return float(low), float(high)
