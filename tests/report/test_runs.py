"""Comparison of runs, complete and corrupt."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bytelatent.config import flat
from bytelatent.errors import UserError
from bytelatent.model.flops import costs
from bytelatent.report import compare_runs, write_runs_figure
from bytelatent.report.figures import curves_of
from bytelatent.report.runs import _print, curve_points, find_runs
from bytelatent.training import read_metrics, train
from tests.training.tiny_runs import BLT, BYTE_LM, byte_lm_run, settings, write_text


def row(step: int, bits: float, rate: int | None, **more: Any) -> dict[str, Any]:
    return {"step": step, "bytes_seen": 1000 * step, "bits_per_byte": bits, "bytes_per_second": rate, **more}


def held_out(step: int, bits: float) -> dict[str, Any]:
    return {"step": step, "bytes_seen": 1000 * step, "validation_bits_per_byte": bits, "validation_bytes": 9}


ROWS = [
    row(1, 8.0, None, mean_patch_bytes=3.0),
    row(2, 4.0, 500, mean_patch_bytes=4.0),
    held_out(2, 3.5),
    {"step": 2, "bytes_seen": 2000, "kind": "statistics", "gradient_norms": {"a": 1.0}},
    row(4, 3.0, 1000, mean_patch_bytes=8.0),
    held_out(4, 2.5),
    held_out(5, 2.6),  # between two rows of training
    row(6, 2.0, 1000, mean_patch_bytes=4.0),
    held_out(6, 2.75),
]


def write_run(
    folder: Path, rows: list[dict[str, Any]], values: dict[str, Any] | None = None, corrupt: str = ""
) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows) + corrupt)
    if values is not None:
        written = settings({**byte_lm_run(folder, Path("text.jsonl"), steps=9), **values})
        (folder / "settings.yaml").write_text(written.to_yaml())
    return folder


BLT_VALUES: dict[str, Any] = {"model": BLT, "patching": {"mode": "space"}}


def shown(places: list[Path], width: int = 200) -> str:
    out = io.StringIO()
    compare_runs(places).show(Console(file=out, width=width))
    return out.getvalue()


def test_no_name_is_cut_on_a_narrow_terminal(tmp_path: Path) -> None:
    names = ["my_byte_lm_with_a_long_name", "my_byte_lm_[b]_with_another_name"]
    for place, name in enumerate(names):
        write_run(tmp_path / name, ROWS, {"checkpoint": {"every": 100 + place}})
    table, narrow = shown([tmp_path], 200), shown([tmp_path], 80)
    assert "│" in table
    assert "…" not in narrow
    assert "best held out  2.500 (step 4)" in narrow
    assert all(f"\n{name}\n" in f"\n{narrow}" for name in [*names, "checkpoint.every"])
    assert [line.split()[-1] for line in narrow.splitlines()[-2:]] == ["101", "100"]  # by name
    assert all(word in narrow for line in table.splitlines() for word in line.replace("│", " ").split() if "_" in word)


@pytest.mark.parametrize("caption", [None, "a line below"])
def test_numbers_end_at_the_right_and_text_begins_at_the_left(caption: str | None) -> None:
    for num_texts, ends in ((1, "   7"), (None, "7   ")):
        out = io.StringIO()
        table = [["name", "number"], ["ab", "7"], ["abcdef", "123456"]]
        _print(Console(file=out, width=80), table, caption=caption, num_texts=num_texts)
        [line] = [line for line in out.getvalue().splitlines() if " ab " in line]
        text, number = line.strip("│").split("│")
        assert text.startswith(" ab   ")
        assert ends in number


def test_what_a_run_has_come_to(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ROWS, BLT_VALUES)
    summary = compare_runs([run]).runs[0].summary
    parts = costs(settings({**byte_lm_run(run, Path("x")), **BLT_VALUES}).model, patch_bytes=4.0, context=64)
    assert vars(summary) == {
        "name": "a",
        "folder": str(run),
        "kind": "BLT",
        "num_parameters": sum(part.num_parameters for part in parts),
        "training_flops_per_byte": 3 * sum(part.flops_per_byte for part in parts),
        "steps": 6,
        "all_steps": 9,
        "num_bytes": 6000,
        "training_bits_per_byte": 2.0,
        "best_validation_bits_per_byte": 2.5,
        "best_validation_step": 4,
        "last_validation_bits_per_byte": 2.75,
        "bytes_per_second": 1000,
        "mean_patch_bytes": 4.0,
        "seconds": 1000 / 500 + 4000 / 1000,
    }
    table = shown([run])
    for part in ("6 of 9", "6 kB", "2.500 (step 4)", "2.750", "2.000", "1,000", "4.00", "6.0 s"):
        assert part in table
    assert "settings that differ" not in table


def test_settings_that_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", ROWS, {"seed": 3})
    write_run(tmp_path / "runs" / "two", ROWS, {"optimizer": {"lr": 0.25, "warmup_steps": 3}})
    found = compare_runs([tmp_path / "runs"])
    assert found.differing() == {"seed": [3, 0], "optimizer.lr": [0.003, 0.25]}
    assert [run.summary.name for run in found.runs] == ["one", "two"]
    assert json.loads(json.dumps(found.plain()))["differing_settings"]["optimizer.lr"] == [0.003, 0.25]
    assert "optimizer.lr" in shown([tmp_path / "runs"])


def test_models_of_two_kinds(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", ROWS, BLT_VALUES), write_run(tmp_path / "b", ROWS, {"model": BYTE_LM})]
    differing = compare_runs(runs).differing()
    assert differing["model.kind"] == ["blt", "byte_lm"]
    assert differing["model.encoder.dim"] == [16, None]
    assert "model.kind" in shown(runs)
    assert "model.encoder.dim" not in shown(runs)
    assert "patching" in shown(runs)


@pytest.mark.parametrize("corrupt", ['{"step": 7, "bits_', '{"step": 7}\xff\n', "17\n", "\x00\x00\x00\n", "[1]\n"])
@pytest.mark.parametrize("values", [BLT_VALUES, None])
def test_corrupt_files(tmp_path: Path, corrupt: str, values: dict[str, Any] | None) -> None:
    run = write_run(tmp_path / "a", [*ROWS, row(7, float("nan"), None)], values, corrupt)
    assert read_metrics(run / "metrics.jsonl")[: len(ROWS)] == ROWS
    summary = compare_runs([run]).runs[0].summary
    assert (summary.num_bytes, summary.training_bits_per_byte) == (7000, 2.0)
    assert (summary.kind is None) == (values is None)


def test_rows_after_a_corrupt_line_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [])
    (run / "metrics.jsonl").write_text('{"step": 1\n' + json.dumps(ROWS[-2]) + "\n")
    assert compare_runs([run]).runs[0].summary.training_bits_per_byte == 2.0


@pytest.mark.parametrize("damage", ["- a\n- b\n", "{", "model: {kind: other}\ndata: 3\n", "model: {kind: blt}\n", ""])
def test_corrupt_settings_and_no_rows(tmp_path: Path, damage: str) -> None:
    run = tmp_path / "a"
    run.mkdir()
    (run / "settings.yaml").write_text(damage)
    summary = compare_runs([run]).runs[0].summary
    assert (summary.num_parameters, summary.steps, summary.seconds) == (None, None, None)
    assert "a" in shown([run])


def test_runs_are_found_below(tmp_path: Path) -> None:
    for name in ("x", "x/inner", "y/deep/er", "x/checkpoints/no", "x/.hidden/no"):
        write_run(tmp_path / name, ROWS)
    assert [place.relative_to(tmp_path).as_posix() for place in find_runs(tmp_path)] == ["x", "x/inner", "y/deep/er"]
    names = [run.summary.name for run in compare_runs([tmp_path / "x", tmp_path / "y"]).runs]
    assert names == ["x", "x/inner", "deep/er"]
    assert len(compare_runs([tmp_path, tmp_path / "x"]).runs) == 3  # none twice
    write_run(tmp_path / "z" / "x", ROWS)
    names = [run.summary.name for run in compare_runs([tmp_path / "x", tmp_path / "z" / "x"]).runs]
    assert names == [str(tmp_path / "x"), "x/inner", str(tmp_path / "z" / "x")]


def test_no_runs_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs: no metrics"):
        compare_runs([tmp_path])
    with pytest.raises(UserError, match="does not exist"):
        compare_runs([tmp_path / "none"])


@pytest.mark.parametrize("against", ["bytes", "flops"])
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_the_figure(tmp_path: Path, against: str, ending: str) -> None:
    runs = compare_runs(
        [write_run(tmp_path / f"run{i}", ROWS, BLT_VALUES if i else {"model": BYTE_LM}) for i in range(2)]
    ).runs
    path = tmp_path / f"a.{ending}"
    write_runs_figure(path, runs, against)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    write_runs_figure(path, runs, against)
    assert path.read_bytes() == first
    scale = 1.0 if against == "bytes" else runs[0].summary.training_flops_per_byte
    assert scale is not None
    training, validation = curves_of(runs[0], against)
    assert training[0] == [scale * x for x in curve_points(ROWS, "bits_per_byte")[0]]
    assert validation == ([scale * x for x in (2000, 4000, 5000, 6000)], [3.5, 2.5, 2.6, 2.75])


def test_figures_of_nothing_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", ROWS)  # no settings, so no FLOPs
    for name, against, message in (
        ("a.gif", "bytes", "should end in one of .png"),
        ("a.png", "time", "use bytes or flops or seconds"),
        ("a.png", "flops", "no run has bits per byte to draw against flops"),
    ):
        with pytest.raises(UserError, match=message):
            write_runs_figure(tmp_path / name, compare_runs([run]).runs, against)
    assert [place.name for place in tmp_path.iterdir()] == ["a"]


def test_a_real_run(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl", seed=0)
    more = {"data": {"valid": str(text)}, "validation": {"every": 2}, "statistics_every": 2}
    run = train(settings(byte_lm_run(tmp_path / "run", text, steps=4, **more)))
    summary = compare_runs([run]).runs[0].summary
    rows = read_metrics(run / "metrics.jsonl")
    assert summary.steps == summary.all_steps == 4
    assert summary.last_validation_bits_per_byte == rows[-1]["validation_bits_per_byte"]
    assert summary.seconds is not None
    assert summary.seconds > 0


def test_flat_keys() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": {}}, "e": [{"f": 2}]}) == {"a.b.c": 1, "a.d": {}, "e": [{"f": 2}]}
    assert flat({"a": {"b": 1}}, between="/") == {"a/b": 1}


def test_runs_in_a_notebook(tmp_path: Path) -> None:
    (tmp_path / "a<b>").mkdir()
    (tmp_path / "a<b>" / "metrics.jsonl").write_text('{"step": 3, "bits_per_byte": 2.5, "bytes_seen": 100}\n')
    page = compare_runs([tmp_path])._repr_html_()
    assert "<td>a&lt;b&gt;</td>" in page
    assert "<td>2.500</td>" in page
    assert page.count("<th>") == 10
