"""The files of a source: those that are text, a line about those that are not, and whether one has changed."""

import glob
import hashlib
import os
from collections import Counter
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.terminal import one_line
from bytelatent.text.documents import MAX_LINE, BadRow, TextError, short, warn_once
from bytelatent.text.formats import file_name, format_of_name, kind_of, readable_kind
from bytelatent.text.streams import file_system, is_remote, readable

NAMES_WIDTH = 60  # characters of a log line for the names of files
READ_BYTES = 1 << 20
# What file systems give of a file: of its content, or else of its last change.
CONTENT = ("ETag", "etag", "sha256", "blob_id", "md5Hash", "content_md5", "checksum")
CHANGE = ("LastModified", "last_modified", "mtime", "updated", "created")


def find_files(path: str) -> list[str]:
    """The files of a source, sorted: a file, a folder (all text below it but hidden files), or a glob.

    Links to folders are followed, to each folder once. A file with several names, as links, is given once. A warning
    names files of a folder or a glob that are passed over, once.

    Raises:
        UserError: there are none, or the file is not text; see `formats`.
    """
    if not path.strip():  # as of a variable that is not set; it would be the folder that one is in
        raise TextError("the path of the text is empty; name a file, a folder (. for this one) or a pattern")
    if is_remote(path):
        return _find_remote(path)
    location = Path(path).expanduser()
    try:
        if location.is_dir():
            found = _below(location)
            if not found:
                raise TextError(f"the folder '{path}' holds no files")
            return _text_among(found, path)
        if location.is_symlink() and not location.exists():
            raise TextError(f"'{path}' is a broken link")
        if location.exists():
            readable_kind(str(location))
            return [str(location)]
        found = [name for name in glob.glob(str(location), recursive=True) if not Path(name).is_dir()]
        found = _each_once(found, path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        if isinstance(error, UserError):
            raise
        raise TextError(f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not found:
        raise TextError(f"'{path}' does not exist; give a file, a folder or a pattern such as 'text/*.jsonl'")
    return _text_among(found, path)


def name_inside(file: str, source: str) -> str:
    """The path of a file below the folder that is its source; where that is a file or a pattern, its name alone."""
    if is_remote(source):
        folder = source.rstrip("/") + "/"
        return file.removeprefix(folder) if file.startswith(folder) else file_name(file)
    folder = Path(source).expanduser()
    return os.path.relpath(file, folder) if folder.is_dir() else os.path.basename(file)


def _below(folder: Path) -> list[str]:
    """All but hidden files below a folder; links to folders come last, so that a folder keeps its own name."""
    found: list[Path] = []
    known: list[str] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        current = folders.pop() if folders else links.pop(0)
        try:
            about = os.stat(current)
            if (about.st_dev, about.st_ino) in seen:
                known.append(os.path.relpath(current, folder))
                continue
            seen.add((about.st_dev, about.st_ino))
            for entry in sorted(os.scandir(current), key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                inside = current / entry.name
                if not os.path.isdir(inside):
                    found.append(inside)
                else:
                    (links if entry.is_symlink() else folders).append(inside)
        except OSError as error:
            warn_once(one_line(f"data: the folder '{current}' is passed over: {error.strerror or error}"))
    if known:
        warn_once(
            _naming(f"data: '{folder}': {len(known):,} passed over, a link to a folder that is read already", known)
        )
    return list(map(str, sorted(map(Path, _each_once(list(map(str, found)), str(folder))))))


def _each_once(files: list[str], source: str) -> list[str]:
    """The files, sorted: one that has several names, as symbolic or hard links, by its own or else its first name."""
    names: dict[tuple[int, int] | str, str] = {}
    again: list[str] = []
    for file in sorted(files, key=lambda file: (os.path.islink(file), _is_below_a_link(file), file)):
        key: tuple[int, int] | str = file
        with suppress(OSError):  # a broken link
            about = os.stat(file)
            key = (about.st_dev, about.st_ino) if about.st_ino else os.path.realpath(file)
        if names.setdefault(key, file) is not file:
            again.append(file)
    if again:
        shown = sorted(name_inside(file, source) if Path(source).is_dir() else file for file in again)
        warn_once(
            _naming(f"data: '{source}': {len(again):,} passed over, a link to a file that is read already", shown)
        )
    return sorted(names.values())


def _is_below_a_link(file: str) -> bool:
    folder = os.path.dirname(file)
    return os.path.realpath(folder) != os.path.abspath(folder)


def _text_among(files: list[str], source: str) -> list[str]:
    """The files that are text, with a line about the others of each kind; it is an error if there are none."""
    text, others = [], {}
    for file in files:
        why_not = None
        named = format_of_name(file_name(file))
        if not is_remote(file) and not os.path.exists(file):
            why_not = "a broken link"
        elif named is None or not named.suffix_decides or not (is_remote(file) or os.path.isfile(file)):
            with suppress(BadRow):  # whatever reads it will say so
                why_not = kind_of(file).why_not
        if why_not:
            others[file] = why_not
        else:
            text.append(file)
    if not text:
        first, what = next(iter(others.items()))
        raise TextError(f"none of the {len(files):,} files of '{source}' is text: '{first}' is {what}")
    for what, count in Counter(others.values()).most_common():
        is_pattern = not is_remote(source) and not Path(source).expanduser().is_dir()
        names = [file if is_pattern else name_inside(file, source) for file, why in others.items() if why == what]
        warn_once(_naming(f"data: '{source}': {count:,} of {len(files):,} files passed over, {what}", names))
    return text


def _naming(line: str, names: list[str]) -> str:
    """A line that ends with the first of some names, as many as fit."""
    found = short(one_line(line), " " * NAMES_WIDTH)[:-NAMES_WIDTH]
    for number, name in enumerate(map(one_line, names)):
        if len(name) > NAMES_WIDTH - 10:
            name = f"...{name[-(NAMES_WIDTH - 13) :]}"
        longer = f"{found}{', ' if number else ': '}'{name}'"
        if number and len(longer) + len(", ...") > MAX_LINE:
            return f"{found}, ..."
        found = longer
    return found


def _find_remote(path: str) -> list[str]:
    fs, inner = file_system(path)
    if path.startswith(("http://", "https://")) and path.endswith("/"):
        raise TextError(f"'{path}' is a page, not a file; name the files on it")
    with readable(path):
        if glob.has_magic(inner.partition("?")[0] if path.startswith("http") else inner):
            found = [name for name in fs.glob(inner) if fs.isfile(name)]
        elif fs.isfile(inner):
            readable_kind(path)
            return [fs.unstrip_protocol(inner)]
        else:
            found = [n for n in fs.find(inner) if _visible(Path(n.removeprefix(inner)))] if fs.exists(inner) else []
    if not found:
        raise TextError(f"there are no files at '{path}'{_why_not(fs, inner)}")
    return _text_among(sorted(fs.unstrip_protocol(name) for name in found), path)


def _why_not(fs: Any, inner: str) -> str:
    """`: REASON` where a location only looks empty because it cannot be reached; the file systems hide that."""
    try:
        fs.info(inner)
    except Exception as error:
        reason = error.__cause__ or error
        if not isinstance(reason, FileNotFoundError):
            return f": {reason}"
    return ""


def _visible(inside: Path) -> bool:
    return not any(part.startswith(".") for part in inside.parts)


class FileState(NamedTuple):
    """A file as it was found, to see later whether it has changed.

    Attributes:
        name: without credentials.
        size: in bytes; None where it is not known.
        changed: when it was changed, or of a file on another machine an ETag or the like, or why it cannot be read.
        edge: bytes at each end that the digest is of; None: all.
        digest: of the content; None of a file on another machine.
    """

    name: str
    size: int | None
    changed: str
    edge: int | None = None
    digest: str | None = None

    @classmethod
    def of(cls, file: str, edge: int | None = None) -> "FileState":
        """The state of a file now. It is read, where it is on this machine: whole, or `edge` bytes of each end."""
        try:
            with readable(file):
                if is_remote(file):
                    fs, path = file_system(file)
                    about: dict[str, Any] = fs.info(path)
                    mark = next((about[name] for name in (*CONTENT, *CHANGE) if about.get(name) is not None), "")
                    return cls(masked(file), about.get("size"), str(mark))
                stat = os.stat(file)
                changed = datetime.fromtimestamp(stat.st_mtime).astimezone().isoformat(" ", "milliseconds")
                return cls(file, stat.st_size, changed, edge, _digest(file, stat.st_size, edge))
        except BadRow as error:  # training passes over some such files
            return cls(masked(file), None, str(error))

    def is_as(self, before: "FileState") -> bool:
        """Whether the file holds the same as before. One that was only copied or touched does."""
        if before.size != self.size:
            return False
        if before.digest is None or self.digest is None:
            return before.changed == self.changed
        digest = self.digest if before.edge == self.edge else self.of(self.name, before.edge).digest
        return before.digest == digest

    @property
    def quoted(self) -> str:
        return "'" + self.name.encode("utf-8", "backslashreplace").decode() + "'"  # a name need not be UTF-8

    def __str__(self) -> str:
        size = "unknown size" if self.size is None else f"{self.size:,} bytes"
        return f"{size}, {self.changed}" if self.changed else size


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
