"""How settings and other values differ from those that a study began with."""

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bytelatent.config import flat
from bytelatent.errors import UserError
from bytelatent.training import TrainSettings

# Settings that change nothing of a result that is there: the others of a finished run must be those of the plan.
FREE = re.compile(
    r"run|steps|minutes|device|compile|cuda_graph|log_every|track|statistics_every|"
    r"(wandb|profile|checkpoint|validation|faults|parallel)\..*|"
    r"data\.(workers|train|valid|tokenizer|allow_changed|max_bad_rows)\b.*"
)


def changed_settings(
    then: Mapping[str, Any], now: Mapping[str, Any], derived: Collection[str] = (), fixed: Collection[str] = ()
) -> list[str]:
    """A line for each setting of a training that differs: `optimizer.lr is 0.001 in the plan, and was 0.002`.

    Args:
        derived: keys that may differ, since they follow from others.
        fixed: keys that may not, though `FREE` has them.
    """
    with suppress(UserError):  # settings that came later were at their defaults
        then = TrainSettings.parse(dict(then)).shown()
    before, after = flat(dict(then)), flat(dict(now))
    counts = {key for key in before.keys() | after.keys() if key in fixed or not FREE.fullmatch(key)} - {*derived}
    return changed_values({key: before.get(key) for key in counts}, {key: after.get(key) for key in counts})


def changed_values(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that differs, those outside of groups first."""
    return [
        f"{key} is {now.get(key)} in the plan, and was {then.get(key)}"
        for key in sorted(then.keys() | now.keys(), key=lambda key: (key.count("."), key))
        if then.get(key) != now.get(key)
    ]


def began_otherwise(line: str, folder: Path) -> UserError:
    """That the whole study is of something else than its plan, by a line of the above."""
    return UserError(f"{line} when the study in '{folder}' began; put it back, or name another folder: --out")


def inside(settings: TrainSettings, folder: Path) -> dict[str, Any]:
    """All settings of a training; paths below a study's folder begin there, wherever it is."""
    shown, folder = settings.shown(), folder.absolute()
    for group, key in ((shown, "run"), (shown, "entropy_model"), (shown["data"], "tokenizer")):
        if group[key] is not None and (path := Path(group[key]).absolute()).is_relative_to(folder):
            group[key] = str(path.relative_to(folder))
    return shown
