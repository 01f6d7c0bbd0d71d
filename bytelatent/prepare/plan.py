"""The plan of `blt prepare`: units and tasks of the input, memory of each worker, the folder of unfinished work.

Units and tasks depend on the files alone, so that they are the same on every machine and for every executor.
"""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.prepare.download import DATASETS, dataset_name, download_dataset, is_data_set
from bytelatent.prepare.settings import GB
from bytelatent.text import BadRow, find_files
from bytelatent.text.documents import json_value, some
from bytelatent.text.formats import FORMATS, JSONL, FileKind, file_name, kind_of
from bytelatent.text.streams import COMPRESSIONS, TextReader, is_remote, readable, size_of

UNIT_BYTES = 1 << 26  # of a plain JSONL file; of small text files together
UNIT_FILES = 4096  # small text files together
TASK_BYTES = 1 << 28
MAX_TASKS = 4096  # beyond, tasks are larger
FIRST_ROW_BYTES = 1 << 22
FIRST_ROWS = 8  # files whose first row is checked
DOWNLOADS = ".download"  # below the folder that is prepared; it stays there
MB = 1_000_000
WORKING_BYTES = 24 * MB  # of a worker beside its run or range: blocks read, slices written, Arrow's caches
MIN_RUN_BYTES = 20 * MB  # a block of the shortest lines takes 18
MAX_RUN_BYTES = 1 << 30
MAX_RANGE_BYTES = 1 << 28  # more is not faster
BINS_IN_RANGE = 16
MAX_BITS = 17
FORMAT = 1
FOLDER = ".prepare"


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


@dataclass(frozen=True)
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
            raise UserError(f"{error}{_like_a_data_set(source)}") from None
    inside = out.resolve()
    for file in found:
        if not is_remote(file.path) and inside in Path(file.path).resolve().parents and DOWNLOADS not in file.path:
            raise UserError(f"--out: '{out}' holds the input '{file.path}'; give another folder")
    return found


def units_of(files: list[InputFile]) -> list[Unit]:
    """The files in order, each in one unit or in several."""
    units: list[Unit] = []
    texts: list[int] = []

    def close_texts() -> None:
        if texts:
            units.append(Unit("text", list(texts), size=sum(files[i].size for i in texts)))
            texts.clear()

    for number, file in enumerate(files):
        if file.kind == "text":
            if texts and (sum(files[i].size for i in texts) + file.size > UNIT_BYTES or len(texts) == UNIT_FILES):
                close_texts()
            texts.append(number)
            continue
        close_texts()
        if file.kind == "lines":
            for begin in range(0, file.size, UNIT_BYTES):
                end = min(begin + UNIT_BYTES, file.size)
                units.append(Unit("lines", [number], begin, end, end - begin))
        else:
            units.append(Unit(file.kind, [number], size=file.size))
    close_texts()
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


def _like_a_data_set(source: str) -> str:
    """The names of known data sets, for a source that looks like one."""
    return "" if {"/", "*", "."} & set(source) else f"; data sets known by name: {', '.join(DATASETS)}"


def _input_file(path: str, source: str) -> InputFile:
    try:
        found = kind_of(path)
    except BadRow:  # what reads it will say so
        found = FileKind(None)
    kind = "none" if found.format is None else found.format.name
    kind = "packed" if found.format is JSONL and found.compression else kind
    if is_remote(path):
        inside = path.removeprefix(source).lstrip("/") or file_name(path)
        with readable(path):
            return InputFile(path, inside, size_of(path), None, kind, found.compression)
    with readable(path):
        about = os.stat(path)
    place = Path(source).expanduser()
    inside = os.path.relpath(path, place) if place.is_dir() else os.path.basename(path)
    return InputFile(os.path.abspath(path), inside, about.st_size, about.st_mtime_ns, kind, found.compression)


def too_many_bad_rows(places: list[str], limit: int) -> UserError:
    """The error for more bad rows than the limit allows."""
    return UserError(
        f"{places[0]}: more than {limit} rows are bad, this one and {len(places) - 1} others so far; "
        "mend the input or give a higher --max-bad-rows"
    )


@dataclass(frozen=True)
class Budget:
    """Memory of the workers.

    Attributes:
        workers: number of processes beside the first.
        run_bytes: memory of a worker for a sorted run, or for a range of bins, with the index.
    """

    workers: int
    run_bytes: int

    @property
    def range_bytes(self) -> int:
        return min(self.run_bytes, MAX_RANGE_BYTES)

    def bits(self, likely_bytes: int) -> int:
        """Number of a key's bits that name its bin, so that a range has several bins."""
        bins = likely_bytes * BINS_IN_RANGE / self.range_bytes
        return min(max(math.ceil(math.log2(max(bins, 1))), 4), MAX_BITS)


def divide_memory(memory: float, workers: int | None, own_bytes: int | None = None) -> Budget:
    """Divide the memory among the workers.

    Args:
        memory: GB for all processes.
        workers: their number; None for one per core, or fewer where the memory is little.
        own_bytes: memory of a process before it starts work; measured if left out.

    Raises:
        UserError: the memory is too small.
    """
    own = memory_of_this_process() if own_bytes is None else own_bytes
    for count in [workers] if workers else range(os.cpu_count() or 1, 0, -1):
        left = (memory * GB - own * (count + 1)) / count - WORKING_BYTES
        if left >= MIN_RUN_BYTES:
            return Budget(count, int(min(left, MAX_RUN_BYTES)))
    least = ((workers or 1) * (own + WORKING_BYTES + MIN_RUN_BYTES) + own) / GB
    fewer = ", or fewer --workers" if (workers or 1) > 1 else ""
    raise UserError(f"--memory: {memory:g} GB are too little; the least is {math.ceil(least * 100) / 100:.2f}{fewer}")


def memory_of_this_process() -> int:
    """Bytes resident now."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 120 * MB  # no Linux


@dataclass(frozen=True)
class TaskFiles:
    """The files of one scatter task. The others count only once the marker exists."""

    folder: Path
    task: int

    def path(self, kind: str) -> Path:
        """`data`, `high` and `low` (keys), `lengths`, `table`, `marker`."""
        return self.folder / f"{self.task:05d}.{kind}"

    def marker(self) -> dict[str, Any] | None:
        """What the finished task wrote about itself; None if it is not finished or its files have changed."""
        try:
            marker = json.loads(self.path("marker").read_text(encoding="utf-8"))
            sizes = {kind: self.path(kind).stat().st_size for kind in marker["sizes"]}
        except (OSError, ValueError, KeyError):
            return None
        return marker if sizes == marker["sizes"] else None


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


class WorkFolder:
    """The files below DIR/.prepare."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.aside = self.folder / "out"  # output files until all are finished

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
        for output in self.saved_outputs():
            (self.out / output).unlink(missing_ok=True)
        (self.folder / "plan.json").unlink(missing_ok=True)  # first: without it the rest does not count
        for place in ("scatter", "gather", "out", "logs"):
            shutil.rmtree(self.folder / place, ignore_errors=True)
        for name in ("cut.json", "jobs.json"):
            (self.folder / name).unlink(missing_ok=True)

    def saved_outputs(self) -> list[str]:
        """The names of the output files; empty before they are planned."""
        try:
            return [output["name"] for output in json.loads(self.cut_file.read_text(encoding="utf-8"))["outputs"]]
        except (OSError, ValueError, KeyError):
            return []

    def task_files(self, task: int) -> TaskFiles:
        return TaskFiles(self.folder / "scatter", task)

    @property
    def cut_file(self) -> Path:
        return self.folder / "cut.json"

    def range_marker(self, number: int) -> Path:
        return self.folder / "gather" / f"{number:05d}.json"
