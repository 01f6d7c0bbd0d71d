"""Models from runs, folders and repositories."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bytelatent.config import renamed_arguments
from bytelatent.device import choose_device, precision_of_weights
from bytelatent.errors import UserError
from bytelatent.files import MANIFEST, find_corruption
from bytelatent.hub import Unreachable, is_repository_name, model_exists, model_folder
from bytelatent.model import ByteLM, ByteLMSettings
from bytelatent.weights import meta
from bytelatent.weights.formats import FORMATS
from bytelatent.weights.model_card import LEGAL_FILES, leads_out, stated_licence
from bytelatent.weights.safetensors_io import shown
from bytelatent.weights.stored_model import Pretrained, StoredModel


@renamed_arguments(entropy="entropy_model")
def open_pretrained(
    source: str | Path,
    entropy_model: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> StoredModel:
    """Find a model and check that it is complete, without loading its weights.

    Args:
        source: a run; a folder in any of `FORMATS`; or OWNER/NAME, a repository of the Hugging Face hub in one of them.
        entropy_model: where the byte LM is, if it is neither in `source` nor next to it.
        revision: a branch, a tag or a commit of the repository.
        token: a user's key for the hub; default: HF_TOKEN, or the key of `hf auth login`.
        local_files_only: use earlier downloads, and do not connect to the hub.
        weights: False reads only the configuration and downloads nothing large.

    Raises:
        UserError: there is no model, it is not complete, or it needs mathematics that is not implemented here.
    """
    access = _Access(token, local_files_only, weights)
    found, path = access.open("model", source, revision)
    if entropy_model is not None:
        if isinstance(found.config.model, ByteLMSettings):
            raise UserError(f"entropy_model: '{source}' is a byte LM itself and needs no other; leave it out")
        return replace(found, byte_lm=access.byte_lm(entropy_model))
    return access.with_byte_lm(found, path, source)


@renamed_arguments(entropy="entropy_model")
def load(
    source: str | Path,
    entropy_model: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
) -> Pretrained:
    """Load a model; the other arguments are those of `open_pretrained`.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps`, `auto`, or a torch.device.
        dtype: precision of the weights: `float32`, `bfloat16`, `auto` (as stored), or a torch.dtype. The byte LM of a
            BLT stays as stored.

    Raises:
        UserError: as `open_pretrained`; or the device or precision is not available.
    """
    device, precision = choose_device(device), precision_of_weights(dtype)
    return open_pretrained(source, entropy_model, revision, token, local_files_only).load(device, precision)


def load_byte_lm(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    setting: str = "model",
) -> ByteLM:
    """A byte LM, or the byte LM of a BLT; the arguments are those of `load` and `find_byte_lm`."""
    return load_byte_lm_and_context(source, device, dtype, setting)[0]


def load_byte_lm_and_context(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    setting: str = "model",
) -> tuple[ByteLM, int]:
    """A byte LM, or the byte LM of a BLT, and its context in ids; the arguments are those of `load` and `find_byte_lm`.

    Raises:
        UserError: there is no byte LM, or the device or precision is not available.
    """
    device, precision = choose_device(device), precision_of_weights(dtype)
    found, context = find_byte_lm(source, setting=setting)
    model = found.load(device, precision).model
    assert isinstance(model, ByteLM)
    return model, context


def find_byte_lm(source: str | Path, weights: bool = True, setting: str = "model") -> tuple[StoredModel, int]:
    """A byte LM, or the byte LM of a BLT, without loading its weights, and its context in ids.

    Args:
        source: as in `open_pretrained`.
        weights: False reads only the configuration.
        setting: the setting or argument that named `source`, for errors.

    Raises:
        UserError: there is no byte LM.
    """
    access = _Access(None, False, weights)
    found = access.with_byte_lm(*access.open(setting, source), source)
    return _byte_lm_of(setting, found, source), found.config.context


@dataclass(frozen=True)
class _Access:
    """How models are fetched from the hub.

    Attributes:
        weights: whether the weights are wanted.
    """

    token: str | None
    local_files_only: bool
    weights: bool

    def open(self, setting: str, source: str | Path, revision: str | None = None) -> tuple[StoredModel, Path]:
        """The model itself, and its folder.

        Args:
            setting: the argument that named `source`, for errors.
        """
        path = _folder(setting, source)
        if not path.exists() and _is_on_hub(str(source)):
            try:
                path = model_folder(str(source), revision, self.token, self.local_files_only, self.weights)
            except Unreachable as error:  # it may also be the mistyped name of a folder
                raise Unreachable(f"{setting}: '{source}' is not a folder here, and on the hub {error}") from None
            return replace(open_folder(path, self.weights, setting), source=str(source)), path
        if not path.is_dir():
            raise UserError(
                f"{setting}: '{source}' is not a folder; name a run (blt demo makes runs/demo), a folder with a "
                "model, or OWNER/NAME on the hub"
            )
        if revision is not None:
            raise UserError(f"revision: '{source}' is a folder, which has no revisions; leave it out")
        return open_folder(path, self.weights, setting), path

    def byte_lm(self, source: str | Path) -> StoredModel:
        """The byte LM at `source`, or that of the BLT there."""
        found = self.with_byte_lm(*self.open("entropy_model", source), source)
        return _byte_lm_of("entropy_model", found, source)

    def with_byte_lm(self, found: StoredModel, path: Path, source: str | Path) -> StoredModel:
        """The model, with its byte LM from Meta's separate folder or repository if it needs that."""
        patching = found.config.patching
        if found.byte_lm is not None or patching is None or not patching.needs_entropies or not meta.is_meta(path):
            return found
        if not _folder("model", source).exists():  # it is a repository; so is the byte LM, of the same owner
            name = f"{str(source).split('/')[0]}/{meta.BYTE_LM}"
            exists = model_exists(name, self.token, self.local_files_only)
            return replace(found, byte_lm=self.byte_lm(name)) if exists else found
        folders = [path.absolute().parent / name for name in meta.BYTE_LM_FOLDERS]
        inner = next((folder for folder in folders if meta.is_meta(folder)), None)
        return replace(found, byte_lm=self.byte_lm(inner)) if inner is not None else found


def open_folder(folder: Path, weights: bool = True, setting: str = "model") -> StoredModel:
    """The model in a folder, in whatever format it is.

    Raises:
        UserError: there is no model, it is not complete, or it needs mathematics that is not implemented here.
    """
    format = next((format for format in FORMATS.values() if format.recognizes(folder)), None)
    if format is None:
        raise UserError(
            f"{setting}: '{folder}' holds no model: neither settings.yaml, params.json nor a known config.json"
        )
    found = format.open(folder, weights)
    if weights and (folder / MANIFEST).is_file() and (torn := find_corruption(folder, ending=".safetensors")):
        raise UserError(f"'{folder}' is not as it was written: {torn}; fetch or write it again")
    links = [file for pattern in LEGAL_FILES for file in sorted(folder.glob(pattern)) if leads_out(file)]
    lines = [f"'{shown(str(file))}' is a link out of its folder and is skipped" for file in links]
    found = replace(found, folder=folder, warnings=[*found.warnings, *lines])
    if found.config.origin.licence is None:
        found = replace(found, config=found.config.with_origin(licence=stated_licence(folder)))
    return found


def _byte_lm_of(setting: str, found: StoredModel, source: str | Path) -> StoredModel:
    if isinstance(found.config.model, ByteLMSettings):
        return found
    if found.byte_lm is None:
        raise UserError(f"{setting}: '{source}' holds a BLT without a byte LM; name the byte LM's own run or folder")
    return replace(found.byte_lm, folder=found.folder)


def _is_on_hub(source: str) -> bool:
    """Whether a name that is not a folder here means a repository, and not a mistyped folder."""
    owner = source.split("/")[0]
    return is_repository_name(source) and owner != "runs" and not Path(owner).exists()


def _folder(setting: str, source: str | Path) -> Path:
    """The path of a folder with this name."""
    try:
        path = Path(source).expanduser()
        path.is_dir()
    except RuntimeError:
        raise UserError(f"{setting}: '{source}': there is no such user; write the path without ~") from None
    except OSError as error:
        raise UserError(f"{setting}: '{source}' cannot be read: {error.strerror or error}") from None
    return path
