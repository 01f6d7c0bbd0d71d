"""The steps for datatrove's executors; apart from the rest, for datatrove takes long to import."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from bytelatent.prepare.plan import WorkFolder


class FolderStep(PipelineStep):
    """A step that reads and writes the folder of unfinished work, and passes no documents on.

    Args:
        name: of the step.
        step: does a task of it; see `executors.STEPS`.
        out: the folder that is prepared.
    """

    type = "bytelatent prepare"

    def __init__(self, name: str, step: Callable[..., None], out: str) -> None:
        super().__init__()
        self.name = name
        self.step = step
        self.out = out

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        self.step(WorkFolder(Path(self.out)), rank, world_size, lambda num_bytes: None)
        return data
