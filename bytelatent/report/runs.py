"""Comparison of training runs: their results, and the settings in which they differ."""

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from bytelatent.config import flat, load_yaml, shorten
from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.log import Console
from bytelatent.model import settings_class
from bytelatent.model.flops import costs
from bytelatent.model.settings import NAMES
from bytelatent.report.text import UNKNOWN, amount_of_bytes, duration, finite, number
from bytelatent.run_folder import read_metrics

FILES = {"metrics.jsonl", "settings.yaml"}  # a folder with either is a run
NOT_SEARCHED = {"checkpoints", "profiles", "tensorboard", "wandb", "code"}
LONGEST = 40  # characters of a setting in a table
UNLIMITED = 10_000  # columns
RESULTS_CAPTION = "bits per byte of held-out and training text; bytes per patch or token; time spent in steps"
BITS = "bits_per_byte"
VALIDATION = "validation_bits_per_byte"


@dataclass(frozen=True)
class RunSummary:
    """The results of a run; None for what its files do not state.

    Attributes:
        seconds: spent in steps, from the rows with a speed.
        bytes_per_second, mean_patch_bytes: medians over all rows.
        training_flops_per_byte: three forward passes, at the mean patch size.
    """

    name: str
    folder: str
    kind: str | None
    num_parameters: int | None
    training_flops_per_byte: float | None
    steps: int | None
    all_steps: int | None
    num_bytes: int | None
    training_bits_per_byte: float | None
    best_validation_bits_per_byte: float | None
    best_validation_step: int | None
    last_validation_bits_per_byte: float | None
    bytes_per_second: float | None
    mean_patch_bytes: float | None
    seconds: float | None


@dataclass(frozen=True)
class ComparedRun:
    summary: RunSummary
    rows: list[dict[str, Any]]
    settings: dict[str, Any]  # by their whole keys


@dataclass(frozen=True)
class Comparison:
    runs: list[ComparedRun]

    def differing(self) -> dict[str, list[Any]]:
        """The settings in which the runs differ, with the value of each run; None if it is not set."""
        keys = sorted({key for run in self.runs for key in run.settings} - {"run"})
        found = {key: [run.settings.get(key) for run in self.runs] for key in keys}
        return {key: values for key, values in found.items() if any(value != values[0] for value in values)}

    def plain(self) -> dict[str, Any]:
        return {"runs": [asdict(run.summary) for run in self.runs], "differing_settings": self.differing()}

    def show(self, console: Console) -> None:
        """Print tables, or lists if the tables are too wide for the terminal, so that no name is cut."""
        _print(console, self._results(), caption=RESULTS_CAPTION, num_texts=2)
        # Sizes of parts are comparable only if all models have these parts.
        differing = {
            key: values
            for key, values in self.differing().items()
            if not key.startswith("model.") or all(key in run.settings for run in self.runs)
        }
        if differing:
            names = [run.summary.name for run in self.runs]
            rows = [["setting", *names], *([key, *map(_short, values)] for key, values in differing.items())]
            _print(console, rows, title="settings that differ")

    def _repr_html_(self) -> str:
        """The results as a table, for notebooks."""
        header, *rows = [[html.escape(cell) for cell in row] for row in self._results()]
        lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
        head, body = "".join(f"<th>{cell}</th>" for cell in header), "".join(f"<tr>{line}</tr>" for line in lines)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><div>{RESULTS_CAPTION}</div>"

    def _results(self) -> list[list[str]]:
        header = ["run", "model", "steps", "read", "best held out", "last", "training", "bytes/s", "patch", "time"]
        return [header, *(_result(run.summary) for run in self.runs)]


def _result(run: RunSummary) -> list[str]:
    size = UNKNOWN if run.num_parameters is None else f"{run.num_parameters / 1e6:,.1f} M"
    steps = UNKNOWN if run.steps is None else f"{run.steps:,}"
    if run.steps is not None and run.all_steps and run.steps < run.all_steps:
        steps += f" of {run.all_steps:,}"
    best = number(run.best_validation_bits_per_byte, 3)
    if run.best_validation_step is not None:
        best += f" (step {run.best_validation_step:,})"
    return [
        run.name,
        UNKNOWN if run.kind is None else f"{run.kind}, {size}",
        steps,
        amount_of_bytes(run.num_bytes),
        best,
        number(run.last_validation_bits_per_byte, 3),
        number(run.training_bits_per_byte, 3),
        UNKNOWN if run.bytes_per_second is None else f"{run.bytes_per_second:,.0f}",
        number(run.mean_patch_bytes),
        duration(run.seconds),
    ]


def _print(
    console: Console,
    rows: list[list[str]],
    title: str | None = None,
    caption: str | None = None,
    num_texts: int | None = None,
) -> None:
    """Print rows, the first being the header, as a table, or as lists if the table is wider than the terminal.

    Args:
        num_texts: number of left-aligned columns at the left; the others are right-aligned. None: all are text.
    """
    header, *others = [[escape(cell) for cell in row] for row in rows]
    table = Table(title=title, caption=caption)
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if num_texts is None or place < num_texts else "right")
    for row in others:
        table.add_row(*row)
    if Measurement.get(console, console.options.update(max_width=UNLIMITED), table).maximum <= console.width:
        console.print(table)
        return
    if title:
        console.print(f"\n{title}", highlight=False)
    for row in others:
        console.print(f"[bold]{row[0]}[/]", highlight=False, soft_wrap=True)
        width = max(len(name) for name in header[1:])
        for name, cell in zip(header[1:], row[1:], strict=True):
            console.print(f"  {name:<{width}}  {cell}", highlight=False, soft_wrap=True)
    if caption:
        console.print(caption, highlight=False, soft_wrap=True)


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read the runs in some folders and below them.

    Raises:
        UserError: a folder does not exist, or holds no runs.
    """
    named: dict[Path, str] = {}
    for place in folders:
        if not place.is_dir():
            raise UserError(f"runs: '{place}' does not exist; name the folders of runs, or one that holds them")
        found = find_runs(place)
        if not found:
            raise UserError(f"runs: '{place}' holds no runs: no {' or '.join(sorted(FILES))} in it or below it")
        above = place.resolve().parent if place in found else place.resolve()
        for folder in found:
            named.setdefault(folder.resolve(), str(folder.resolve().relative_to(above)))
    names = list(named.values())
    return Comparison([_read(folder, str(folder) if names.count(name) > 1 else name) for folder, name in named.items()])


def find_runs(place: Path) -> list[Path]:
    """The folders of runs in a folder and below it, sorted."""
    found = []
    for folder, inner, files in os.walk(place):
        inner[:] = [name for name in inner if name not in NOT_SEARCHED and not name.startswith(".")]
        if FILES & set(files):
            found.append(Path(folder))
    return sorted(found)


def _read(folder: Path, name: str) -> ComparedRun:
    try:
        settings = masked(load_yaml(folder / "settings.yaml"))
    except UserError:  # missing or corrupt
        settings = {}
    rows = read_metrics(folder / "metrics.jsonl")
    return ComparedRun(_summary(name, folder, rows, settings), rows, flat(settings))


def _summary(name: str, folder: Path, rows: Sequence[Mapping[str, Any]], settings: dict[str, Any]) -> RunSummary:
    """The results of a run from its metrics and (nested) settings."""
    training = _values(rows, BITS)
    validation = [(value, row) for row in rows if (value := finite(row.get(VALIDATION))) is not None]
    best, best_row = min(validation, key=lambda pair: pair[0], default=(None, {}))
    rates, patch_sizes = _values(rows, "bytes_per_second"), _values(rows, "mean_patch_bytes")
    patch_bytes = median(patch_sizes) if patch_sizes else None
    kind = str(flat(settings).get("model.kind"))
    num_parameters, flops = _costs(settings, kind, patch_bytes)
    return RunSummary(
        name=name,
        folder=str(folder),
        kind=NAMES.get(kind),
        num_parameters=num_parameters,
        training_flops_per_byte=flops,
        steps=_whole(max(_values(rows, "step"), default=None)),
        all_steps=_whole(finite(settings.get("steps"))),
        num_bytes=_whole(max(_values(rows, "bytes_seen"), default=None)),
        training_bits_per_byte=training[-1] if training else None,
        best_validation_bits_per_byte=best,
        best_validation_step=_whole(finite(best_row.get("step"))),
        last_validation_bits_per_byte=validation[-1][0] if validation else None,
        bytes_per_second=median(rates) if rates else None,
        mean_patch_bytes=patch_bytes,
        seconds=max(seconds_spent(rows)[1], default=0.0) or None,
    )


def _costs(settings: dict[str, Any], kind: str, patch_bytes: float | None) -> tuple[int | None, float | None]:
    """Number of parameters, and FLOPs of training per byte."""
    context = finite(flat(settings).get("data.context"))
    if kind not in NAMES or context is None:
        return None, None
    try:
        model = settings_class(settings["model"]).parse(settings["model"])
    except UserError:  # settings of another version
        return None, None
    id_bytes = patch_bytes or 1.0 if kind == "token_lm" else 1.0  # the context is in ids
    parts = costs(model, patch_bytes or 1.0, int(context * id_bytes))
    flops = 3 * sum(part.flops_per_byte for part in parts)
    return sum(part.num_parameters for part in parts), None if kind != "byte_lm" and patch_bytes is None else flops


def curve_points(rows: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Bytes seen and the values of `key`, from the rows with both; a resumed run overwrites its earlier rows."""
    points: dict[float, float] = {}
    for row in rows:
        bytes_seen, value = finite(row.get("bytes_seen")), finite(row.get(key))
        if bytes_seen is not None and value is not None and value > 0:  # the axis is logarithmic
            points[bytes_seen] = value
    xs = sorted(points)
    return xs, [points[x] for x in xs]


def seconds_spent(rows: Iterable[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Bytes seen and the time spent in steps until then, from the bytes and the speed of each row."""
    spent: dict[float, float] = {}
    seconds, before = 0.0, 0.0
    for row in rows:
        rate, seen = finite(row.get("bytes_per_second")), finite(row.get("bytes_seen"))
        if BITS not in row or seen is None:
            continue
        if rate:
            seconds += max(seen - before, 0.0) / rate
        before = seen
        spent[seen] = seconds
    xs = sorted(spent)
    return xs, [spent[x] for x in xs]


def _values(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [value for row in rows if (value := finite(row.get(key))) is not None]


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _short(value: Any) -> str:
    if value is None:
        return UNKNOWN
    return shorten(value if isinstance(value, str) else json.dumps(value), LONGEST)
