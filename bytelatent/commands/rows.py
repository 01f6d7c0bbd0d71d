"""Files of rows that a command writes one after another, and resumes where an earlier call stopped."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from bytelatent.errors import Interrupted, UserError
from bytelatent.files import growing_file, partial_path, whole_file

ADDED = {"kv_cache": "full"}  # keys that files begun by an earlier build do not have
RENAMED = {"entropy": "entropy_model", "weights": "quantize"}  # keys of files begun by an earlier build
RESET = "to start over, move it away"


def must_be_free(path: Path) -> None:
    """Refuse to overwrite a file at `path`, or one beside it where unfinished rows go.

    Raises:
        UserError: there is one.
    """
    try:
        if path.is_dir():
            raise UserError(f"out: '{path}' is a folder; name a file")
        part, settings = partial_path(path), path.with_name(f"{path.name}.part.settings")
        if path.is_file() and path.stat().st_size:
            raise UserError(f"out: '{path}' holds something already; name another file, or move it away")
        if not settings.exists() and part.exists() and part.stat().st_size:
            raise UserError(f"out: '{part}' is in the way, and there is no '{settings}' beside it; move it away")
    except OSError as error:
        raise UserError(f"out: '{path}' cannot be written: {error.strerror or error}") from None


@contextmanager
def rows_at(
    path: Path, rows: Sequence[dict[str, Any]], made_with: dict[str, Any], added: Collection[str]
) -> Iterator[tuple[BinaryIO, int]]:
    """A file that appears whole, and the number of its rows that an earlier call has written.

    A device or a pipe, which must not be replaced, is written as it comes. After an error, finished rows stay in
    `path.part`, with the settings they were made with beside it.

    Args:
        rows: as they were given, in the order in which they are written.
        made_with: settings, by their keys; rows that were made with others are not resumed.
        added: keys that are added to a row.

    Raises:
        UserError: the file cannot be written, or an earlier call wrote other rows or settings.
        Interrupted: Ctrl-C; names the file of finished rows.
    """
    if path.exists() and not path.is_file():
        try:
            file = path.open("wb", buffering=0)  # with a buffer, closing it would write again what could not be written
        except OSError as error:
            raise UserError(f"out: '{path}' cannot be written: {error.strerror or error}") from None
        with file:
            yield file, 0
        return
    part, settings = partial_path(path), path.with_name(f"{path.name}.part.settings")
    try:
        with growing_file(path) as file:
            num_done = 0
            if part.stat().st_size == 0:
                with whole_file(settings) as aside:
                    aside.write_text(json.dumps(made_with))
            else:
                _must_be_made_with(part, settings, made_with)
                num_done = _num_done(part, rows, added)
            try:
                yield file, num_done
                must_be_free(path)  # what came there meanwhile stays, too
            except (KeyboardInterrupt, UserError) as error:
                with part.open("rb") as lines:
                    some = any(line.endswith(b"\n") for line in lines)
                rows_so_far = f"; the rows so far are in '{part}', and the same command resumes" if some else ""
                if isinstance(error, UserError):
                    raise UserError(f"{error}{rows_so_far}") from None
                raise Interrupted(f"'{path}' was not written{rows_so_far or '; no row was done'}") from None
    finally:
        if settings.exists() and not part.exists():
            settings.unlink()


def line_of(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # surrogates, which JSON writes only as escapes
        return json.dumps(row).encode() + b"\n"


def _must_be_made_with(part: Path, settings: Path, made_with: dict[str, Any]) -> None:
    try:
        before = ADDED | {RENAMED.get(key, key): value for key, value in json.loads(settings.read_text()).items()}
    except (OSError, ValueError):
        raise UserError(f"out: '{part}' is in the way, and '{settings}' cannot be read; {RESET}") from None
    for key, value in made_with.items():
        if before.get(key) != value:
            raise UserError(f"out: '{part}' was begun with {key}={before.get(key)}, not {value}; {RESET}")


def _num_done(part: Path, rows: Sequence[dict[str, Any]], added: Collection[str]) -> int:
    """How many of the rows are in `part`: the first ones, since they are written in order."""

    def given(row: dict[str, Any]) -> bytes:
        return line_of({key: value for key, value in row.items() if key not in added})

    def belongs(line: bytes, number: int) -> bool:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return number <= len(rows) and isinstance(row, dict) and given(row) == given(rows[number - 1])

    number = 0
    with part.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not belongs(line, number):
                raise UserError(f"out: line {number} of '{part}' belongs to another row of the prompts; {RESET}")
    return number
