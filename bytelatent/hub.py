"""The Hugging Face hub, by its own client: models in its cache, data sets in a folder, errors in one line."""

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from getpass import getpass
from pathlib import Path, PurePosixPath

from bytelatent import log
from bytelatent.errors import UserError, install

LOGGER = logging.getLogger(__name__)

MAIN = "main"
PAGES = "https://huggingface.co"  # what people open
ASK = ""  # what `--api_key` is where no key follows it
TEXTS = ("*.json", "*.jinja", "*.md", "LICENSE*", "USE_POLICY*")
SETTINGS = ("config.json", "params.json")  # a model of any format has one of these
SAFE_WEIGHTS, PICKLED_WEIGHTS = ".safetensors", ".pth"
PASS_TOKEN = "pass token=..., set HF_TOKEN, or run: hf auth login"
PASSING_STATUSES = {408, 429, 500, 502, 503, 504}  # of a hub that may answer later
_NAME = re.compile(r"[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?", re.ASCII)


class Unreachable(UserError):
    """The hub does not answer; the repository may be there all the same."""


def is_repository_name(text: str) -> bool:
    """Whether `text` is OWNER/NAME as the hub allows it. A path such as runs/demo can be one, too."""
    fits = len(text) <= 96 and _NAME.fullmatch(text) is not None
    return fits and "--" not in text and ".." not in text and not text.endswith(".git")


def require_client(what: str, extra: str) -> None:
    """
    Raises:
        UserError: huggingface_hub is not installed, which `what` needs and `extra` of this package brings.
    """
    try:
        import huggingface_hub  # noqa: F401
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise UserError(f"'{what}' needs {install('huggingface_hub', extra)}") from None
    if not log.console.is_terminal:
        disable_progress_bars()


def token_of(given: str | None) -> str | None:
    """The token of an option, typed unseen where it is `ASK`; None leaves it to HF_TOKEN and `hf auth login`.

    Raises:
        UserError: there is no terminal to type at, or it cannot be a token.
    """
    if given is None:
        return None
    if given == ASK and not sys.stdin.isatty():
        raise UserError("--api_key: there is no terminal to ask for the key; set HF_TOKEN to it")
    token = (given or getpass("key of the hub (it is not shown): ")).strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError("--api_key: it is empty, or holds a character that no key has; copy it once more")
    return token


def model_folder(
    name: str,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """A model of the hub as a folder in the Hugging Face cache; downloads what is missing there.

    The folder holds settings, cards, licences and weights, never code; pickled weights only of a repository without
    safetensors. If the hub does not answer, the cache is used, with a warning.

    Args:
        name: OWNER/NAME.
        revision: a branch, a tag or a commit; the branch main if left out.
        token: a user's token; HF_TOKEN, or that of `hf auth login`, if left out.
        local_files_only: use the cache alone, as with HF_HUB_OFFLINE.
        weights: whether the weights are needed.

    Raises:
        UserError: there is no such model or revision; it needs access; neither the hub nor the cache has it; the cache
            cannot be written.
    """
    _check_name(name)
    from huggingface_hub import HfApi, constants, snapshot_download

    revision = revision or MAIN
    if local_files_only or constants.HF_HUB_OFFLINE:
        if (cached := _cached(name, revision, weights)) is not None:
            return cached
        raise UserError(
            f"the cache '{constants.HF_HUB_CACHE}' does not hold all of {name} at '{revision}'; run the same without "
            f"local_files_only and HF_HUB_OFFLINE, or run: hf download {name} --revision {revision}"
        )
    try:
        with hub_errors(name, revision=revision, token=token):
            listed = HfApi(token=token).model_info(name, revision=revision).siblings or []
            files = _model_files([file.rfilename for file in listed], weights)
            if not _model_files(files, weights=False):
                raise UserError(f"{name} holds no model at '{revision}'; it has {few([f.rfilename for f in listed])}")
            patterns = [literal(file) for file in files]
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, token=token))
    except Unreachable:
        if (cached := _cached(name, revision, weights)) is None:
            raise
        LOGGER.warning("%s: the hub does not answer; using the cached commit %s", name, cached.name[:8])
        return cached


def model_exists(name: str, token: str | None = None, local_files_only: bool = False) -> bool:
    """Whether the hub has a model and shows it to this user; without the hub, whether the cache has it.

    Raises:
        UserError: `name` cannot be one; neither the hub answers nor is it in the cache.
    """
    _check_name(name)
    from huggingface_hub import HfApi, constants

    cached = _cached(name, MAIN, weights=False) is not None
    if local_files_only or constants.HF_HUB_OFFLINE:
        return cached
    try:
        with hub_errors(name, token=token):
            return HfApi(token=token).repo_exists(name)
    except Unreachable:
        if not cached:
            raise
        return True


@contextmanager
def hub_errors(name: str, kind: str = "model", revision: str = MAIN, token: str | None = None) -> Iterator[None]:
    """Errors of the hub's client about a repository in one line.

    Raises:
        Unreachable: the hub does not answer.
        UserError: all other errors.
    """
    from huggingface_hub import HfApi, errors

    page = f"{PAGES}/{'datasets/' if kind == 'dataset' else ''}{name}"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(_needs_access(name, page, token)) from None
    except errors.RepositoryNotFoundError:
        what = "data set" if kind == "dataset" else kind
        raise UserError(
            f"there is no {what} '{name}' on the hub, or it is private: check the name, or {PASS_TOKEN}"
        ) from None
    except errors.RevisionNotFoundError:
        with hub_errors(name, kind, token=token):
            refs = HfApi(token=token).list_repo_refs(name, repo_type=kind)
        known = few([ref.name for ref in [*refs.branches, *refs.tags]])
        raise UserError(f"{name} has no revision '{revision}'; it has {known}") from None
    except errors.HFValidationError as error:
        raise UserError(f"'{name}' is not the name of a repository: {error}") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise _unreachable(name, error) from None
    except errors.EntryNotFoundError:
        raise UserError(f"{name} no longer holds a file that it listed; run the same again") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise UserError(f"{name}: the hub does not accept the token; make one at {PAGES}/settings/tokens") from None
        if status in PASSING_STATUSES:
            raise _unreachable(name, error) from None
        raise UserError(f"{name}: the hub fails: {_first_line(error)}; run the same again later") from None
    except OSError as error:
        if type(error).__module__ != "builtins":  # of the network
            raise _unreachable(name, error) from None
        place = f"'{error.filename}': " if error.filename else ""
        raise UserError(
            f"{name} cannot be written: {place}{error.strerror or _first_line(error)}; make room, or set HF_HUB_CACHE "
            "to another folder, and run the same again"
        ) from None
    except Exception as error:
        if not type(error).__module__.startswith("httpx"):
            raise
        raise _unreachable(name, error) from None


def literal(path: str) -> str:
    """A pattern that matches this path alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def few(names: Sequence[str], most: int = 5) -> str:
    """Some of these names, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "no files"


def _check_name(name: str) -> None:
    if not is_repository_name(name):
        raise UserError(f"'{name}' is not the name of a model on the hub; write OWNER/NAME")
    require_client(name, "hf")


def _model_files(paths: Sequence[str], weights: bool) -> list[str]:
    """The files of a repository that make a model."""
    plain = [path for path in paths if not any(part.startswith(".") for part in PurePosixPath(path).parts)]
    suffix = SAFE_WEIGHTS if any(path.endswith(SAFE_WEIGHTS) for path in plain) else PICKLED_WEIGHTS
    texts = [path for path in plain if any(fnmatchcase(PurePosixPath(path).name, pattern) for pattern in TEXTS)]
    return texts + [path for path in plain if weights and path.endswith(suffix)]


def _cached(name: str, revision: str, weights: bool) -> Path | None:
    """The snapshot in the cache, if it has settings and, where they are asked for, weights."""
    from huggingface_hub import try_to_load_from_cache

    places = [try_to_load_from_cache(name, file, revision=revision) for file in SETTINGS]
    folder = next((Path(place).parent for place in places if isinstance(place, str)), None)
    if folder is None:
        return None
    files = [path.name for path in folder.rglob("*") if path.is_file()]  # a link may lead nowhere
    return folder if not weights or any(file.endswith((SAFE_WEIGHTS, PICKLED_WEIGHTS)) for file in files) else None


def _needs_access(name: str, page: str, token: str | None) -> str:
    from huggingface_hub import get_token

    if token or get_token():
        return f"{name} needs access that your token does not have: open {page}, accept the terms"
    return f"{name} needs access: open {page}, accept the terms, then {PASS_TOKEN}"


def _unreachable(name: str, error: Exception) -> Unreachable:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return Unreachable(f"{name} cannot be downloaded: HF_HUB_OFFLINE is set; unset it")
    return Unreachable(
        f"{name}: {constants.ENDPOINT} cannot be reached: {_first_line(error)}; check the network and HF_ENDPOINT, "
        "then run the same again"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
