"""Data sets downloaded from the hub: one commit of each, whole, and at once where an earlier call has done it."""

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import partial
from glob import has_magic
from pathlib import Path
from urllib.parse import unquote

from fsspec.utils import glob_translate

from bytelatent.errors import UserError, nearest
from bytelatent.files import only_writer, whole_file
from bytelatent.hub.repository import MAIN, HubFile, Repository
from bytelatent.hub.transfer import check_space, missing_files, require_client, tell, transfer
from bytelatent.log import Console
from bytelatent.text.formats import is_named_as_text

DATASETS = {  # name: repository and pattern of its files
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "data/**/*.parquet"),
    "fineweb_edu_10bt": ("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
    "dclm_baseline_1.0": ("mlfoundations/dclm-baseline-1.0", "**/*.jsonl.zst"),
    "dclm_baseline_1.0_10prct": ("mlfoundations/dclm-baseline-1.0", "global-shard_01_of_10/**/*.jsonl.zst"),
}
DONE, UNFINISHED = ".source.json", ".source.unfinished.json"

_SCHEME = "hf://"
_ADDRESS = re.compile(
    r"hf://(datasets/)?(?!datasets/)(?P<name>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<pattern>.*))?"
)
_NO_DATASETS = re.compile(r"hf://(models|spaces|kernels|buckets)/")


@dataclass(frozen=True)
class Request:
    """What is wanted: the files of a data set that a pattern chooses (its text files if empty), at a revision."""

    repository: str
    pattern: str = ""
    revision: str = MAIN

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" + (f"/{self.pattern}" if self.pattern else "")


@dataclass(frozen=True)
class Record:
    """What a folder holds, or is to hold: kept in it, so that no later call asks the hub again."""

    request: Request
    commit: str
    files: tuple[HubFile, ...]


def is_hub(source: str) -> bool:
    """Whether `source` is the name of a known data set, or hf://datasets/OWNER/NAME[@REVISION][/PATTERN].

    The short form hf://OWNER/NAME is a data set, too.
    """
    return source in DATASETS or (source.startswith(_SCHEME) and not _NO_DATASETS.match(source))


def short_name(source: str) -> str:
    """What to call the folder of a data set: the known name, or the NAME of its address.

    Raises:
        UserError: `source` is no data set of the hub.
    """
    return source if source in DATASETS else _request(source).repository.split("/")[1]


def fetch(source: str, folder: Path, console: Console, token: str | None = None) -> Path:
    """Download a data set of the hub into `folder`, and return it.

    All files are of one commit: what the revision stood for at the first call. A call that was stopped, also by a kill,
    is gone on with by the next one: finished files stay, broken ones are transferred from where they broke. Once all
    files are there, a call returns at once, without the network. A file that is there with the listed size is taken to
    be the listed one.

    Args:
        source: a name of `DATASETS`, or hf://datasets/OWNER/NAME[@REVISION][/PATTERN]; a revision is a branch, a tag
            or a commit.
        token: the key of a user, for data sets that need access; HF_TOKEN if left out.

    Raises:
        UserError: there is no such data set, revision or file; it needs access; the hub does not answer; the folder
            holds something else, cannot be written or has no room.
        Interrupted: by Ctrl-C.
    """
    request = _request(source)
    folder = Path(folder)
    finished = _read(folder / DONE, request)
    if finished and not missing_files(finished.files, folder):
        return folder
    require_client(source, "data")
    repository = Repository(request.repository, token=token, notice=partial(tell, console))
    with only_writer(folder):
        record = finished or _read(folder / UNFINISHED, request)
        if record is None:
            record = _look_up(repository, request)
            _write(folder / UNFINISHED, record)
        check_space(record.files, folder, str(request), "make room or choose another folder")
        transfer(repository, record.commit, record.files, folder, console, str(request))
        if finished is None:
            os.replace(folder / UNFINISHED, folder / DONE)
    return folder


def _request(source: str) -> Request:
    if source in DATASETS:
        return Request(*DATASETS[source])
    if not source.startswith(_SCHEME):
        raise UserError(
            f"'{source}' is no data set; known are {', '.join(DATASETS)} and hf://datasets/OWNER/NAME"
            f"{nearest(source, list(DATASETS))}"
        )
    parts = _ADDRESS.fullmatch(source)
    if not parts or _NO_DATASETS.match(source):
        raise UserError(f"'{source}' is no data set; write hf://datasets/OWNER/NAME[@REVISION][/PATTERN]")
    return Request(parts["name"], (parts["pattern"] or "").strip("/"), unquote(parts["revision"] or MAIN))


def _look_up(repository: Repository, request: Request) -> Record:
    commit = repository.commit_of(request.revision)
    files = _chosen(repository, commit, request.pattern)
    if not files:
        folder = _fixed_folder(request.pattern)
        raise UserError(
            f"{request.repository} has no file '{request.pattern or '*.parquet, *.jsonl, *.txt'}' at "
            f"'{request.revision}'; it has {repository.examples(commit, folder)}"
        )
    return Record(request, commit, tuple(files))


def _chosen(repository: Repository, commit: str, pattern: str) -> list[HubFile]:
    if has_magic(pattern):
        wanted = re.compile(glob_translate(pattern))
        return [file for file in repository.files(commit, _fixed_folder(pattern)) if wanted.fullmatch(file.path)]
    found = repository.at(commit, pattern) if pattern else ""
    if found is None:
        return []
    if isinstance(found, HubFile):
        return [found]
    return [file for file in repository.files(commit, found) if is_named_as_text(file.path)]


def _fixed_folder(pattern: str) -> str:
    """The deepest folder that all files of a pattern are in; only this is listed, for repositories can be huge."""
    fixed = []
    for part in pattern.split("/")[:-1]:
        if has_magic(part):
            break
        fixed.append(part)
    return "/".join(fixed)


def _write(path: Path, record: Record) -> None:
    with whole_file(path) as aside:
        aside.write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


def _read(path: Path, request: Request) -> Record | None:
    """The record in a file, if there is one.

    Raises:
        UserError: it is about something else than `request`, or damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(HubFile(**file) for file in values["files"])
        record = Record(Request(**values["request"]), values["commit"], files)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{path}' is damaged; remove it and run the same again") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}") from None
    if record.request != request:
        raise UserError(f"'{path.parent}' holds {record.request}, not {request}; remove it or choose another folder")
    return record
