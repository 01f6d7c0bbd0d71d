"""Best runs, noise and distances of made-up rows, by hand."""

import math
from typing import Any

import pytest

from bytelatent.errors import UserError
from bytelatent.study.analysis import analyse, crossing_in_words
from bytelatent.study.best import best_of, families, seed_noise
from bytelatent.study.fit import Overtaking
from tests.study.made_rows import LAWS, held_out, made_row, made_rows


def test_the_best_is_chosen_by_the_text_for_tuning_alone() -> None:
    rows = [
        made_row(bits=1.20, name="a", tuning=held_out(1.31)),
        made_row(bits=1.25, name="b", tuning=held_out(1.30), settings={"optimizer": {"lr": 2e-3}}),
        made_row(bits=1.00, name="trial", held_out=None, tuning=held_out(1.0)),
    ]
    [family] = families(rows)
    best = family.best[1e16]
    assert ([row.name for row in best.rows], best.bits_per_byte, best.num_configurations) == (["b"], 1.25, 2)
    assert analyse(rows).num_trials == 1


def test_seeds_of_a_configuration_are_averaged() -> None:
    """Paths and calibrated thresholds differ between machines, and nothing depends on them."""

    def settings(seed: int) -> dict[str, Any]:
        paths = {"run": f"runs/{seed}", "data": {"train": f"{seed}.jsonl"}, "entropy_model": f"models/{seed}"}
        patching = {"mode": "entropy", "threshold": 1 + seed / 1000}
        return {"seed": seed, "patching": patching, "calibration": {"patch_bytes": 4.5}, **paths}

    rows = [made_row(seed=seed, bits=bits, settings=settings(seed)) for seed, bits in enumerate((1.1, 1.2, 1.6))]
    best = families(rows)[0].best[1e16]
    assert best.bits_per_byte == pytest.approx(1.3)
    assert best.category_bits("code") == pytest.approx(1.3 * 0.7)
    assert best.category_bits("poems") is None
    assert best.mean("training_flops") == pytest.approx(1e16 * 1.002)
    assert best.num_configurations == 1


def test_noise_is_pooled_at_the_smallest_budget_with_seeds() -> None:
    assert seed_noise(families([made_row(), made_row("flat")])) is None
    rows = [made_row(seed=seed, bits=bits) for seed, bits in enumerate((1.1, 1.2))]
    rows += [made_row("flat", seed=seed, bits=bits) for seed, bits in enumerate((1.3, 1.5, 1.7))]
    rows += [made_row(budget=1e17, seed=seed, bits=bits) for seed, bits in enumerate((1.0, 2.0))]
    noise = seed_noise(families(rows))
    assert noise is not None
    assert noise.standard_deviation == pytest.approx(math.sqrt((2 * 0.05**2 + 2 * 0.2**2) / 3))
    assert (noise.budget, noise.num_runs, noise.num_configurations) == (1e16, 5, 2)


def test_families_have_an_order() -> None:
    found = families(list(reversed(made_rows(budgets=(1e16,), seeds=1))))
    assert [family.name for family in found] == list(LAWS)
    assert {family.mode for family in found} == {"token_lm", "byte_lm", "entropy", "space", "static"}
    best = best_of(found, "token_lm", 1e16)
    assert best is not None
    assert best.name == min(("token-8k", "token-16k", "token-32k"), key=lambda name: found_bits(found, name))
    assert best_of(found, "blt", 3e17) is None


def found_bits(found: list, name: str) -> float:
    return next(family.best[1e16].bits_per_byte for family in found if family.name == name)


def test_distances_and_crossing_of_known_laws() -> None:
    analysis = analyse(made_rows(noise=0.0, seeds=2))
    blt = analysis.best("blt")
    assert blt is not None
    assert blt.name == "entropy-4.5"
    distances = [distance.bits for distance in analysis.distances(blt).values()]
    tokens = ("token-8k", "token-16k", "token-32k")
    expected = [
        LAWS["entropy-4.5"][3][1] * (budget / 1e17) ** -0.074
        - min(LAWS[name][3][1] * (budget / 1e17) ** -LAWS[name][3][2] for name in tokens)
        for budget in (1e16, 3e16, 1e17)
    ]
    assert distances == pytest.approx(expected)
    crossing = analysis.crossing(blt)
    assert crossing is not None
    assert crossing.flops == pytest.approx(1e17 * (1.088 / 1.062) ** (1 / (0.074 - 0.055)), rel=0.02)  # FLOPs of seeds
    summary = " ".join(analysis.summary())
    for words in (
        "1.062 bits per byte",
        "1.088: 0.026 above it",
        "+0.026 ± 0.000 at 10¹⁷",
        "from 3.6×10¹⁷ training FLOPs on",
    ):
        assert words in summary
    assert analysis.crossing(analysis.best("token_lm")) is None  # type: ignore[arg-type]


def test_one_budget_or_one_side_alone() -> None:
    lone = analyse([made_row()])
    assert (lone.laws, lone.distances(lone.families[0])) == ({}, {})
    assert lone.summary() == ["No token LM has finished yet, so that there is nothing to compare."]
    both = analyse([made_row(bits=1.1), made_row("token-8k", bits=1.2)])
    assert both.crossing(both.families[1]) is None
    [line] = both.summary()
    assert "0.100 below it. Seed noise is unknown, since no configuration has several seeds." in line
    with pytest.raises(UserError, match="no row has bits per byte of held-out text"):
        analyse([made_row(held_out=None)])


@pytest.mark.parametrize(
    ("flops", "interval", "words", "interval_words"),
    [
        (3e17, (2e17, math.inf), "is at or below T from 3×10¹⁷ training FLOPs on", "2×10¹⁷ to beyond 10¹⁹"),
        (math.inf, None, "does not cross T within 10¹⁹ training FLOPs, 100 times the largest budget", None),
        (math.inf, (math.inf,) * 2, "does not cross T within 10¹⁹ training FLOPs, 100 times ...", "beyond 10¹⁹"),
        (0.0, (0.0, 2e16), "is at or below T everywhere between 10¹⁶ and 10¹⁹", "below 10¹⁶ to 2×10¹⁶"),
    ],
)
def test_crossings_in_words(
    flops: float, interval: tuple[float, float] | None, words: str, interval_words: str | None
) -> None:
    shown = crossing_in_words(Overtaking(flops, interval, 1e16, 1e19), "T")
    assert (" (without an interval: " in shown) == (interval is None)
    found, _, rest = shown.partition(" (95 % interval of the crossing: ")
    assert found.startswith(words.removesuffix("..."))
    assert rest == ("" if interval_words is None else f"{interval_words})")
