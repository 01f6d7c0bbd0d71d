"""When checkpoints are written, and which are kept."""

from typing import Literal

from pydantic import Field

from bytelatent.config import Settings


class CheckpointSettings(Settings):
    """When to save, and what to keep.

    Attributes:
        every: steps between checkpoints.
        keep: number of the newest checkpoints to keep.
        keep_every: also keep checkpoints after a multiple of this many steps.
        asynchronous: train on while a copy of the state is written; `auto` does so on a GPU and in several processes.
    """

    every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    asynchronous: bool | Literal["auto"] = "auto"
