"""Settings and plan of `blt prepare`: units and tasks of the input, and the folder of unfinished work.

Units and tasks depend on the files alone, so that they are the same on every machine and for every executor.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bytelatent.config import ARGUMENT, Settings
from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.files import json_if_any, whole_file
from bytelatent.prepare.download import DATASETS, dataset_name, download_dataset, is_data_set
from bytelatent.text import MAX_ROW_BYTES, BadRow, find_files
from bytelatent.text.documents import json_value, some
from bytelatent.text.folders import name_inside
from bytelatent.text.formats import FORMATS, JSONL, FileKind, kind_of
from bytelatent.text.stored import MAX_TEXT_BYTES
from bytelatent.text.streams import COMPRESSIONS, TextReader, is_remote, readable, size_of

MAX_CHUNKS = 32  # by default; fewer where one would be empty
UNIT_BYTES = 1 << 26  # of a plain JSONL file; of small text files together
UNIT_FILES = 4096  # small text files together
TASK_BYTES = 1 << 28
MAX_TASKS = 4096  # beyond, tasks are larger
FIRST_ROW_BYTES = 1 << 22
FIRST_ROWS = 8  # files whose first row is checked
DOWNLOADS = ".download"  # below the folder that is prepared; it stays there
FORMAT = 1
FOLDER = ".prepare"


class PrepareSettings(Settings):
    """Shuffle text of any size as a whole and cut it into files for training; the same command resumes.

    Example:  `blt prepare text/*.jsonl more.parquet --out data --memory 8 --chunks 32`

    Attributes:
        source: files, folders, globs, URLs, hf://datasets/OWNER/NAME, fineweb_edu, fineweb_edu_10bt,
            dclm_baseline_1.0, dclm_baseline_1.0_10prct.
        out: folder to write.
        name: prefix of the files: NAME.chunk.00.jsonl. Default: the source's name.
        memory: memory in GB of all processes together, at least 0.25. On a cluster, of each task.
        chunks: number of files to write. Default: 32, or fewer so that none is empty.
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


@dataclass(frozen=True)
class InputFile:
    """A file as it was found; another size or time of change makes it another input."""

    path: str
    id: str  # its name inside the source, for plain text
    size: int
    changed: int | None  # nanoseconds; None where the place does not say

    kind: str = "text"  # `lines` (JSONL that can be divided), `packed` (compressed), `none` or a format's name
    compression: str | None = None

    @property
    def likely_bytes(self) -> int:
        """About how many bytes of text it holds: a guess, on which only the memory depends."""
        known = COMPRESSIONS.get(str(self.compression)) or FORMATS.get(self.kind, JSONL)
        return self.size * known.expansion


@dataclass
class Unit:
    """What one generator of keys numbers: the lines that begin in a part of a file, a file, or several small ones."""

    kind: str
    files: list[int]  # of the inputs
    begin: int = 0  # bytes, for `lines`
    end: int = 0
    size: int = 0  # bytes to read, for the progress bar


def find_inputs(sources: list[str], out: Path, download: bool = True) -> list[InputFile]:
    """The files of the sources, those of data sets of the hub downloaded first.

    Raises:
        UserError: a source does not exist or cannot be reached.
    """
    found = []
    for number, source in enumerate(sources):
        place = source
        if is_data_set(source):
            if not download:
                continue
            place = str(download_dataset(source, out / DOWNLOADS / f"{number:02d}-{dataset_name(source)}"))
        try:
            found += [_input_file(path, place) for path in find_files(place)]
        except UserError as error:
            known = "" if {"/", "*", "."} & set(source) else f"; data sets known by name: {', '.join(DATASETS)}"
            raise UserError(f"{error}{known}") from None
    inside = out.resolve()
    for file in found:
        if not is_remote(file.path) and inside in Path(file.path).resolve().parents and DOWNLOADS not in file.path:
            raise UserError(f"--out: '{out}' holds the input '{file.path}'; give another folder")
    return found


def _input_file(path: str, source: str) -> InputFile:
    try:
        found = kind_of(path)
    except BadRow:  # what reads it will say so
        found = FileKind(None)
    kind = "none" if found.format is None else found.format.name
    kind = "packed" if found.format is JSONL and found.compression else kind
    inside = name_inside(path, source)
    with readable(path):
        if is_remote(path):
            return InputFile(path, inside, size_of(path), None, kind, found.compression)
        about = os.stat(path)
    return InputFile(os.path.abspath(path), inside, about.st_size, about.st_mtime_ns, kind, found.compression)


def units_of(files: list[InputFile]) -> list[Unit]:
    """The files in order, each in one unit or in several."""
    units: list[Unit] = []
    for number, file in enumerate(files):
        follows_text = number > 0 and files[number - 1].kind == "text"
        if file.kind == "lines":
            for begin in range(0, file.size, UNIT_BYTES):
                end = min(begin + UNIT_BYTES, file.size)
                units.append(Unit("lines", [number], begin, end, end - begin))
        elif (
            file.kind == "text"
            and follows_text
            and units[-1].size + file.size <= UNIT_BYTES
            and len(units[-1].files) < UNIT_FILES
        ):
            units[-1].files.append(number)
            units[-1].size += file.size
        else:
            units.append(Unit(file.kind, [number], size=file.size))
    return units


def tasks_of(units: list[Unit], likely_bytes: list[int]) -> list[tuple[int, int]]:
    """Runs of units (first, end), each of about TASK_BYTES of text."""
    wanted = max(TASK_BYTES, -(-sum(likely_bytes) // MAX_TASKS))
    tasks, first, size = [], 0, 0
    for number in range(len(units)):
        if number > first and size + likely_bytes[number] > wanted:
            tasks.append((first, number))
            first, size = number, 0
        size += likely_bytes[number]
    return [*tasks, (first, len(units))] if units else []


def check_first_row(files: list[InputFile], text_key: str) -> None:
    """Check at once that the text key exists, on a row of some files, if all are JSONL.

    Raises:
        UserError: each is an object without that key.
    """
    found = [file for file in files if file.size][:FIRST_ROWS]
    rows: list[Any] = [_first_row(file) if file.kind in ("lines", "packed") else None for file in found]
    if rows and all(isinstance(row, dict) and text_key not in row for row in rows):
        raise UserError(f"--text-key: '{found[0].path}' has no '{text_key}'; its keys: {some(rows[0])}")


def _first_row(file: InputFile) -> Any:
    try:
        with TextReader(file.path, file.compression) as stream:
            stream.skip_byte_order_mark()
            return json_value(stream.readline(FIRST_ROW_BYTES))
    except Exception:  # bad or too long: what reads all of the file says what is wrong
        return None


def too_many_bad_rows(places: list[str], limit: int) -> UserError:
    """The error for more bad rows than the limit allows."""
    return UserError(
        f"{places[0]}: more than {limit} rows are bad, this one and {len(places) - 1} others so far; "
        "mend the input or give a higher --max-bad-rows"
    )


@dataclass(frozen=True)
class PreparePlan:
    """Everything the steps need to know before the input is read."""

    request: dict[str, Any]
    files: list[InputFile]
    units: list[Unit]
    tasks: list[tuple[int, int]]  # runs of units
    bits: int  # of a key that name its bin
    run_bytes: int  # memory for a sorted run, with its index
    range_bytes: int  # memory for the documents of a range of bins, with their index
    memory: float
    format: int = FORMAT


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Explain in one line why writing below `folder` fails.

    Raises:
        UserError: in place of the system's errors.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--out: the disk of '{folder}' is full; make room and give the same command again, it resumes"
            ) from None
        raise UserError(f"--out: '{folder}' cannot be written: {error.strerror or error}") from None
    except MemoryError:
        raise UserError("--memory: the machine has less memory than this; give fewer --workers or less") from None


@dataclass(frozen=True)
class TaskFiles:
    """The files of one task of the first pass. The others count only once the marker exists."""

    folder: Path
    task: int

    def path(self, kind: str) -> Path:
        """`data`, `high` and `low` (keys), `lengths`, `table`, `marker`."""
        return self.folder / f"{self.task:05d}.{kind}"

    def marker(self) -> dict[str, Any] | None:
        """What the finished task wrote about itself; None if it is not finished or its files have changed."""
        marker = json_if_any(self.path("marker"))
        try:
            whole = marker and all(self.path(kind).stat().st_size == size for kind, size in marker["sizes"].items())
        except OSError:
            return None
        return marker if whole else None


class WorkFolder:
    """The files below DIR/.prepare."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.aside = self.folder / "out"  # output files until all are finished
        self.cut_file = self.folder / "cut.json"

    @cached_property
    def plan(self) -> PreparePlan:
        return self.saved_plan()

    def saved_plan(self) -> PreparePlan:
        """
        Raises:
            OSError, ValueError, KeyError, TypeError: there is no readable plan.
        """
        values = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        files = [InputFile(**file) for file in values.pop("files")]
        units = [Unit(**unit) for unit in values.pop("units")]
        return PreparePlan(files=files, units=units, tasks=[(a, b) for a, b in values.pop("tasks")], **values)

    def begin(self, plan: PreparePlan) -> None:
        """Remove what is there, and save a new plan."""
        self.clear()
        for folder in ("scatter", "gather", "out", "logs"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / "plan.json") as aside:
            aside.touch(mode=0o600)  # its addresses may hold credentials, which the steps need
            aside.write_text(json.dumps(asdict(plan)), encoding="utf-8")

    def clear(self) -> None:
        """Remove unfinished work, with the output files that have their final names already."""
        for output in (json_if_any(self.cut_file) or {"outputs": []})["outputs"]:
            (self.out / output["name"]).unlink(missing_ok=True)
        (self.folder / "plan.json").unlink(missing_ok=True)  # first: without it the rest does not count
        for place in ("scatter", "gather", "out", "logs"):
            shutil.rmtree(self.folder / place, ignore_errors=True)
        for name in ("cut.json", "jobs.json"):
            (self.folder / name).unlink(missing_ok=True)

    def task_files(self, task: int) -> TaskFiles:
        return TaskFiles(self.folder / "scatter", task)

    def range_marker(self, number: int) -> Path:
        return self.folder / "gather" / f"{number:05d}.json"
