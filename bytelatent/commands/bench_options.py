"""Settings of `blt bench`. Nothing here imports torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from bytelatent.commands.options import JsonSettings
from bytelatent.config import ARGUMENT


class BenchTrainSettings(JsonSettings):
    """Measure how fast this machine trains a preset on random bytes, and where the time goes.

    Example:  `blt bench train blt-1b --bytes 16384,65536`

    Attributes:
        model: a preset; `blt info` lists them.
        bytes: bytes of a batch; several with commas. Default: chosen for the device.
        float8: use 8-bit floats for the matrix products of the global transformer.
        checkpointing: activation checkpointing: none, selective or full.
        cuda_graph: capture forward and backward pass as a CUDA graph and replay it.
        device: device: auto, cpu, cuda or mps.
        dtype: precision: auto, float32 or bfloat16.
    """

    model: Annotated[str, ARGUMENT]
    bytes: list[Annotated[int, Field(ge=1)]] | None = None
    float8: bool = False
    checkpointing: Literal["none", "selective", "full"] = "none"
    cuda_graph: bool = False
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @field_validator("bytes", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Several sizes with commas."""
        if not isinstance(value, str):
            return value
        sizes = [int(size) if re.fullmatch(r"[0-9]{1,16}", size) else 0 for size in value.split(",")]
        if min(sizes) < 1:  # numbers of more digits overflow before memory is allocated
            raise ValueError(f"'{value}' is not a batch size; write a number, or several with commas: 16384,65536")
        return sizes
