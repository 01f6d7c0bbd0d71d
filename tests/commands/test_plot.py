"""`blt plot`: what is drawn, read from the artists, and one rendering of each figure."""

import json
import logging
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bytelatent import BLT
from bytelatent.cli import app
from bytelatent.errors import UserError
from bytelatent.patching import PatchSettings
from bytelatent.report import compare_runs
from bytelatent.report.drawing import ON_PAPER, empty_figure, figure_file
from bytelatent.report.entropy_figure import ROW_BYTES, draw_entropies, glyph_rows, glyphs_of, write_entropies_figure
from bytelatent.report.figures import curves_of, draw_histogram, draw_runs
from bytelatent.study import write_row
from bytelatent.weights import Config, save
from tests.model.tiny import tiny_blt, tiny_byte_lm
from tests.report.report_texts import patched
from tests.report.test_runs import BLT_VALUES, BYTE_LM, ROWS, write_run
from tests.study.made_rows import made_row

ODD = "Ça שלום مرحبا 日本 👩‍👩‍👧 é́ \x00\x1b[31m\u202e $x_1$ \\alpha\n\t".encode() + b"\xff\xf0\x9f"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLT by entropy, one by spaces, and a byte LM."""
    folder = tmp_path_factory.mktemp("models")
    model, byte_lm = tiny_blt(), tiny_byte_lm()
    for name, patching in (("entropy", PatchSettings(threshold=5.12)), ("space", PatchSettings(mode="space"))):
        BLT(model, Config(model=model.settings, context=40, patching=patching), byte_lm).save_pretrained(folder / name)
    (folder / "byte_lm").mkdir()
    save(folder / "byte_lm", byte_lm, Config(model=byte_lm.settings, context=40))
    rows = [{"text": "The quick brown fox, again."}, {"text": "jumps"}]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plot(*arguments: object, given: bytes = b"") -> list[str]:
    """The files that `blt plot` says it wrote."""
    result = CliRunner().invoke(app, ["plot", *map(str, arguments)], input=given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


@given(st.binary(min_size=1, max_size=300) | st.text(min_size=1, max_size=100).map(lambda text: text.encode()))
def test_every_byte_belongs_to_one_character_of_one_row(text: bytes) -> None:
    rows = glyph_rows(glyphs_of(text))
    places = [place for row in rows for glyph in row for place in range(glyph.start, glyph.start + glyph.num_bytes)]
    assert places == list(range(len(text)))
    assert all(row[-1].start + row[-1].num_bytes - row[0].start <= ROW_BYTES for row in rows)
    assert all(glyph.text.isprintable() and glyph.text != " " for row in rows for glyph in row)


def test_what_cannot_be_drawn_is_a_number() -> None:
    shown = [glyph.text for glyph in glyphs_of("a é\u0301\u202e\U0001fbff\n".encode() + b"\xff")]
    assert shown == ["a", "␣", "é", "◌\u0301", "U+202E", "U+1FBFF", "↵", "FF"]


def test_long_texts_are_cut_between_characters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = "日".encode() * 500  # 1,200 bytes are 400 of them
    assert sum(glyph.num_bytes for glyph in glyphs_of(text)) == 1200
    text = b"x" + text
    assert sum(glyph.num_bytes for glyph in glyphs_of(text)) == 1 + 3 * 399
    short = b"ab" * 3
    with caplog.at_level(logging.WARNING):
        write_entropies_figure(tmp_path / "a.svg", short, patched(short, [2], [0.5] * 6), None)
    assert "the figure shows" not in caplog.text


def test_entropies_are_the_heights_of_bars_and_borders_are_starts() -> None:
    text, entropies = b"abcdefg", [0.1, 0.2, 3.0, 0.4, 0.5, 2.0, 0.7]
    _, axes = empty_figure(4, 2)
    glyphs = glyphs_of(text)
    draw_entropies(axes, glyphs, patched(text, [2, 5], entropies), 1.5, 7, ON_PAPER)
    assert [bar.get_height() for bar in axes.patches] == entropies
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx(range(7))
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[1] == colours[5] != colours[2] == colours[4]
    lines = [list(line.get_xdata()) for line in axes.get_lines() if line.get_linestyle() == "-"]
    assert lines == [[-0.5, -0.5], [1.5, 1.5], [4.5, 4.5]]
    [threshold] = [line for line in axes.get_lines() if line.get_linestyle() != "-"]
    assert list(threshold.get_ydata()) == [1.5, 1.5]
    assert [(text.get_text(), text.xy[0]) for text in axes.texts] == [(c, at) for at, c in enumerate("abcdefg")]
    _, second = empty_figure(4, 2)  # a row that begins inside a patch
    draw_entropies(second, glyphs[3:6], patched(text, [2, 5], entropies), None, 7, ON_PAPER)
    assert [bar.get_height() for bar in second.patches] == entropies[3:6]
    assert [list(line.get_xdata()) for line in second.get_lines()] == [[1.5, 1.5]]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_any_text_is_drawn(suffix: str, models: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out.{suffix}"
    assert plot("entropies", models / "entropy", "--out", out, given=ODD) == [str(out)]
    head = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert out.read_bytes().startswith(head)


def test_a_byte_lm_is_drawn_with_its_threshold(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plot("entropies", models / "byte_lm", "some words", "--threshold", 5.2) == ["entropies.png"]
    assert Path("entropies.png").stat().st_size > 0


def test_the_threshold_that_is_advised_can_be_given(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        plot("entropies", models / "byte_lm", "some words")
    advice = caplog.text.split("another one: ")[1].split()
    assert advice[0] == "--threshold"
    assert plot("entropies", models / "byte_lm", "some words", *advice[:2], "--out", "a.svg") == ["a.svg"]


def test_without_matplotlib_no_model_is_read(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bytelatent.cli import main

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for arguments in (["entropies", models / "byte_lm", "words"], ["patches", models / "space", models / "text.jsonl"]):
        monkeypatch.setattr("bytelatent.commands.plot.PatchingModes", None)
        with pytest.raises(SystemExit) as ended:
            main(["plot", *map(str, arguments), "--out", str(tmp_path / "a.png")])
        assert ended.value.code == 2
        assert "run: pip install matplotlib" in capsys.readouterr().err


def test_lengths_of_patches_of_several_models(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[dict[str, Counter[int]]] = []
    monkeypatch.setattr("bytelatent.commands.plot.write_patches_figure", lambda path, lengths: drawn.append(lengths))
    plot("patches", models / "entropy", models / "space", models / "text.jsonl", "--out", tmp_path / "a.png")
    monkeypatch.undo()
    [lengths] = drawn
    texts = ["The quick brown fox, again.", "jumps"]
    for name, counts in lengths.items():
        expected = Counter(p.end - p.start for text in texts for p in BLT.from_pretrained(name).patch(text))
        assert counts == expected
    assert [Path(name).name for name in lengths] == ["entropy", "space"]
    plot("patches", models / "space", models / "text.jsonl", "--out", tmp_path / "b.png", "--max-bytes", 10)
    assert (tmp_path / "b.png").stat().st_size > 0


def test_a_histogram_has_a_bar_for_each_length() -> None:
    _, axes = empty_figure(4, 3)
    draw_histogram(axes, {1: 5, 3: 4, 50: 1}, ON_PAPER)
    assert [bar.get_height() for bar in axes.patches] == [50.0, 0, 40.0, *[0] * 28, 10.0]
    assert [text.get_text() for text in axes.texts] == ["mean 6.70"]


@pytest.mark.parametrize("against", ["bytes", "flops", "seconds"])
def test_curves_of_runs(against: str, tmp_path: Path) -> None:
    write_run(tmp_path / "a$b", ROWS, BLT_VALUES)
    write_run(tmp_path / "c", ROWS[:3], {"model": BYTE_LM})
    runs = compare_runs([tmp_path]).runs
    curves = [(run.summary.name, *curves_of(run, against)) for run in runs]
    _, axes = empty_figure(5, 3)
    draw_runs(axes, curves, against, ON_PAPER)
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines() if line.get_label() == "a$b"]
    scale = {"bytes": 1.0, "flops": runs[0].summary.training_flops_per_byte, "seconds": None}[against]
    if scale is None:  # 1,000 bytes without a speed, 1,000 at 500 bytes per second, then at 1,000
        expected: tuple[Any, Any] = ([0.0, 2.0, 4.0, 6.0], [2.0, 4.0, 5.0, 6.0])
    else:
        expected = ([scale * x for x in (1000, 2000, 4000, 6000)], [scale * x for x in (2000, 4000, 5000, 6000)])
    assert drawn[0] == (pytest.approx(expected[0]), [8.0, 4.0, 3.0, 2.0])
    assert drawn[1] == (pytest.approx(expected[1]), [3.5, 2.5, 2.6, 2.75])
    assert {text.get_text() for text in axes.texts} == {"a$b", "c"}
    out = tmp_path / "runs.svg"
    assert plot("runs", tmp_path / "a$b", tmp_path / "c", "--against", against, "--out", out) == [str(out)]


def test_a_study_is_drawn_from_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn of them: tests/study/test_page.py."""
    monkeypatch.setattr("bytelatent.commands.plot.write_study", lambda rows, folder: [Path(folder), *rows])
    write_row(tmp_path, made_row())
    assert plot("study", tmp_path, "--out", tmp_path / "page") == [str(tmp_path / "page"), str(made_row())]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["entropies", "{models}/entropy", ""], "text: it is empty"),
        (["entropies", "{models}/space", "words"], "finds patches by 'space', without entropies; name a byte LM"),
        (["entropies", "nowhere", "words"], "'nowhere' is not a folder"),
        (["entropies", "{models}/entropy", "words", "--out", "a.gif"], "'a.gif' should end in one of .png"),
        (["patches", "{models}/byte_lm", "{models}/text.jsonl"], "is a byte LM, which has none; give one: --threshold"),
        (["patches", "{models}/space", "nothing.jsonl"], "'nothing.jsonl' does not exist"),
        (["patches", "{models}/space"], "missing argument"),
        (["runs", "{models}"], "holds no runs"),
        (["runs", "{models}", "--against", "time"], "against: Input should be 'bytes', 'flops' or 'seconds'"),
        (["study", "{models}"], "{models}' "),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from bytelatent.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["plot", *(argument.format(models=models) for argument in arguments)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2
    assert len(lines) == 1
    assert message.format(models=models) in lines[0]
    assert not list(tmp_path.iterdir())


def test_what_no_font_draws_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bytelatent.report.drawing._glyphs", lambda file: frozenset(range(256)))
    text = "a日".encode()
    with caplog.at_level(logging.WARNING):
        write_entropies_figure(tmp_path / "a.svg", text, patched(text, [1], [1.0] * 4), 0.5)
    assert "no font here has U+65E5; shown as their numbers" in caplog.text
    assert [glyph.text for glyph in glyphs_of(text)] == ["a", "U+65E5"]
    caplog.clear()
    assert [glyph.text for glyph in glyphs_of(b"a\x01\x1b")] == ["a", "U+0001", "U+001B"]
    assert not caplog.records
    with pytest.raises(UserError, match="cannot be written"), figure_file(tmp_path / "a.svg" / "b.png", 1, 1):
        pass
