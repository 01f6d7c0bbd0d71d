"""When checkpoints are written, and which are kept."""

from typing import Literal

from pydantic import Field

from bytelatent.config import Settings


class CheckpointSettings(Settings):
    """When to save, and what to keep.

    Attributes:
        every: steps from one checkpoint to the next.
        keep: so many of the newest stay,
        keep_every: and those after a multiple of so many steps.
        asynchronous: training goes on while a copy of its state is written; `auto` where there is a GPU, or several
            processes.
    """

    every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    asynchronous: bool | Literal["auto"] = "auto"
