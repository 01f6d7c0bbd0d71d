"""Models of the hub as local folders."""

import re
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from bytelatent.errors import UserError
from bytelatent.hub.cache import ANOTHER_CACHE, ModelCache, Unwritable, chosen, is_offline, read_record, write_record
from bytelatent.hub.repository import MAIN, HubFile, Repository, Unreachable
from bytelatent.hub.transfer import check_space, missing_files, require_client, tell, transfer
from bytelatent.log import Console

EXTRA = "hf"
PASS_KEY = "pass token=..., set HF_TOKEN, or run: hf auth login"
LONGEST_NAME = 96  # characters
_NAME = re.compile(r"[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?", re.ASCII)


def is_repository_name(text: str) -> bool:
    """Whether `text` is OWNER/NAME as the hub allows it. A path such as runs/demo can be one, too."""
    fits = len(text) <= LONGEST_NAME and _NAME.fullmatch(text) is not None
    return fits and "--" not in text and ".." not in text and not text.endswith(".git")


def model_folder(
    name: str,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
    console: Console | None = None,
) -> Path:
    """A model of the hub as a folder in the Hugging Face cache; what is missing there is downloaded.

    The folder holds the repository's *.json, *.safetensors, *.md, LICENSE* and USE_POLICY* files, all of one commit;
    *.pth files only if it has no *.safetensors; and what other programs downloaded of the same commit. If the hub does
    not answer, or the cache cannot be written, what the cache has is used, and said.

    Args:
        name: OWNER/NAME.
        revision: a branch, a tag or a commit; the branch main if left out.
        token: the key of a user; HF_TOKEN, or the key of `hf auth login`, if left out.
        local_files_only: use the cache alone, as with HF_HUB_OFFLINE.
        weights: whether the weights are needed; without them it is a small download.
        console: where progress is shown; standard error if left out.

    Raises:
        UserError: there is no such model or revision; it needs access; neither the hub nor the cache has it; a file
            is not what the hub lists; the cache cannot be written or has no room.
        Interrupted: by Ctrl-C.
    """
    cache = _cache_of(name)
    revision = revision or MAIN
    _check_revision(revision, name)
    console = console or Console(stderr=True)
    cached = cache.find(revision, weights)
    if local_files_only or is_offline():
        if cached is None:
            raise UserError(
                f"the cache '{cache.root}' does not hold all of {name} at '{revision}'; run the same without "
                f"local_files_only and HF_HUB_OFFLINE, or run: hf download {name} --revision {revision}"
            )
        return cached
    if cached and cached.name == revision and read_record(cached):  # a commit stays what it is
        return cached
    repository = _repository(name, token, console)
    try:
        commit, listed = _look_up(_once_if_cached(repository, cached), cache, revision)
    except Unreachable:
        if cached is None:
            raise
        return _instead(cached, f"{name}: the hub does not answer", console)
    try:
        _fill(cache, repository, commit, listed, weights, console)
    except Unwritable:
        if cached is None:
            raise
        return _instead(cached, f"{name}: the cache '{cache.root}' cannot be written", console)
    cache.point(revision, commit)
    return cache.snapshot(commit)


def model_exists(name: str, token: str | None = None, local_files_only: bool = False) -> bool:
    """Whether the hub has a model and shows it to this user; if the hub is not asked or silent, whether the cache has.

    Raises:
        UserError: `name` cannot be one; the model needs access; neither the hub answers nor is it in the cache.
    """
    cache = _cache_of(name)
    cached = cache.find(MAIN, weights=False)
    if local_files_only or is_offline():
        return cached is not None
    try:
        return _once_if_cached(_repository(name, token, Console(stderr=True)), cached).exists()
    except Unreachable:
        if cached is None:
            raise
        return True


def _cache_of(name: str) -> ModelCache:
    if not is_repository_name(name):
        raise UserError(f"'{name}' is no name of a model on the hub; write OWNER/NAME")
    require_client(name, EXTRA)
    return ModelCache.of(name)


def _check_revision(revision: str, name: str) -> None:
    """Git has no such names either; here they would lead out of the cache."""
    if "\\" in revision or "\0" in revision or not {"", ".", ".."}.isdisjoint(revision.split("/")):
        raise UserError(f"'{revision}' is no revision of {name}; pass a branch, a tag or a commit")


def _repository(name: str, token: str | None, console: Console) -> Repository:
    return Repository(name, kind="model", token=token, notice=partial(tell, console), pass_key=PASS_KEY)


def _once_if_cached(repository: Repository, cached: Path | None) -> Repository:
    """The same; it is tried once only, where the cache can stand in for it."""
    return replace(repository, attempts=1) if cached else repository


def _instead(cached: Path, why: str, console: Console) -> Path:
    tell(console, f"{why}; what the cache has is used, commit {cached.name[:8]}")
    return cached


def _look_up(repository: Repository, cache: ModelCache, revision: str) -> tuple[str, list[HubFile]]:
    """The commit of a revision, and what the hub lists for it, now or when it was recorded."""
    commit = repository.commit_of(revision)
    listed = read_record(cache.snapshot(commit))
    if listed is None:
        listed = repository.files(commit)
        if not chosen(listed, weights=True):
            raise UserError(f"{repository.name} holds no model at '{revision}'; it has {repository.examples(commit)}")
    return commit, listed


def _fill(
    cache: ModelCache, repository: Repository, commit: str, listed: list[HubFile], weights: bool, console: Console
) -> None:
    """Download what a snapshot lacks. A cache that lacks nothing need not be writable."""
    folder, files = cache.snapshot(commit), chosen(listed, weights)
    if not missing_files(files, folder):
        with suppress(UserError):
            write_record(folder, listed)
        return
    with cache.turn(console):
        write_record(folder, listed)  # before the first file, so that nobody takes a half of them for all
        if missing_files(files, folder):  # another process may have been at it
            check_space(files, folder, repository.name, f"make room or {ANOTHER_CACHE}")
            transfer(repository, commit, files, folder, console, repository.name)
