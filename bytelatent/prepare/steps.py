"""The passes as steps of a datatrove pipeline, each a job of its own: scatter, cut, gather, finish."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from bytelatent.prepare.cut import cut
from bytelatent.prepare.gather import gather, make_room
from bytelatent.prepare.manifest import finish
from bytelatent.prepare.scatter import scatter
from bytelatent.prepare.work import Work


def silent(count: int) -> None:
    """Where nobody watches."""


class Pass(PipelineStep):
    """A step that reads and writes the folder of unfinished work, and passes no documents on.

    Args:
        out: the folder that is prepared.
    """

    type = "bytelatent prepare"

    def __init__(self, out: str) -> None:
        super().__init__()
        self.out = out
        self.report: Callable[[int], None] = silent

    @property
    def work(self) -> Work:
        return Work(Path(self.out))

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        self.do(rank, world_size)
        return data

    def do(self, rank: int, world_size: int) -> None:
        raise NotImplementedError


class Scatter(Pass):
    """Rank r does task r of the plan."""

    name = "scatter"

    def do(self, rank: int, world_size: int) -> None:
        scatter(self.work, rank, self.report)


class Cut(Pass):
    """One task."""

    name = "cut"

    def do(self, rank: int, world_size: int) -> None:
        cut(self.work)
        make_room(self.work)


class Gather(Pass):
    """The ranges of the second pass, divided evenly among the ranks: their number is not known before `Cut`."""

    name = "gather"

    def do(self, rank: int, world_size: int) -> None:
        gather(self.work, rank, world_size, self.report)


class Finish(Pass):
    """One task."""

    name = "finish"

    def do(self, rank: int, world_size: int) -> None:
        finish(self.work)
