"""The figures of a study: what is drawn, read from the artists."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from bytelatent.report.drawing import ON_PAPER, empty_figure
from bytelatent.study.analysis import Analysis, analyse
from bytelatent.study.figures import (
    DRAWINGS,
    bits_against_flops,
    bits_against_inference,
    bits_against_patch_size,
    bits_against_seconds,
    distance_against_flops,
    looks,
)
from tests.study.made_rows import BUDGETS, LAWS, made_row, made_rows


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(made_rows())


def drawn(draw: Callable[..., None], analysis: Analysis, labelled: bool = True) -> Any:
    _, axes = empty_figure(7.4, 4.6)
    draw(axes, ON_PAPER, analysis, labelled)
    return axes


def line(axes: Any, label: str) -> tuple[list[float], list[float]]:
    [found] = [line for line in axes.get_lines() if line.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


@pytest.mark.parametrize(
    ("draw", "x_of"),
    [
        (bits_against_flops, lambda run: run.mean("training_flops")),
        (bits_against_seconds, lambda run: run.mean("seconds")),
        (bits_against_inference, lambda run: run.row.inference_flops_per_byte / 1e6),
    ],
)
def test_each_family_is_drawn_through_its_best_runs(draw: Any, x_of: Any, analysis: Analysis) -> None:
    axes = drawn(draw, analysis)
    for family in analysis.families:
        xs, ys = line(axes, family.name)
        assert xs == pytest.approx([x_of(run) for run in family.best.values()])
        assert ys == pytest.approx([run.bits_per_byte for run in family.best.values()])
    assert {text.get_text() for text in axes.texts} >= {label for label, *_ in LAWS.values()}
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_laws_bands_and_crossing_are_those_of_the_fits(analysis: Analysis) -> None:
    axes = drawn(bits_against_flops, analysis)
    blt = analysis.best("blt")
    assert blt is not None
    law = analysis.laws[blt.name]
    for part in ("law", "beyond"):
        xs, ys = line(axes, f"{blt.name}: {part}")
        assert ys == pytest.approx(list(law(xs)))
    crossing = analysis.crossing(blt)
    assert crossing is not None
    assert line(axes, "crossing") == ([crossing.flops], [pytest.approx(float(law([crossing.flops])[0]))])
    assert max(line(axes, f"{blt.name}: beyond")[0]) == pytest.approx(1.5 * crossing.flops)
    bands = [found for found in axes.collections if isinstance(found, PolyCollection)]
    assert len(bands) == 2  # of the best token LM and the best BLT
    band = law.band([1e16])
    assert band is not None
    heights = bands[1].get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(float(band[1][0]), rel=1e-2)


def test_distances_and_their_noise(analysis: Analysis) -> None:
    axes = drawn(distance_against_flops, analysis)
    for family in analysis.families:
        found = analysis.distances(family)
        if family.name == "token-16k":  # the best at each budget
            assert family.name not in {line.get_label() for line in axes.get_lines()}
            continue
        assert line(axes, family.name) == (list(BUDGETS), [it.bits for it in found.values()])
        for budget, it in found.items():
            assert it.noise is not None
            ends = [budget, budget], [it.bits - it.noise, it.bits + it.noise]
            assert ends in [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_whiskers_span_the_seeds(analysis: Analysis) -> None:
    axes = drawn(bits_against_flops, analysis)
    spans = [tuple(line.get_ydata()) for line in axes.get_lines() if line.get_label().startswith("_")]
    bits = {
        family.name: [row.held_out.bits_per_byte for row in family.best[1e16].rows if row.held_out is not None]
        for family in analysis.families
    }
    assert sorted(spans) == sorted((min(values), max(values)) for values in bits.values())


def test_patch_sizes_have_a_line_for_each_budget(analysis: Analysis) -> None:
    axes = drawn(bits_against_patch_size, analysis)
    for budget in BUDGETS:
        xs, ys = line(axes, f"{budget:g}")
        assert xs == pytest.approx([3.3, 4.5, 6.0, 8.0])
        entropy = [family for family in analysis.families if family.mode == "entropy"]
        assert ys == pytest.approx([family.best[budget].bits_per_byte for family in entropy])
    points = [line for line in axes.get_lines() if line.get_label() == "flat"]
    assert [list(line.get_xdata()) for line in points] == [[1.0]] * 3


def test_families_look_different(analysis: Analysis) -> None:
    found = looks(analysis.families, ON_PAPER)
    assert len({(look.colour, look.marker, str(look.dashes), look.fill) for look in found.values()}) == len(LAWS)
    assert len({look.colour for name, look in found.items() if name.startswith("entropy")}) == 1
    assert len({look.colour for look in found.values()}) == 5  # a hue for each kind


def test_on_narrow_screens_names_are_below(analysis: Analysis) -> None:
    axes = drawn(bits_against_flops, analysis, labelled=False)
    [legend] = axes.figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {label for label, *_ in LAWS.values()}
    assert not {text.get_text() for text in axes.texts} & {label for label, *_ in LAWS.values()}


@pytest.mark.parametrize("draw", DRAWINGS.values())
def test_a_single_run_is_drawn(draw: Any) -> None:
    axes = drawn(draw, analyse([made_row()]))
    assert any(np.size(line.get_xdata()) for line in axes.get_lines())
    axes.figure.draw_without_rendering()
