"""The input cut into units and tasks, from the files alone: the same on every machine, whatever does the work."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytelatent.errors import UserError
from bytelatent.log import Console
from bytelatent.text import BadRow, find_files
from bytelatent.text.documents import json_value, some
from bytelatent.text.formats import FORMATS, JSONL, FileKind, file_name, kind_of
from bytelatent.text.streams import COMPRESSIONS, TextReader, is_remote, readable, size_of

UNIT_BYTES = 1 << 26  # of a plain JSONL file; of small text files together
UNIT_FILES = 4096  # small text files together
TASK_BYTES = 1 << 28
MAX_TASKS = 4096  # beyond, tasks are larger
FIRST_ROW_BYTES = 1 << 22
FIRST_ROWS = 8  # files whose first row is looked at
DOWNLOADS = ".download"  # below the folder that is prepared; it stays there


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


def resolve(sources: list[str], out: Path, console: Console, download: bool = True) -> list[InputFile]:
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
            from bytelatent.prepare.download import fetch, short_name

            place = str(fetch(source, out / DOWNLOADS / f"{number:02d}-{short_name(source)}"))
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
    """Every file in order, none twice."""
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
    """Find out at once that the key of the text is another one: look at a row of some files, if all are JSONL.

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


def is_data_set(source: str) -> bool:
    """Whether a source is one of the hub's data sets; a file or folder of that name goes first."""
    from bytelatent.prepare.download import is_hub

    return is_hub(source) and not Path(source).exists()


def _like_a_data_set(source: str) -> str:
    """The data sets that a bare word may have meant."""
    from bytelatent.prepare.download import DATASETS

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
