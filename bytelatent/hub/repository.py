"""Repositories of the Hugging Face hub: what they hold, and their files, fetched so that a broken transfer goes on.

The hub's own client begins a file anew when its process was stopped. Text to train on and weights come in files of
gigabytes, so they are transferred here, over plain HTTP with ranges; listings, addresses, keys and errors are the
client's.
"""

import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from bytelatent.errors import Interrupted, UserError
from bytelatent.files import own_file

ATTEMPTS = 5
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 16.0  # seconds
PASSING_STATUSES = {408, 429, 500, 502, 503, 504}
HUB_PAGES = "https://huggingface.co"  # where access is granted, also if HF_ENDPOINT names a mirror
FEW = 5  # names shown in an error
MAIN = "main"  # the branch that every repository has

Result = TypeVar("Result")


class NoSuchRepository(UserError):
    """The hub has no repository of this name, or does not show it to this user."""


class Unreachable(UserError):
    """The hub does not answer, or only says that it cannot for now."""


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it; `sha256` is known for large files only."""

    path: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Repository:
    """A data set or a model of the hub.

    Args:
        name: OWNER/NAME.
        token: the key of a user; HF_TOKEN, or the key of `hf auth login`, if left out.
        notice: told in one line when something is tried again.
        stop: once set, every method ends soon with `Interrupted`.
        pass_key: how a user hands over a key, said where one is needed.
        attempts: how often something that may pass is tried, one after another, without a new byte in between.
    """

    name: str
    kind: Literal["dataset", "model"] = "dataset"
    token: str | None = None
    notice: Callable[[str], None] = print
    stop: threading.Event = field(default_factory=threading.Event)
    pass_key: str = "pass --api_key or set HF_TOKEN"
    attempts: int = ATTEMPTS

    @property
    def page(self) -> str:
        return f"{HUB_PAGES}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def exists(self) -> bool:
        """Whether the hub has it and shows it to this user.

        Raises:
            UserError: the hub does not answer, or not to this user.
        """
        try:
            with self._in_one_line():
                self._persist(lambda: self._api.repo_info(self.name, repo_type=self.kind, timeout=30))
        except NoSuchRepository:
            return False
        return True

    def commit_of(self, revision: str) -> str:
        """The commit that a branch, a tag or a commit's own name stands for now.

        Raises:
            UserError: there is no such repository or revision, or the hub does not answer.
        """
        from huggingface_hub.errors import RevisionNotFoundError

        with self._in_one_line():
            try:
                info = self._persist(
                    lambda: self._api.repo_info(self.name, repo_type=self.kind, revision=revision, timeout=30)
                )
            except RevisionNotFoundError:
                refs = self._persist(lambda: self._api.list_repo_refs(self.name, repo_type=self.kind))
                names = [ref.name for ref in [*refs.branches, *refs.tags]]
                raise UserError(f"{self.name} has no revision '{revision}'; it has {_few(names)}") from None
        if not re.fullmatch("[0-9a-f]+", info.sha or ""):
            raise UserError(f"{self.name}: the hub does not say which commit '{revision}' is; pass one as the revision")
        return info.sha

    def files(self, commit: str, folder: str = "") -> list[HubFile]:
        """All files below a folder, sorted; none if it does not exist.

        Raises:
            UserError: the hub does not answer, or not to this user.
        """
        return sorted((_listed(entry) for entry in self._tree(commit, folder) if hasattr(entry, "size")), key=_path)

    def at(self, commit: str, path: str) -> HubFile | str | None:
        """What is at a path: a file, a folder (its path), or nothing.

        Raises:
            UserError: the hub does not answer, or not to this user.
        """
        with self._in_one_line():
            found = self._persist(
                lambda: self._api.get_paths_info(self.name, [path], repo_type=self.kind, revision=commit)
            )
        if not found:
            return None
        return _listed(found[0]) if hasattr(found[0], "size") else found[0].path

    def examples(self, commit: str, folder: str = "") -> str:
        """A few names in a folder, or at the top if it does not exist, to show to a user who looked for others."""
        entries = self._tree(commit, folder, recursive=False) or self._tree(commit, "", recursive=False)
        return _few([entry.path if hasattr(entry, "size") else f"{entry.path}/" for entry in entries])

    def download(self, file: HubFile, commit: str, target: Path, advance: Callable[[int], None]) -> None:
        """Fetch a file; it appears at `target` when it is whole and is what the hub lists.

        What was transferred stands aside until then, and a later call goes on from there, also after a kill.

        Args:
            advance: told how many more bytes there are; fewer, where a transfer had to begin anew.

        Raises:
            UserError: the hub does not answer, or not to this user; the file is not what it lists; the disk is full.
            Interrupted: `stop` was set.
        """
        part = part_of(target)
        with self._in_one_line(), _on_disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            open(part, "ab", opener=own_file).close()
            advance(part.stat().st_size)
            if part.stat().st_size > file.size:
                _begin_anew(part, advance)
            self._persist(lambda: self._append(file, commit, part, advance), lambda: part.stat().st_size)
            _verify(file, part, self.name, advance)
            os.replace(part, target)

    def _append(self, file: HubFile, commit: str, part: Path, advance: Callable[[int], None]) -> None:
        """Transfer what is still missing from `part`."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        have = part.stat().st_size
        if have == file.size:
            return
        # Without `identity` a server may compress the file, and then ranges count something else.
        headers = {**build_hf_headers(token=self.token, library_name="bytelatent"), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        url = hf_hub_url(self.name, file.path, repo_type=self.kind, revision=commit)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            hf_raise_for_status(response)
            total = _total(response)
            if total is not None and total != file.size:
                raise UserError(
                    f"{self.name}: '{file.path}' is {total:,} bytes, but {file.size:,} are listed; "
                    "the server is at fault, try again later"
                )
            if have and response.status_code != 206:  # a server without ranges
                _begin_anew(part, advance)
            with open(part, "ab", opener=own_file) as out:
                for chunk in response.iter_bytes():
                    if self.stop.is_set():
                        raise Interrupted
                    out.write(chunk)
                    advance(len(chunk))

    @cached_property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(token=self.token, library_name="bytelatent")

    def _tree(self, commit: str, folder: str, recursive: bool = True) -> list[Any]:
        from huggingface_hub.errors import EntryNotFoundError

        where = {"path_in_repo": folder or None, "recursive": recursive, "revision": commit, "repo_type": self.kind}
        with self._in_one_line():
            try:
                return self._persist(lambda: list(self._api.list_repo_tree(self.name, **where)))
            except EntryNotFoundError:
                return []

    def _persist(self, call: Callable[[], Result], progress: Callable[[], int] = lambda: 0) -> Result:
        """The result of `call`, tried again after what may pass, as long as `progress` grows or tries are left."""
        tries, reached = 0, progress()
        while True:
            try:
                return call()
            except Exception as error:
                if self.stop.is_set():
                    raise Interrupted from None
                if not _may_pass(error):
                    raise
                tries, reached = (1 if progress() > reached else tries + 1), progress()
                if tries >= self.attempts:
                    raise
                pause = min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE)
                self.notice(f"{self.name}: {_first_line(error)}; trying again in {pause:.0f} s")
            if self.stop.wait(pause):
                raise Interrupted

    @contextmanager
    def _in_one_line(self) -> Iterator[None]:
        """Say in one line why the hub did not do what it was asked."""
        from huggingface_hub import constants, errors

        try:
            yield
        except errors.GatedRepoError:
            raise UserError(self._needs_access()) from None
        except errors.RepositoryNotFoundError:
            raise NoSuchRepository(
                f"there is no {'data set' if self.kind == 'dataset' else self.kind} '{self.name}' on the hub, "
                f"or it is private: check the name, or {self.pass_key}"
            ) from None
        except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
            # What a data set's folder holds is of one commit for good; a model's is looked up at each call.
            way_out = "begin again in another folder" if self.kind == "dataset" else "run the same again"
            raise UserError(f"{self.name} does not hold a file any more that was listed before; {way_out}") from None
        except errors.HFValidationError as error:
            raise UserError(f"'{self.name}' is no name of a repository: {error}") from None
        except errors.OfflineModeIsEnabled:
            raise UserError(f"{self.name} cannot be downloaded: HF_HUB_OFFLINE is set; unset it") from None
        except errors.HfHubHTTPError as error:
            if error.response.status_code == 401:
                raise UserError(
                    f"{self.name}: the hub does not accept the key; make one at {HUB_PAGES}/settings/tokens"
                ) from None
            passes = error.response.status_code in PASSING_STATUSES
            raise (Unreachable if passes else UserError)(
                f"{self.name}: the hub fails: {_first_line(error)}; run the same again later, it goes on from here"
            ) from None
        except Exception as error:
            if not _is_of_the_network(error):
                raise
            raise Unreachable(
                f"{self.name}: {constants.ENDPOINT} cannot be reached: {_first_line(error)}; check the network and "
                "HF_ENDPOINT, then run the same again, it goes on from here"
            ) from None

    def _needs_access(self) -> str:
        from huggingface_hub import get_token

        if self.token or get_token():
            return f"{self.name} needs access that your key does not have: open {self.page}, accept the terms"
        return f"{self.name} needs access: open {self.page}, accept the terms, then {self.pass_key}"


def part_of(target: Path) -> Path:
    """Where a file stands until it is whole: hidden, so that nobody reads it as text."""
    return target.with_name(f".{target.name}.part")


def _verify(file: HubFile, part: Path, name: str, advance: Callable[[int], None]) -> None:
    size = part.stat().st_size
    if size == file.size:
        if file.sha256 is None:
            return
        with part.open("rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() == file.sha256:
                return
    _begin_anew(part, advance)  # a part that was damaged on this disk would stay so
    raise UserError(f"{name}: '{file.path}' came with other bytes than the hub lists; run the same again")


def _begin_anew(part: Path, advance: Callable[[int], None]) -> None:
    advance(-part.stat().st_size)
    os.truncate(part, 0)


@contextmanager
def _on_disk(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if type(error).__module__ != "builtins":  # the hub's
            raise
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"the disk is full: '{target}' is not whole; make room and run the same again, it goes on from here"
            ) from None
        raise UserError(f"'{target}' cannot be written: {error.strerror or error}") from None


def _total(response: Any) -> int | None:
    """The size of the whole file, where the answer tells it."""
    of_range = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if of_range:
        return int(of_range.group(1))
    length = response.headers.get("Content-Length")
    return int(length) if length and response.status_code == 200 else None


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING_STATUSES
    # The two are about HF_ENDPOINT itself.
    return _is_of_the_network(error) and type(error).__name__ not in {"UnsupportedProtocol", "InvalidURL"}


def _is_of_the_network(error: Exception) -> bool:
    """Of httpx or httpx2, whichever the hub's client came with."""
    return type(error).__module__.startswith("httpx")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _listed(entry: Any) -> HubFile:
    path = PurePosixPath(entry.path)
    if path.is_absolute() or ".." in path.parts:  # no hub has such a file; whoever answers in its place may
        raise UserError(
            f"the hub lists a file '{entry.path}' that would lie outside of the folder; nothing is downloaded"
        )
    return HubFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None)


def _path(file: HubFile) -> str:
    return file.path


def _few(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")
