"""What figures share: labels that stay apart, fonts, clocks, files."""

import logging
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from bytelatent.errors import UserError
from bytelatent.report import drawing
from bytelatent.report.drawing import (
    apart,
    averaged,
    clock,
    empty_figure,
    figure_file,
    figure_format,
    fonts_for,
    label_ends,
    scale_time,
)

heights = st.lists(st.floats(0, 1), max_size=12)


@given(heights, st.floats(0.001, 0.3))
def test_labels_keep_their_order_and_a_gap(wanted: list[float], gap: float) -> None:
    found = apart(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert all(found[b] - found[a] >= gap - 1e-9 for a, b in pairwise(order))
    if gap * (len(wanted) - 1) <= 1:
        assert all(-1e-9 <= height <= 1 + 1e-9 for height in found)


@given(st.lists(st.integers(0, 10), max_size=8, unique=True))
def test_labels_with_room_stay_where_they_are(places: list[int]) -> None:
    wanted = [place / 10 for place in places]
    assert apart(wanted, 0.1) == pytest.approx(wanted)


def test_labels_that_touch_move_as_little_as_it_takes() -> None:
    assert apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert apart([0.0, 0.0], 0.1) == pytest.approx([0.0, 0.1])
    assert apart([0.99, 1.0], 0.1) == pytest.approx([0.9, 1.0])


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    figure, axes = empty_figure(5, 3)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    label_ends(axes, [(1, height, f"line {height}", "#000000") for height in (0.5, 0.501, 0.502, 0.9)])
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert all(box.x0 >= axes.get_window_extent().x1 for box in boxes)
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0"), (1, "1 s"), (30, "30 s"), (60, "1 min"), (90, "1 min 30 s"), (3600, "1 h"), (5400, "1 h 30 min")],
)
def test_clock(seconds: float, words: str) -> None:
    assert clock(seconds) == words


@pytest.mark.parametrize("highest", [3, 50, 100, 4000, 50_000])
def test_ticks_of_time_are_few_and_round(highest: float) -> None:
    for scale in ("linear", "log"):
        _, axes = empty_figure(5, 3)
        axes.plot([highest / 100, highest], [1, 1])
        axes.set_xscale(scale)
        scale_time(axes, highest)
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert 2 <= len(ticks) <= 9
        assert all(abs(tick - round(tick, 1)) < 1e-9 for tick in ticks)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=2000))
def test_averages_keep_the_mean(values: list[float]) -> None:
    xs, ys = averaged(list(range(len(values))), values)
    assert len(xs) == len(ys) <= drawing.MOST_POINTS
    assert min(values) - 1e-9 <= min(ys) <= max(ys) <= max(values) + 1e-9


def test_the_usual_font_draws_several_scripts() -> None:
    assert fonts_for("abc é Ж ש ا") == (["DejaVu Sans"], set())


def test_characters_without_a_font_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "_glyphs", lambda file: frozenset(map(ord, "ab")))
    assert fonts_for("ab日") == (["DejaVu Sans"], {"日"})
    with caplog.at_level(logging.WARNING), figure_file(tmp_path / "a.svg", 2, 2, "ab日") as axes:
        axes.set_title("ab")
    assert "no font here has U+65E5; shown as boxes" in caplog.text


def test_names_are_no_formulas(tmp_path: Path) -> None:
    with figure_file(tmp_path / "a.svg", 2, 2) as axes:
        axes.set_title("$\\nothing{$ $x$")
    assert (tmp_path / "a.svg").stat().st_size > 0


def test_a_figure_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("before")
    with pytest.raises(ZeroDivisionError), figure_file(tmp_path / "a.png", 2, 2):
        _ = 1 / 0
    assert (tmp_path / "a.png").read_text() == "before"
    with pytest.raises(UserError, match=r"should end in one of \.png, \.svg, \.pdf"), figure_file(tmp_path / "a", 2, 2):
        pass


def test_without_matplotlib_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    message = r"figures need matplotlib \(.*\); run: pip install matplotlib"
    with pytest.raises(UserError, match=message), figure_file(tmp_path / "a.png", 2, 2):
        pass
    for needs_it in (lambda: figure_format(tmp_path / "a.png"), lambda: fonts_for("a"), lambda: empty_figure(2, 2)):
        with pytest.raises(UserError, match=message):
            needs_it()
