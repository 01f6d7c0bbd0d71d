"""The files of a run's text as they were at its last start: text that changed since is not trained on unnoticed.

`text.json` in the run's folder holds of each file its size, when it was changed, and a digest: of all of it where the
text of the run is small, else of its beginning and end. A file that was only copied or touched is the same. What lies
on other machines is known by its size and by what the place says of its content (an ETag) or of its last change.
"""

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from bytelatent.credentials import masked
from bytelatent.data import DataSettings
from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.text import BadRow, find_files
from bytelatent.text.streams import file_system, is_remote, readable

LISTING = "text.json"
READ_WHOLE = 1 << 28  # bytes of text in all, up to which every byte counts
EDGE = 1 << 15  # bytes of the beginning and of the end of each file, where there is more
READ_BYTES = 1 << 20
NAMED = 5  # files in a message
# What places say of a file: of its content, or else of its last change.
CONTENT = ("ETag", "etag", "sha256", "blob_id", "md5Hash", "content_md5", "checksum")
CHANGE = ("LastModified", "last_modified", "mtime", "updated", "created")


class TextFile(NamedTuple):
    """A file as it was found."""

    key: str  # the setting that names it: `train` or `valid`
    name: str  # without credentials
    size: int | None  # bytes; None where the place does not say
    changed: str  # when it was changed, or what its place says of its content, or why it cannot be read
    edge: int | None = None  # bytes at each end that the digest is of; None: all
    digest: str | None = None  # None: of a file on another machine

    @property
    def quoted(self) -> str:
        return "'" + self.name.encode("utf-8", "backslashreplace").decode() + "'"  # a name need not be UTF-8

    def __str__(self) -> str:
        size = "unknown size" if self.size is None else f"{self.size:,} bytes"
        return f"{size}, {self.changed}" if self.changed else size


def list_text(data: DataSettings) -> list[TextFile]:
    """All files of a run's text.

    Raises:
        UserError: a source has none.
    """
    found = [
        (key, file)
        for key, sources in (("train", data.train), ("valid", data.valid))
        for source in sources
        for file in find_files(source.path)
    ]
    total = sum(os.path.getsize(file) for _, file in found if os.path.isfile(file))
    edge = None if total <= READ_WHOLE else EDGE
    return [_remote(key, file) if is_remote(file) else _here(key, file, edge) for key, file in found]


def write_listing(run: Path, files: list[TextFile]) -> None:
    with whole_file(run / LISTING) as aside:
        aside.write_text(json.dumps([file._asdict() for file in files], indent=1), encoding="utf-8")


def check_listing(run: Path, files: list[TextFile], allow_changed: bool) -> list[str]:
    """Compare the files with those of the run's last start.

    Returns:
        Lines about what differs.

    Raises:
        UserError: text has changed, and that is not allowed.
    """
    before = _read_listing(run)
    if before is None:
        return []
    then = {(file.key, file.name): file for file in before}
    now = {(file.key, file.name): file for file in files}
    changed = [f"{file.quoted} was {then[place]}, now {file}" for place, file in now.items() if _differs(then, file)]
    changed += [f"{file.quoted} is new ({file})" for place, file in now.items() if place not in then]
    changed += [f"{file.quoted} is gone (was {file})" for place, file in then.items() if place not in now]
    unsure = [
        f"{file.quoted} was of {then[place].changed}, now of {file.changed}"
        for place, file in now.items()
        if place in then and then[place].edge is not None and then[place].changed != file.changed
        if not _differs(then, file)
    ]
    lines = []
    if unsure:
        lines.append(f"data: same size, beginning and end, and so taken for the same text: {_some(unsure)}")
    if changed:
        line = f"data: the text of '{run}' has changed; these files are not those of the checkpoint: {_some(changed)}"
        if not allow_changed:
            raise UserError(
                f"{line}; put it back as it was, or go on with what is there now: data.allow_changed=true, or use "
                "another run=FOLDER"
            )
        lines.append(f"{line}; training goes on with what is there now (data.allow_changed)")
    return lines


def _differs(then: dict[tuple[str, str], TextFile], file: TextFile) -> bool:
    """Whether a file is another text than at the last start; not where it is new."""
    before = then.get((file.key, file.name))
    if before is None:
        return False
    if before.size != file.size:
        return True
    if before.digest is None or file.digest is None:
        return before.changed != file.changed
    digest = file.digest
    if before.edge != file.edge:  # other files came or went, and so another part of each counts
        digest = _here(file.key, file.name, before.edge).digest
    return before.digest != digest


def _read_listing(run: Path) -> list[TextFile] | None:
    path = run / LISTING
    try:
        return [TextFile(**file) for file in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else None
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"'{path}' is damaged: it says what the text of the run was; remove it to go on with the text that is there"
        ) from None


def _here(key: str, file: str, edge: int | None) -> TextFile:
    try:
        with readable(file):
            stat = os.stat(file)
            digest = _digest(file, stat.st_size, edge)
    except BadRow as error:  # training passes over some such files
        return TextFile(key, file, None, str(error))
    return TextFile(key, file, stat.st_size, _time(stat.st_mtime), edge, digest)


def _remote(key: str, file: str) -> TextFile:
    try:
        with readable(file):
            fs, path = file_system(file)
            about: dict[str, Any] = fs.info(path)
    except BadRow as error:
        return TextFile(key, masked(file), None, str(error))
    mark = next((about[name] for name in (*CONTENT, *CHANGE) if about.get(name) is not None), "")
    return TextFile(key, masked(file), about.get("size"), str(mark))


def _digest(file: str, size: int, edge: int | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        if edge is None or size <= 2 * edge:
            while block := stream.read(READ_BYTES):
                digest.update(block)
        else:
            digest.update(stream.read(edge))
            stream.seek(size - edge)
            digest.update(stream.read(edge))
    return digest.hexdigest()


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "milliseconds")


def _some(of: list[str]) -> str:
    more = f", and {len(of) - NAMED:,} more" if len(of) > NAMED else ""
    return ", ".join(of[:NAMED]) + more
