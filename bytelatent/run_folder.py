"""What the folder of a run holds: its checkpoints, and the rows of its metrics. Files of others there do no harm."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.files import what_is_torn

CHECKPOINT = re.compile("step-([0-9]{8,})")  # and not a user's copy, such as step-00000080.bak


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints_in(parent: Path) -> dict[int, Path]:
    """The folders that training wrote, whole or not, by the steps that were done; in rising order."""
    named = ((CHECKPOINT.fullmatch(place.name), place) for place in parent.glob("step-*"))
    return dict(sorted((int(name[1]), place) for name, place in named if name is not None and place.is_dir()))


def newest_whole(parent: Path, torn_by: Callable[[Path], str | None] = what_is_torn) -> tuple[Path | None, list[str]]:
    """The last checkpoint below `parent` that is whole, and one line about each later one that is not.

    Args:
        torn_by: says why a folder is not whole, or None.
    """
    passed_over = []
    for folder in reversed(checkpoints_in(parent).values()):
        torn = torn_by(folder)
        if torn is None:
            return folder, passed_over
        passed_over.append(f"'{folder}' is torn ({torn}); passed over")
    return None, passed_over


def none_whole(run: Path, passed_over: list[str]) -> UserError:
    """What is wrong with a run in which `newest_whole` found nothing, and passed over these."""
    if not passed_over:
        return UserError(f"'{run}' has no checkpoint yet; train it further: blt train")
    return UserError(f"no checkpoint of '{run}' is whole: {'; '.join(passed_over)}; remove them to start again")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, if there are any; what a crash or a copy has torn is left out."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [row for line in lines if (row := row_in(line)) is not None]


def row_in(line: bytes) -> dict[str, Any] | None:
    """The row of metrics that a line holds: JSON with a number `step`; None if it holds none."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int | float) else None
