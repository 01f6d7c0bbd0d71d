"""Each entry of a table of the package is described in the docs and the help, and CONTRIBUTING names what exists."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from bytelatent.cli import VERBS, app
from bytelatent.inference import Sampling
from bytelatent.patching import MODES, PatchSettings
from bytelatent.text.formats import FORMATS as TEXT_FORMATS
from bytelatent.training.schedule import SCHEDULES
from bytelatent.training.settings import OF_ONE_SCHEDULE, TrainSettings
from bytelatent.weights.pretrained import FORMATS as WEIGHTS_FORMATS

ROOT = Path(__file__).parents[1]
LISTED: dict[str, tuple[str, Collection[str]]] = {  # a page, and what stands in it in backticks
    "patching modes": ("docs/concepts.md", MODES),
    "sampling settings": ("docs/generate.md", Sampling.model_fields),
    "formats of text": ("docs/prepare.md", [suffix for found in TEXT_FORMATS.values() for suffix in found.suffixes]),
    "schedules": ("docs/train.md", SCHEDULES),
    "settings of schedules": (
        "docs/train.md",
        [f"optimizer.{name}" for names in OF_ONE_SCHEDULE.values() for name in names],
    ),
    "formats of weights": ("docs/weights.md", WEIGHTS_FORMATS),
    "patching modes as a setting": ("", MODES),
}


@pytest.mark.parametrize("what", LISTED)
def test_every_entry_is_described(what: str) -> None:
    page, names = LISTED[what]
    text = (ROOT / page).read_text(encoding="utf-8") if page else str(PatchSettings.__doc__)
    assert [name for name in names if f"`{name}`" not in text] == []


def test_every_verb_is_described() -> None:
    text = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"\n| `blt {verb}" not in text] == []


def settings_of(settings: type[BaseModel], group: str = "") -> Iterator[tuple[str, str]]:
    """Each group and setting, but those of the model, of which docs/concepts.md and `blt info` tell."""
    for name, field in settings.model_fields.items():
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        groups = [kind for kind in inner if issubclass(kind, BaseModel)]
        if not groups:
            yield group, name
        for kind in groups if name != "model" else []:
            yield from settings_of(kind, name)


def test_every_setting_of_training_is_described() -> None:
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    named = {f"{group}.{name}" for group, name in settings_of(TrainSettings) if not re.search(rf"[`.]{name}`", text)}
    assert {name for name in named if f"`{name.partition('.')[0]}.*`" not in text} == set()


def commands(command: Any) -> Iterator[Any]:
    for inner in command.commands.values():
        yield from commands(inner) if hasattr(inner, "commands") else [inner]


def test_every_option_has_help() -> None:
    for command in commands(typer.main.get_command(app)):
        assert [option.name for option in command.params if not getattr(option, "help", "") and not option.hidden] == []


def test_what_contributing_names_is_there() -> None:
    """Files below the package or beside it, and names in the code; and each package is named."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    packages = " ".join(re.findall(r"^\| (.*?) \|", text, flags=re.MULTILINE))
    guide = packages + text.partition("## To add a ...")[2]
    inside = [path.parent.name for path in (ROOT / "bytelatent").glob("*/__init__.py")]
    assert [name for name in inside if f"`{name}/`" not in packages] == []
    code = [
        path.read_text(encoding="utf-8") for part in ("bytelatent", "tests") for path in (ROOT / part).rglob("*.py")
    ]
    words = set(re.findall(r"\w+", " ".join(code)))
    for quoted in re.findall(r"`([^`]+)`", guide):
        for path in re.findall(r"[\w/]+/(?:[\w.]+)?|\w+\.py", quoted):
            assert (ROOT / path).exists() or (ROOT / "bytelatent" / path).exists(), path
        if re.fullmatch(r"[\w.]+", quoted) and not quoted.endswith((".py", ".md")):
            assert set(quoted.split(".")) <= words, quoted
