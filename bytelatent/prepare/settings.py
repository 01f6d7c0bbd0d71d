"""Settings of `blt prepare`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bytelatent.config import ARGUMENT, Settings
from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.prepare.download import dataset_name, is_data_set
from bytelatent.text import MAX_ROW_BYTES
from bytelatent.text.stored import MAX_TEXT_BYTES

GB = 1_000_000_000
MAX_CHUNKS = 32  # by default; fewer where there are fewer documents


class PrepareSettings(Settings):
    """Shuffle text of any size as a whole and cut it into files for training; the same command resumes.

    Example:  `blt prepare text/*.jsonl more.parquet --out data --memory 8 --chunks 32`

    Attributes:
        source: files, folders, globs, URLs, hf://datasets/OWNER/NAME, fineweb_edu, fineweb_edu_10bt,
            dclm_baseline_1.0, dclm_baseline_1.0_10prct.
        out: folder to write.
        name: prefix of the files: NAME.chunk.00.jsonl. Default: the source's name.
        memory: memory in GB of all processes together, at least 0.25. On a cluster, of each task.
        chunks: number of files to write. Default: 32, or fewer for few rows.
        seed: shuffle seed.
        validation: number of documents to hold out. Default: 1 %, at most 10000.
        dedup: leave out documents whose text occurred before.
        text_key: the key or column that holds the text.
        max_bad_rows: largest number of bad rows and files to pass over.
        max_row_bytes: longest row, in bytes. A longer row is a bad row.
        workers: number of processes. Default: one per core.
        executor: where to run: local, slurm or ray.
        partition: SLURM partition.
        time: time limit of each SLURM job.
    """

    old_names: ClassVar[dict[str, str]] = {"max_corrupt": "max_bad_rows"}

    source: Annotated[list[str], Field(min_length=1), ARGUMENT]
    out: Path
    name: str | None = None
    memory: Annotated[float, Field(gt=0, le=10**6)] = 4.0
    chunks: Annotated[int, Field(ge=1, le=10**5)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    validation: Annotated[int, Field(ge=0)] | None = None
    dedup: bool = False
    text_key: str = "text"
    max_bad_rows: Annotated[int, Field(ge=0)] = 1000
    max_row_bytes: Annotated[int, Field(ge=1, le=MAX_TEXT_BYTES)] = MAX_ROW_BYTES
    workers: Annotated[int, Field(ge=1, le=10**4)] | None = None
    executor: Literal["local", "slurm", "ray"] = "local"
    partition: str | None = None
    time: str = "24:00:00"

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
