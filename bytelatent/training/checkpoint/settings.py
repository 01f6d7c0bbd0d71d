"""When a run is saved."""

from typing import Literal

from pydantic import Field

from bytelatent.config import Settings


class CheckpointSettings(Settings):
    """When to save, and what to keep.

    Attributes:
        every: steps between checkpoints.
        keep: number of the newest checkpoints to keep.
        keep_every: also keep checkpoints after a multiple of this many steps.
        last: `weights` leaves the optimizer's state and the place in the text out of the run's last checkpoint, so that
            it is a third as large or smaller, and the run cannot be continued.
        asynchronous: train on while a copy of the state is written; `auto` does so on a GPU and in several processes.
    """

    every: int = Field(default=1000, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_every: int | None = Field(default=None, ge=1)
    last: Literal["whole", "weights"] = "whole"
    asynchronous: bool | Literal["auto"] = "auto"
