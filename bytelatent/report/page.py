"""Patches and the report of a demo as self-contained HTML pages."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bytelatent.config import flat
from bytelatent.files import whole_file
from bytelatent.patching import Patch
from bytelatent.report.page_figures import STRIP_HEIGHT, entropy_strip, loss_curves, patch_length_histogram
from bytelatent.report.text import (
    LOST,
    UNKNOWN,
    Character,
    amount_of_bytes,
    characters,
    duration,
    finite,
    number,
    visible,
)

if TYPE_CHECKING:
    from jinja2 import Environment

MODEL_NAMES = {"blt": "BLT", "byte_lm": "byte LM"}
SERIES_OF = {"byte_lm": 1, "blt": 2}  # colours of the curves; others are grey
TILES = {
    "mean_patch_bytes": ("per patch, on average", lambda value: f"{number(value)} bytes"),
    "bytes_read.blt": ("of text read by the BLT in training", amount_of_bytes),
    "training_seconds": ("of training, both models", duration),
    "seconds": ("from start to finish", duration),
}
COLUMNS = {  # of the table of models: keys of the summary, each with a number per model
    "parameters": ("parameters", lambda value: f"{value / 1e6:,.1f} M"),
    "steps": ("training steps", lambda value: f"{value:,.0f}"),
    "bytes_read": ("text read", amount_of_bytes),
}
LABELS = {  # of other keys of the summary, with units
    "threshold": ("entropy threshold", " nats"),
    "train_bytes": ("text to learn from", " bytes"),
    "valid_bytes": ("held-out text", " bytes, as far as it was measured on"),
}


@dataclass
class RunReport:
    """The contents of a report.

    Attributes:
        title: of the page.
        summary: `bits_per_byte` (a number for each of `blt`, `byte_lm`, `xz`, ...), `undertrained` (a sentence),
            `mean_patch_bytes`, `seconds`, `training_seconds`, `sample`; `parameters`, `steps` and `bytes_read` (a
            number for each of `blt`, `byte_lm`); other keys are listed as they are.
        curves: name of a model to the rows of its metrics. Training rows have `bytes_seen` and `bits_per_byte`,
            validation rows `bytes_seen` and `validation_bits_per_byte`.
        texts: name of a held-out text to its patches.
        patch_lengths: in bytes.
        threshold: of the entropy mode, nats.
        samples: pairs of a prompt and its continuation.
        notes: sentences for the end of the page.
    """

    title: str
    summary: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    texts: dict[str, Sequence[Patch]] = field(default_factory=dict)
    patch_lengths: Sequence[int] = ()
    threshold: float | None = None
    samples: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_patches_page(
    path: str | Path,
    texts: Mapping[str, Sequence[Patch]],
    title: str,
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """Write a page with patched texts; pointing at a byte shows its entropy.

    Args:
        path: of the HTML file.
        texts: name of a patching mode (or a text) to the patches.
        title: of the page.
        thresholds: for names of `texts`, the threshold in nats to draw over the entropies.

    Raises:
        UserError: the file cannot be written.
    """
    thresholds = thresholds or {}
    shown = [page_text(name, patches, thresholds.get(name)) for name, patches in texts.items()]
    write_page(path, page_templates().get_template("patches.html").render(title=title, texts=shown))


def write_report(path: str | Path, report: RunReport) -> None:
    """Write a report: bits per byte, training curves, patches and samples.

    Raises:
        UserError: the file cannot be written.
    """
    bits = report.summary.get("bits_per_byte")
    bits = bits if isinstance(bits, Mapping) else {}
    xz, sample = finite(bits.get("xz")), report.summary.get("sample")
    references = {} if xz is None or xz <= 0 else {"xz": xz}
    samples = report.samples or ([("", sample)] if isinstance(sample, str) else [])
    shown = {"bits_per_byte", "undertrained", "sample", *TILES, *COLUMNS}
    facts = report.summary | {f"bytes_read.{name}": value for name, value in _numbers(report.summary, "bytes_read")}
    page = page_templates().get_template("report.html").render(
        title=report.title,
        tiles=[(show(facts[key]), label) for key, (label, show) in TILES.items() if finite(facts.get(key)) is not None],
        undertrained=report.summary.get("undertrained"),
        bars=_bars(bits),
        axis=_axis(bits),
        models=_models(report.summary),
        curves=loss_curves(report.curves, references),
        curve_names=list(report.curves),
        has_reference=bool(references),
        texts=[page_text(name, patches, report.threshold) for name, patches in report.texts.items()],
        lengths=patch_length_histogram(report.patch_lengths),
        samples=samples,
        notes=report.notes,
        others=_others({key: value for key, value in report.summary.items() if key not in shown}),
    )  # fmt: skip
    write_page(path, page)


def page_text(name: str, patches: Sequence[Patch], threshold: float | None) -> dict[str, Any]:
    """A text for the template: for each patch its characters with their tooltips."""
    return {
        "name": name,
        "num_patches": len(patches),
        "num_bytes": sum(patch.end - patch.start for patch in patches),
        "patches": [
            [(character, _tooltip(character, index, patch)) for character in characters(patch)]
            for index, patch in enumerate(patches)
        ],
        "strip": entropy_strip(patches, threshold),
        "threshold": finite(threshold),
    }


def _tooltip(character: Character, patch_index: int, patch: Patch) -> str:
    """A line for each byte of the character: its position, value and entropy."""
    num_bytes = patch.end - patch.start
    name = "cut" if character.text == LOST else visible(character.text).replace(" ", "space")
    lines = [f"{name} · patch {patch_index + 1} ({num_bytes} {'byte' if num_bytes == 1 else 'bytes'})"]
    for offset in range(character.num_bytes):
        line = f"byte {character.start + offset}"
        if character.values is not None:
            line += f" · 0x{character.values[offset]:02X}"
        entropy = None if character.entropies is None else finite(character.entropies[offset])
        if entropy is not None:
            line += f" · entropy {entropy:.2f} nats = {entropy / math.log(2):.2f} bits"
        lines.append(line)
    return "\n".join(lines)


def _bars(bits: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lowest first, those without a number last; `percent` is of the axis."""
    known = {name: finite(value) for name, value in bits.items()}
    return [
        {
            "name": MODEL_NAMES.get(name, name),
            "value": UNKNOWN if value is None else f"{value:.3f}",
            "percent": round(100 * max(0.0, value or 0.0) / _axis(bits), 1),
            "series": SERIES_OF.get(name),
        }
        for name, value in sorted(known.items(), key=lambda item: math.inf if item[1] is None else item[1])
    ]


def _axis(bits: Mapping[str, Any]) -> int:
    """The end of the axis of the bars, in whole bits."""
    return max([1, *(math.ceil(value) for it in bits.values() if (value := finite(it)) is not None)])


def _numbers(summary: Mapping[str, Any], key: str) -> list[tuple[str, float]]:
    """The numbers under a key of the summary, by name."""
    values = summary.get(key)
    found = {name: finite(value) for name, value in values.items()} if isinstance(values, Mapping) else {}
    return [(name, value) for name, value in found.items() if value is not None]


def _models(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of the table of models; None if it would be empty."""
    numbers = {key: dict(_numbers(summary, key)) for key in COLUMNS}
    names = list(dict.fromkeys(name for values in numbers.values() for name in values))
    rows = [
        [MODEL_NAMES.get(name, name)]
        + [show(numbers[key][name]) if name in numbers[key] else UNKNOWN for key, (_, show) in COLUMNS.items()]
        for name in names
    ]
    return (["", *(label for label, _ in COLUMNS.values())], rows) if rows else None


def _others(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values of nested facts as text."""
    lines: list[tuple[str, str]] = []
    for key, value in flat(facts, between=": ").items():
        if isinstance(value, float):
            text = UNKNOWN if finite(value) is None else f"{value:.6g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            text = f"{value:,}"
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        label, unit = LABELS.get(key, (key.replace("_", " "), ""))
        lines.append((label, text + unit))
    return lines


@cache
def page_templates(*folders: Path) -> "Environment":
    """The templates of pages, those of other folders included."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["visible"] = visible
    environment.globals["STRIP_HEIGHT"] = STRIP_HEIGHT
    return environment


def write_page(path: str | Path, page: str) -> None:
    """
    Raises:
        UserError: the file cannot be written.
    """
    with whole_file(path) as aside:
        aside.write_bytes(page.encode("utf-8", "backslashreplace"))
