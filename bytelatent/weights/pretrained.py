"""Models from wherever they come."""

from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError

from bytelatent.device import choose_device, precision_of_weights
from bytelatent.errors import UserError
from bytelatent.files import MANIFEST, what_is_torn
from bytelatent.hub import Unreachable, is_repository_name, model_exists, model_folder
from bytelatent.model import ByteLM, ByteLMSettings
from bytelatent.weights import hugging_face, meta, native
from bytelatent.weights.model_card import LEGAL_FILES, leads_out, stated_licence
from bytelatent.weights.safetensors_io import shown
from bytelatent.weights.stored_model import Pretrained, StoredModel


def open_pretrained(
    source: str | Path,
    entropy: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> StoredModel:
    """Find a model and check that it is whole, without reading its weights.

    Args:
        source: a run of ours; a folder in our format, in one of Meta's, or in that of transformers; or OWNER/NAME, a
            repository of the Hugging Face hub that holds one of these.
        entropy: where the byte LM (entropy model) is, if it stands neither inside `source` nor beside it.
        revision: a branch, a tag or a commit of the repository.
        token: the key of a user of the hub; HF_TOKEN, or the key of `hf auth login`, if left out.
        local_files_only: take what was downloaded earlier, and do not ask the hub.
        weights: whether the weights are wanted; without them nothing large is downloaded.

    Raises:
        UserError: there is no model, it is not whole, or it computes something that is not known here.
    """
    place = _folder(source)
    on_hub = not place.exists() and _is_on_hub(str(source))
    if on_hub:
        try:
            place = model_folder(str(source), revision, token, local_files_only, weights)
        except Unreachable as error:  # it may as well be a folder whose name is mistyped
            raise Unreachable(f"model: '{source}' is no folder here, and on the hub {error}") from None
    elif not place.is_dir():
        raise UserError(
            f"model: '{source}' is no folder; name a run (blt demo makes runs/demo), a folder with a model, or "
            "OWNER/NAME on the hub"
        )
    elif revision is not None:
        raise UserError(f"revision: '{source}' is a folder, which has none; leave it out")
    found = _open(place, weights)
    if on_hub:
        found = replace(found, source=str(source))
    if entropy is not None:
        if isinstance(found.config.model, ByteLMSettings):
            raise UserError(f"entropy: '{source}' is a byte LM itself and asks no other; leave it out")
        return replace(found, byte_lm=_byte_lm_of(entropy, token, local_files_only, weights))
    rule = found.config.patching
    if found.byte_lm is None and rule is not None and rule.needs_entropies and meta.is_meta(place):
        return replace(found, byte_lm=_beside(str(source) if on_hub else place, token, local_files_only, weights))
    return found


def load(
    source: str | Path,
    entropy: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
) -> Pretrained:
    """Read a model; the other arguments are those of `open_pretrained`.

    Args:
        device: where its weights are to be: `cpu`, `cuda`, `cuda:1`, `mps`, `auto`, or torch's own.
        dtype: their precision, `float32`, `bfloat16`, torch's own, or `auto` as they are stored; the byte LM of a BLT
            stays as it is stored.

    Raises:
        UserError: there is no model, it is not whole, or it computes something that is not known here; or the device
            or the precision is not there.
    """
    place, precision = choose_device(device), precision_of_weights(dtype)
    return open_pretrained(source, entropy, revision, token, local_files_only).load(place, precision)


def load_byte_lm(source: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto") -> ByteLM:
    """A byte LM, or the byte LM of a BLT; `device` and `dtype` are those of `load`."""
    return load_byte_lm_and_context(source, device, dtype)[0]


def load_byte_lm_and_context(
    source: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "auto"
) -> tuple[ByteLM, int]:
    """A byte LM, or that of a BLT, and how many ids it is to see at once; `device` and `dtype` are those of `load`.

    Raises:
        UserError: there is none, or the device or the precision is not there.
    """
    place, precision = choose_device(device), precision_of_weights(dtype)
    found, context = find_byte_lm(source)
    model = found.load(place, precision).model
    assert isinstance(model, ByteLM)
    return model, context


def find_byte_lm(source: str | Path, weights: bool = True) -> tuple[StoredModel, int]:
    """A byte LM, or that of a BLT, whose weights are not read yet, and how many ids it is to see at once.

    Raises:
        UserError: there is none.
    """
    found = open_pretrained(source, weights=weights)
    is_byte_lm = isinstance(found.config.model, ByteLMSettings)
    return found if is_byte_lm else _inner_byte_lm(found, source), found.config.context


def _is_on_hub(source: str) -> bool:
    """Whether a name that is no folder here is a repository's, and not a folder's that somebody mistyped."""
    owner = source.split("/")[0]
    return is_repository_name(source) and owner != "runs" and not Path(owner).exists()


def _folder(source: str | Path) -> Path:
    """Where a folder of this name would be."""
    try:
        place = Path(source).expanduser()
        place.is_dir()
    except RuntimeError:
        raise UserError(f"model: '{source}': there is no such user; write the path without ~") from None
    except OSError as error:
        raise UserError(f"model: '{source}' cannot be read: {error.strerror or error}") from None
    return place


def _open(folder: Path, weights: bool) -> StoredModel:
    try:
        if native.is_run(folder):
            found = native.open_run(folder, weights)
        elif native.is_native(folder):
            found = native.open_native(folder, weights)
        elif meta.is_meta(folder):
            found = meta.open_meta(folder, weights)
        elif hugging_face.is_hugging_face(folder):
            found = hugging_face.open_hugging_face(folder, weights)
        else:
            raise UserError(
                f"model: '{folder}' holds no model: neither settings.yaml, params.json nor a config.json that is "
                "known here"
            )
    except ValidationError as error:
        first = error.errors()[0]
        key = "".join(f"{part}: " for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] in ("missing", "value_error") else f", not {shown(repr(first['input']))}"
        raise UserError(f"'{folder}': its settings are not consistent: {key}{message}{value}; fetch it again") from None
    if weights and (folder / MANIFEST).is_file() and (torn := what_is_torn(folder, ending=".safetensors")):
        raise UserError(f"'{folder}' is not as it was written: {torn}; fetch or write it again")
    links = [file for pattern in LEGAL_FILES for file in sorted(folder.glob(pattern)) if leads_out(file)]
    lines = [f"'{shown(str(file))}' is a link to somewhere else; it is passed over" for file in links]
    found = replace(found, folder=folder, warnings=[*found.warnings, *lines])
    if found.config.origin.licence is None:
        origin = found.config.origin.model_copy(update={"licence": stated_licence(folder)})
        found = replace(found, config=found.config.model_copy(update={"origin": origin}))
    return found


def _byte_lm_of(source: str | Path, token: str | None, local_files_only: bool, weights: bool) -> StoredModel:
    try:
        found = open_pretrained(source, None, None, token, local_files_only, weights)
    except UserError as error:
        raise UserError(f"entropy: {str(error).removeprefix('model: ')}") from None
    return found if isinstance(found.config.model, ByteLMSettings) else _inner_byte_lm(found, source)


def _inner_byte_lm(found: StoredModel, source: str | Path) -> StoredModel:
    if found.byte_lm is None:
        raise UserError(f"entropy: '{source}' holds a BLT without a byte LM; name the byte LM's own run or folder")
    return replace(found.byte_lm, folder=found.folder)


def _beside(source: str | Path, token: str | None, local_files_only: bool, weights: bool) -> StoredModel | None:
    """Meta's entropy model: a folder, or a repository of the same owner."""
    if isinstance(source, Path):
        beside = [source.absolute().parent / name for name in meta.BYTE_LM_FOLDERS]
        inner = next((folder for folder in beside if meta.is_meta(folder)), None)
        return _byte_lm_of(inner, token, local_files_only, weights) if inner is not None else None
    name = f"{source.split('/')[0]}/{meta.BYTE_LM}"
    if not model_exists(name, token, local_files_only):
        return None
    return _byte_lm_of(name, token, local_files_only, weights)
