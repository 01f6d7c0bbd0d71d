"""Data sets and tokenizers downloaded from the hub: of a data set one commit, whole, and only what is missing."""

import hashlib
import json
import logging
import os
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from glob import has_magic
from http.client import HTTPException
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fsspec.utils import glob_translate
from rich.filesize import decimal

from bytelatent.errors import UserError, nearest
from bytelatent.files import only_writer, whole_file, write_whole_json
from bytelatent.hub import MAIN, few, hub_errors, require_client
from bytelatent.text.formats import is_named_as_text

LOGGER = logging.getLogger(__name__)

DATASETS = {  # name: repository and pattern of its files
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "data/**/*.parquet"),
    "fineweb_edu_10bt": ("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
    "dclm_baseline_1.0": ("mlfoundations/dclm-baseline-1.0", "**/*.jsonl.zst"),
    "dclm_baseline_1.0_10prct": ("mlfoundations/dclm-baseline-1.0", "global-shard_01_of_10/**/*.jsonl.zst"),
}
WORKERS = 8  # files at once
DONE, UNFINISHED = ".source.json", ".source.unfinished.json"

_SCHEME = "hf://"
_ADDRESS = re.compile(
    r"hf://(datasets/)?(?!datasets/)(?P<name>[\w.-]+/[\w.-]+)"
    r"(@(?P<revision>refs/(convert|pr)/[^/]+|[^/]+))?(/(?P<pattern>.*))?"
)
_NO_DATASETS = re.compile(r"hf://(models|spaces|kernels|buckets)/")
TOKENIZER_JSON = "tokenizer.json"
TIKTOKEN_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
TIKTOKEN_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class DatasetRequest:
    """The files of a data set that a pattern selects (empty: its text files), at a revision."""

    repository: str
    pattern: str = ""
    revision: str = MAIN

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" + (f"/{self.pattern}" if self.pattern else "")


def is_hub(source: str) -> bool:
    """Whether `source` is the name of a known data set, or hf://datasets/OWNER/NAME[@REVISION][/PATTERN].

    The short form hf://OWNER/NAME is a data set, too.
    """
    return source in DATASETS or (source.startswith(_SCHEME) and not _NO_DATASETS.match(source))


def dataset_name(source: str) -> str:
    """The name for the folder of a data set: the known name, or the NAME of its address.

    Raises:
        UserError: `source` is not a data set of the hub.
    """
    return source if source in DATASETS else _request(source).repository.split("/")[1]


def download_dataset(source: str, folder: Path, token: str | None = None) -> Path:
    """Download a data set of the hub into `folder`, and return it.

    All files are of one commit: that of the revision at the first call. A repeated call downloads what is missing; once
    all files are there with their listed size, it returns at once, without the network.

    Args:
        source: a name of `DATASETS`, or hf://datasets/OWNER/NAME[@REVISION][/PATTERN]; a revision is a branch, a tag
            or a commit.
        token: of a user, for data sets that need access; HF_TOKEN if left out.

    Raises:
        UserError: there is no such data set, revision or file; it needs access; the hub does not answer; the folder
            holds something else or cannot be written.
    """
    request = _request(source)
    folder = Path(folder)
    record = _record(folder / DONE, request)
    if record and not _missing(record, folder):
        return folder
    require_client(source, "data")
    from huggingface_hub import hf_hub_download

    name = request.repository
    with only_writer(folder), hub_errors(name, "dataset", request.revision, token):
        record = record or _record(folder / UNFINISHED, request)
        if record is None:
            record = _look_up(request, token)
            write_whole_json(folder / UNFINISHED, record, indent=1)
        missing, commit = _missing(record, folder), record["commit"]
        size = decimal(sum(file["size"] for file in missing))
        LOGGER.info("%s at %s: %d files to download, %s", request, commit[:8], len(missing), size)
        get = partial(hf_hub_download, name, repo_type="dataset", revision=commit, local_dir=folder, token=token)
        for file in missing:  # a file of another size would be taken for a finished one
            (folder / file["path"]).unlink(missing_ok=True)
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(get, [file["path"] for file in missing]))
        if still := _missing(record, folder):
            raise UserError(f"{name}: '{still[0]['path']}' has another size than the hub lists; run the same again")
        if not (folder / DONE).exists():
            os.replace(folder / UNFINISHED, folder / DONE)
    return folder


def _request(source: str) -> DatasetRequest:
    if source in DATASETS:
        return DatasetRequest(*DATASETS[source])
    if not source.startswith(_SCHEME):
        raise UserError(
            f"'{source}' is not a data set; known are {', '.join(DATASETS)} and hf://datasets/OWNER/NAME"
            f"{nearest(source, list(DATASETS))}"
        )
    parts = _ADDRESS.fullmatch(source)
    if not parts or _NO_DATASETS.match(source):
        raise UserError(f"'{source}' is not a data set; write hf://datasets/OWNER/NAME[@REVISION][/PATTERN]")
    return DatasetRequest(parts["name"], (parts["pattern"] or "").strip("/"), unquote(parts["revision"] or MAIN))


def _look_up(request: DatasetRequest, token: str | None) -> dict[str, Any]:
    """What a folder will hold. It is saved there, so that later calls do not ask the hub again."""
    from huggingface_hub import HfApi

    api, name, pattern = HfApi(token=token), request.repository, request.pattern
    info = api.dataset_info(name, revision=request.revision)
    where: Any = {"repo_type": "dataset", "revision": info.sha}
    at_path: list[Any] = api.get_paths_info(name, [pattern], **where) if pattern and not has_magic(pattern) else []
    if at_path and hasattr(at_path[0], "size"):  # a file
        found = at_path
    elif has_magic(pattern):
        matches = re.compile(glob_translate(pattern)).fullmatch
        found = [file for file in _listed(api, name, _fixed_folder(pattern), where) if matches(file.path)]
    else:
        listed = _listed(api, name, pattern, where) if at_path or not pattern else []
        found = [file for file in listed if is_named_as_text(file.path)]
    if not found:
        there = few([file.rfilename for file in info.siblings or []])
        raise UserError(
            f"{name} has no file '{pattern or '*.parquet, *.jsonl, *.txt'}' at '{request.revision}'; it has {there}"
        )
    files = [{"path": file.path, "size": file.size} for file in found]
    return {"request": asdict(request), "commit": str(info.sha), "files": files}


def _listed(api: Any, name: str, folder: str, where: dict[str, Any]) -> list[Any]:
    """The files below a folder; only this is listed, for repositories can be huge."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        entries = list(api.list_repo_tree(name, folder or None, recursive=True, **where))
    except EntryNotFoundError:
        return []
    return [entry for entry in entries if hasattr(entry, "size")]


def _fixed_folder(pattern: str) -> str:
    """The deepest folder that all files of a pattern are in."""
    return "/".join(takewhile(lambda part: not has_magic(part), pattern.split("/")[:-1]))


def _missing(record: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The files of a record that are not in `folder` with their listed size."""

    def is_whole(place: Path, size: int) -> bool:
        with suppress(OSError):  # a folder that this user may not enter; writing there fails with its reason
            return place.is_file() and place.stat().st_size == size
        return False

    return [file for file in record["files"] if not is_whole(folder / file["path"], file["size"])]


def _record(path: Path, request: DatasetRequest) -> dict[str, Any] | None:
    """The record in a file, if there is one; one about something else than `request` is an error."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        of = DatasetRequest(**record["request"])
        files = [{"path": file["path"], "size": file["size"]} for file in record["files"]]
        record = {"commit": record["commit"], "files": files}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{path}' is corrupt; remove it and run the same again") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}") from None
    if of != request:
        raise UserError(f"'{path.parent}' holds {of}, not {request}; remove it or choose another folder")
    return record


def is_data_set(source: str) -> bool:
    """Whether a source is one of the hub's data sets; a file or folder of that name takes precedence."""
    return is_hub(source) and not Path(source).exists()


TOKENIZERS = {  # name: repository and file
    "llama2": ("meta-llama/Llama-2-7b", "tokenizer.model"),
    "llama3": ("meta-llama/Meta-Llama-3-8B", "original/tokenizer.model"),
    "gemma": ("google/gemma-2-2b", "tokenizer.model"),
}
TIKTOKEN = "tiktoken"
NAMES = (*TOKENIZERS, TIKTOKEN)


def download_tokenizer(
    name: str,
    folder: Path,
    token: str | None = None,
    url: str = TIKTOKEN_URL,
    sha256: str | None = TIKTOKEN_SHA256,
) -> list[Path]:
    """Download a tokenizer into `folder`, under the names its repository gives the files; return them.

    With a hub tokenizer comes tokenizer.json, which patching mode `bpe` reads, if the repository holds it.

    Args:
        name: one of `NAMES`.
        token: of a user who has access; HF_TOKEN if left out.
        url: where cl100k_base is, for the name `tiktoken`.
        sha256: digest that its bytes must have; None accepts any.

    Raises:
        UserError: the name is unknown, access is missing, the server does not answer, the folder cannot be written.
    """
    folder = Path(folder)
    if name == TIKTOKEN:
        target, data = folder / url.rsplit("/", 1)[1], _bytes_at(url)
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise UserError(f"'{url}' gave other bytes than were published; run the same again, or check the network")
        with whole_file(target) as aside:
            aside.write_bytes(data)
        return [target]
    if name not in TOKENIZERS:
        raise UserError(f"'{name}' is not a known tokenizer; known are {', '.join(NAMES)}{nearest(name, list(NAMES))}")
    require_client(name, "data")
    from huggingface_hub import HfApi, hf_hub_download

    repository, file = TOKENIZERS[name]
    with hub_errors(repository, token=token):
        listed = [file.rfilename for file in HfApi(token=token).model_info(repository).siblings or []]
        if file not in listed:
            raise UserError(f"{repository} has no file '{file}'; it has {few(listed)}")
        wanted = [name for name in (file, TOKENIZER_JSON) if name in listed]
        for name in wanted:
            hf_hub_download(repository, name, local_dir=folder, token=token)
    return [folder / name for name in wanted]


def _bytes_at(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, HTTPException) as error:  # URLError and HTTPError are OSErrors
        raise UserError(f"'{url}' cannot be downloaded: {error}; check the network and run the same again") from None
    except ValueError:
        raise UserError(f"'{url}' is not an address; write http:// or https://") from None
