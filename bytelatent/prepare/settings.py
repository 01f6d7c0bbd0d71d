"""Settings of `blt prepare`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bytelatent.config import Settings, renamed
from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.prepare.download import dataset_name, is_data_set
from bytelatent.text import MAX_ROW_BYTES
from bytelatent.text.stored import MAX_TEXT_BYTES

GB = 1_000_000_000
MAX_CHUNKS = 32  # by default; fewer where there are fewer documents


class PrepareSettings(Settings):
    """Which text to shuffle and cut, how, and where to write it."""

    source: Annotated[list[str], Field(min_length=1)]  # files, folders, globs, URLs, or data sets of the hub
    out: Path
    name: str | None = None  # the files are NAME.chunk.00.jsonl, ...; the first source's name if left out
    memory: Annotated[float, Field(gt=0, le=10**6)] = (
        4.0  # GB (10^9 bytes) of all processes together; on a cluster, of each task
    )
    chunks: Annotated[int, Field(ge=1, le=10**5)] | None = None  # 32, or fewer where there are fewer documents
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    validation: Annotated[int, Field(ge=0)] | None = None  # documents held out; 1 %, 10000 at most
    dedup: bool = False  # leave out documents whose text occurred before
    text_key: str = "text"
    max_bad_rows: Annotated[int, Field(ge=0)] = 1000  # one more is an error
    max_row_bytes: Annotated[int, Field(ge=1, le=MAX_TEXT_BYTES)] = MAX_ROW_BYTES  # a longer row is a bad one
    workers: Annotated[int, Field(ge=1, le=10**4)] | None = None  # the number of cores
    executor: Literal["local", "slurm", "ray"] = "local"
    partition: str | None = None  # of the SLURM cluster
    time: str = "24:00:00"  # limit of each job on the cluster

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, values: Any) -> Any:
        return renamed(values, {"max_corrupt": "max_bad_rows"})

    @property
    def stem(self) -> str:
        """The NAME of the output files.

        Raises:
            UserError: the name given cannot be part of a file's name.
        """
        if self.name is not None:
            if not self.name or self.name.startswith(".") or {"/", "\\", "\0"} & set(self.name):
                raise UserError(f"--name: '{self.name}' cannot be a file's name; use letters and digits")
            return self.name
        if is_data_set(self.source[0]):
            return dataset_name(self.source[0])
        last = self.source[0].partition("?")[0].rstrip("/").rsplit("/", 1)[-1].split(".")[0]
        return "".join(c for c in last if c.isalnum() or c in "-_") or "text"

    def request(self) -> dict[str, Any]:
        """What the output depends on: not the memory, workers or executor, which change no byte."""
        keep = {"source", "chunks", "seed", "validation", "dedup", "text_key", "max_bad_rows", "max_row_bytes"}
        return masked({"name": self.stem, **self.model_dump(mode="json", include=keep)})


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`seed 1 -> 2, dedup False -> True`: what differs between two requests; empty if nothing does."""
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in keys)
