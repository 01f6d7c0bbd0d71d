"""A run's folder: its checkpoints, and the rows of its metrics. Files of other programs in it are ignored."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.files import find_corruption

CHECKPOINT = re.compile("step-([0-9]{8,})")  # not a user's copy, such as step-00000080.bak


class NoCheckpoint(UserError):
    """A run has no checkpoint that can be read.

    Attributes:
        corrupt: a line about each checkpoint that it has.
    """

    def __init__(self, run: Path, corrupt: list[str]):
        self.corrupt = corrupt
        if corrupt:
            super().__init__(f"no checkpoint of '{run}' is whole: {'; '.join(corrupt)}; remove them to start again")
        else:
            super().__init__(f"'{run}' has no checkpoint yet; train it further: blt train")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints_of(run: Path) -> dict[int, Path]:
    """The folders of a run's checkpoints, whole or not, by the number of steps done, in rising order."""
    folders = [folder for folder in (run / "checkpoints").glob("step-*") if folder.is_dir()]
    return dict(sorted((int(name[1]), folder) for folder in folders if (name := CHECKPOINT.fullmatch(folder.name))))


def newest_checkpoint(run: Path, why_corrupt: Callable[[Path], str | None] = find_corruption) -> tuple[Path, list[str]]:
    """The last checkpoint of a run that is whole, and a line about each later one that is corrupt.

    Args:
        why_corrupt: why a folder is corrupt; None if it is whole.

    Raises:
        NoCheckpoint: no checkpoint is whole.
    """
    corrupt: list[str] = []
    for folder in reversed(checkpoints_of(run).values()):
        why = why_corrupt(folder)
        if why is None:
            return folder, corrupt
        corrupt.append(f"'{folder}' is corrupt ({why}); skipped")
    raise NoCheckpoint(run, corrupt)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, if there are any; lines that a crash or a copy has corrupted are skipped."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [row for line in lines if (row := row_in(line)) is not None]


def row_in(line: bytes) -> dict[str, Any] | None:
    """The row of metrics in a line: a JSON object with a number `step`; None if it holds no row."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int | float) else None
