"""Snapshots of models as the hub's own client keeps them, so that what one program downloads is there for all.

    HF_HUB_CACHE/models--OWNER--NAME/refs/REVISION            the commit that a branch or a tag stood for
    HF_HUB_CACHE/models--OWNER--NAME/snapshots/COMMIT/...     its files, or links to them
    HF_HUB_CACHE/.locks/models--OWNER--NAME/                  who may write there now

A snapshot of ours also holds a record of the files that the hub lists, for other programs may leave one half filled.
"""

import json
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from bytelatent.errors import UserError
from bytelatent.files import only_writer, whole_file
from bytelatent.hub.repository import HubFile
from bytelatent.hub.transfer import missing_files, tell
from bytelatent.log import Console

RECORD = ".bytelatent.json"
SETTINGS = ("config.json", "params.json")  # a model of any format has one of these
TEXTS = ("*.json", "*.md", "LICENSE*", "USE_POLICY*")
SAFE_WEIGHTS, PICKLED_WEIGHTS = ".safetensors", ".pth"
INDEX = ".safetensors.index.json"  # names the files that a large model's weights are spread over
ANOTHER_CACHE = "set HF_HUB_CACHE to another folder"
POLL = 0.5  # seconds between looks at another writer's lock
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")


class Unwritable(UserError):
    """The cache is one to read only, or full."""


@dataclass(frozen=True)
class ModelCache:
    """What the cache holds of one model: its folder, and where its writers' lock is."""

    name: str
    root: Path  # HF_HUB_CACHE

    @classmethod
    def of(cls, name: str) -> "ModelCache":
        """As the environment says now."""
        from huggingface_hub import constants

        return cls(name, Path(constants.HF_HUB_CACHE).expanduser())

    @property
    def folder_name(self) -> str:
        return "--".join(["models", *self.name.split("/")])

    def snapshot(self, commit: str) -> Path:
        """Where the files of a commit are, or would be."""
        return self.root / self.folder_name / "snapshots" / commit

    def reference(self, revision: str) -> Path:
        """The file that holds the commit of a branch or a tag."""
        return self.root / self.folder_name / "refs" / revision

    def find(self, revision: str, weights: bool) -> Path | None:
        """The snapshot that a branch, a tag or a commit stood for when it was last downloaded, if it is whole.

        Args:
            weights: whether it must have the weights, too.
        """
        try:
            commit = self.reference(revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            commit = revision
        folder = self.snapshot(commit)
        listed = read_record(folder)
        if listed is None:
            return folder if looks_whole(folder, weights) else None
        return folder if not missing_files(chosen(listed, weights), folder) else None

    def point(self, revision: str, commit: str) -> None:
        """Note what a branch or a tag stands for now; a cache that is only read goes without."""
        if revision == commit:
            return
        place = self.reference(revision)
        with suppress(OSError, ValueError):
            if place.read_text(encoding="utf-8") == commit:
                return
        with suppress(UserError), whole_file(place) as aside:
            aside.write_text(commit, encoding="utf-8")

    @contextmanager
    def turn(self, console: Console) -> Iterator[None]:
        """Keep other processes from writing for as long as the block lasts; wait for one that does.

        Raises:
            Unwritable: the cache cannot be written.
        """
        with ExitStack() as stack:
            waits = False
            while True:
                try:
                    stack.enter_context(only_writer(self.root / ".locks" / self.folder_name))
                    break
                except UserError as error:
                    # What `only_writer` met tells a lock that is taken from a folder that cannot be written.
                    if not isinstance(error.__context__, BlockingIOError):
                        raise Unwritable(f"{error}; {ANOTHER_CACHE}") from None
                if not waits:
                    tell(console, f"{self.name} is being downloaded by another process; waiting for it")
                    waits = True
                time.sleep(POLL)
            yield


def is_offline() -> bool:
    """Whether the environment says to ask no hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def chosen(listed: list[HubFile], weights: bool) -> list[HubFile]:
    """The files of a repository that make a model: settings, texts, weights; never code.

    Weights that were pickled come only from a repository without safetensors.
    """
    plain = [file for file in listed if not any(part.startswith(".") for part in PurePosixPath(file.path).parts)]
    suffix = SAFE_WEIGHTS if any(file.path.endswith(SAFE_WEIGHTS) for file in plain) else PICKLED_WEIGHTS
    return [file for file in plain if _is_text(file.path) or (weights and file.path.endswith(suffix))]


def _is_text(path: str) -> bool:
    return any(fnmatchcase(PurePosixPath(path).name, pattern) for pattern in TEXTS)


def write_record(folder: Path, listed: list[HubFile]) -> None:
    """Keep in a snapshot what the hub lists for its commit, of the files that a model is made of.

    Raises:
        Unwritable: the cache cannot be written.
    """
    values = {"files": [asdict(file) for file in chosen(listed, weights=True)]}
    try:
        with whole_file(folder / RECORD) as aside:
            aside.write_text(json.dumps(values, indent=1), encoding="utf-8")
    except UserError as error:
        raise Unwritable(f"{error}; {ANOTHER_CACHE}") from None


def read_record(folder: Path) -> list[HubFile] | None:
    """The files that `write_record` kept; None if there is no record that can be read."""
    try:
        return [HubFile(**file) for file in json.loads((folder / RECORD).read_text(encoding="utf-8-sig"))["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def looks_whole(folder: Path, weights: bool) -> bool:
    """Whether a snapshot without a record, so of another program, has what a model needs."""
    try:
        has_settings = any((folder / name).is_file() for name in SETTINGS)
        return has_settings and (not weights or _has_weights(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # an index that is damaged, for one
        return False


def _has_weights(folder: Path) -> bool:
    found = [path for path in folder.rglob("*") if path.name.endswith((SAFE_WEIGHTS, PICKLED_WEIGHTS))]
    wanted = {place for path in found for place in _shards(path)}
    for index in folder.rglob(f"*{INDEX}"):
        names = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()
        wanted.update(index.parent / name for name in names)
    return bool(found) and all(place.is_file() for place in wanted)  # a link may lead nowhere


def _shards(path: Path) -> list[Path]:
    """A file of weights, and the others that its name counts."""
    parts = _SHARD.fullmatch(path.name)
    if not parts:
        return [path]
    count = int(parts["count"])
    return [path.with_name(f"{parts['stem']}-{i:05d}-of-{count:05d}{SAFE_WEIGHTS}") for i in range(1, count + 1)]
