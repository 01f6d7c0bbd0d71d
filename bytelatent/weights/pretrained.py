"""Models from runs, folders and repositories, and models written in any format."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.filesize import decimal

from bytelatent.config import renamed_arguments
from bytelatent.device import choose_device, precision_of_weights
from bytelatent.errors import UserError, nearest
from bytelatent.files import MANIFEST, find_corruption, remove_unfinished, whole_folder
from bytelatent.hub import Unreachable, is_repository_name, model_exists, model_folder
from bytelatent.model import BLTSettings, ByteLM, ByteLMSettings, LanguageModelSettings, TokenLMSettings
from bytelatent.model.settings import NAMES
from bytelatent.packaged import packaged_folder
from bytelatent.text.chat import CHAT_TEMPLATE, TOKENIZER_CONFIG, ChatTemplate
from bytelatent.text.tokenizer import TOKENIZER, content_digest
from bytelatent.weights.hugging_face import HuggingFaceFormat
from bytelatent.weights.llama import FAMILIES, LlamaFormat
from bytelatent.weights.meta import BYTE_LM_FOLDERS, MetaFormat
from bytelatent.weights.native import LOADING_LM, NATIVE, WeightsFormat, check_blocks, check_tensors
from bytelatent.weights.safetensors_io import read_json_object, shown
from bytelatent.weights.side_files import CARD, LEGAL_FILES, leads_out, legal_files, stated_licence, write_card
from bytelatent.weights.stored_model import Advance, Pretrained, StoredModel

META = MetaFormat()
LLAMA = LlamaFormat()  # the format `hf` of a token LM
FORMATS: dict[str, WeightsFormat] = {"native": NATIVE, "hf": HuggingFaceFormat(), "meta": META}


@renamed_arguments(entropy="entropy_model")
def open_pretrained(
    source: str | Path,
    entropy_model: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
    weights: bool = True,
    setting: str = "model",
) -> StoredModel:
    """Find a model and check that it is complete, without loading its weights.

    Args:
        source: a run; a folder in any of `FORMATS`; OWNER/NAME, a repository of the Hugging Face hub in one of them; or
            `tiny`, the model in the package.
        entropy_model: where the byte LM is, if it is neither in `source` nor next to it.
        revision: a branch, a tag or a commit of the repository.
        token: a user's key for the hub; default: HF_TOKEN, or the key of `hf auth login`.
        local_files_only: use earlier downloads, and do not connect to the hub.
        weights: False reads only the configuration and downloads nothing large.
        setting: the setting or argument that named `source`, for errors.

    Raises:
        UserError: there is no model, it is not complete, or it needs mathematics that is not implemented here.
    """
    access = _Access(token, local_files_only, weights)
    if entropy_model is None:
        return access.open_with_byte_lm(setting, source, revision)
    found, _ = access.open(setting, source, revision)
    if isinstance(found.config.model, LanguageModelSettings):
        name = NAMES[found.config.model.kind]
        raise UserError(f"entropy_model: '{source}' is a {name} itself and needs no other; leave it out")
    return replace(found, byte_lm=access.byte_lm("entropy_model", entropy_model)[0])


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


ByteLM.loader = load_byte_lm


def find_byte_lm(source: str | Path, weights: bool = True, setting: str = "model") -> tuple[StoredModel, int]:
    """A byte LM, or the byte LM of a BLT, without loading its weights, and its context in ids.

    Args:
        source: as in `open_pretrained`.
        weights: False reads only the configuration.
        setting: the setting or argument that named `source`, for errors.

    Raises:
        UserError: there is no byte LM.
    """
    return _Access(None, False, weights).byte_lm(setting, source)


@dataclass(frozen=True)
class _Access:
    """How models are opened; `setting` is the argument that named a model, for errors."""

    token: str | None
    local_files_only: bool
    weights: bool

    def open(self, setting: str, source: str | Path, revision: str | None = None) -> tuple[StoredModel, Path]:
        """The model itself, and its folder."""
        packaged = packaged_folder(source)
        path = packaged or _folder(setting, source)
        if not path.exists() and is_on_hub(str(source)):
            try:
                path = model_folder(str(source), revision, self.token, self.local_files_only, self.weights)
            except Unreachable as error:  # it may also be the mistyped name of a folder
                raise Unreachable(f"{setting}: '{source}' is not a folder here, and on the hub {error}") from None
            return replace(open_folder(path, self.weights, setting), source=str(source)), path
        if not path.is_dir():
            if packaged is not None:
                raise UserError(f"{setting}: '{source}' is in the package, and '{path}' is missing; reinstall it")
            raise UserError(
                f"{setting}: '{source}' is not a folder; name a run (blt demo makes runs/demo), a folder with a "
                "model, OWNER/NAME on the hub, or tiny, which is in the package"
            )
        if revision is not None:
            raise UserError(f"revision: '{source}' is a folder, which has no revisions; leave it out")
        found = open_folder(path, self.weights, setting)
        return (found if packaged is None else found.to_load_in(torch.float32, str(source))), path

    def open_with_byte_lm(self, setting: str, source: str | Path, revision: str | None = None) -> StoredModel:
        """The model, with its byte LM from Meta's separate folder or repository if it needs that."""
        found, path = self.open(setting, source, revision)
        patching = found.config.patching
        if found.byte_lm is not None or patching is None or not patching.needs_entropies or not META.recognizes(path):
            return found
        if _folder(setting, source).exists():
            folders = [path.absolute().parent / name for name in BYTE_LM_FOLDERS]
            inner = next((folder for folder in folders if META.recognizes(folder)), None)
        else:  # it is a repository; so is the byte LM, of the same owner
            name = f"{str(source).split('/')[0]}/{META.byte_lm_folder}"
            inner = name if model_exists(name, self.token, self.local_files_only) else None
        return found if inner is None else replace(found, byte_lm=self.byte_lm("entropy_model", inner)[0])

    def byte_lm(self, setting: str, source: str | Path) -> tuple[StoredModel, int]:
        """The byte LM at `source`, or that of the BLT there, and the context of either in ids."""
        found = self.open_with_byte_lm(setting, source)
        if isinstance(found.config.model, ByteLMSettings):
            return found, found.config.context
        if found.byte_lm is None:
            name = NAMES[found.config.model.kind]
            raise UserError(
                f"{setting}: '{source}' holds a {name} without a byte LM; name the byte LM's own run or folder"
            )
        return replace(found.byte_lm, folder=found.folder), found.config.context


def open_folder(folder: Path, weights: bool = True, setting: str = "model") -> StoredModel:
    """The model in a folder, in whatever format it is.

    Raises:
        UserError: there is no model, it is not complete, or it needs mathematics that is not implemented here.
    """
    format = next((format for format in (*FORMATS.values(), LLAMA) if format.recognizes(folder)), None)
    if format is None:
        config = folder / "config.json"
        kind = read_json_object(config).get("model_type") if config.is_file() else None
        if isinstance(kind, str):
            raise UserError(
                f"{setting}: '{folder}' holds a model of transformers' type '{shown(kind)}'; known here are blt, "
                f"{', '.join(FAMILIES)}"
            )
        raise UserError(
            f"{setting}: '{folder}' holds no model: neither settings.yaml, params.json nor a known config.json"
        )
    found = format.open(folder, weights)
    if isinstance(found.config.model, TokenLMSettings) and (folder / TOKENIZER).is_file():
        found = replace(found, tokenizer=folder / TOKENIZER)
        if weights:
            found.config.check_tokenizer(folder / TOKENIZER)
    if weights and (folder / MANIFEST).is_file() and (why := find_corruption(folder, ending=".safetensors")):
        raise UserError(f"'{folder}' is not as it was written: {why}; fetch or write it again")
    links = [file for pattern in LEGAL_FILES for file in sorted(folder.glob(pattern)) if leads_out(file)]
    lines = [f"'{shown(str(file))}' is a link out of its folder and is skipped" for file in links]
    chat_template = None
    if not any(leads_out(folder / name) for name in (CHAT_TEMPLATE, TOKENIZER_CONFIG)):
        try:
            chat_template = ChatTemplate.find(folder)
        except UserError as error:  # the model is usable without
            lines.append(f"{error}; it is left out")
    found = replace(found, folder=folder, warnings=[*found.warnings, *lines], chat_template=chat_template)
    if found.config.origin.licence is None:
        found = replace(found, config=found.config.with_origin(licence=stated_licence(folder)))
    return found


def is_on_hub(source: str) -> bool:
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


def write_model(
    stored: StoredModel,
    folder: Path,
    format: str,
    licence: str | None = None,
    advance: Advance = lambda num_bytes: None,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model and its card into a folder, which appears complete or not at all.

    Args:
        format: a key of `FORMATS`.
        licence: the licence on the card; None: the one that the model came with.
        advance: called with the number of bytes after each chunk of weights.
        check: called with the complete folder before it appears; an error discards the folder.

    Raises:
        UserError: the format cannot express one of the model's settings, the tensors do not fit the settings, or the
            folder holds something else than a saved model. The folder stays as it was.
    """
    folder = check_target(folder, format, licence)
    chosen, patching = FORMATS[format], stored.config.patching
    loading = chosen.loading if isinstance(stored.config.model, BLTSettings) else LOADING_LM
    if isinstance(stored.config.model, TokenLMSettings):
        if stored.tokenizer is None:
            raise UserError(f"model: '{stored.source}' has no {TOKENIZER}, which a token LM needs; put it there")
        stored.config.check_tokenizer(stored.tokenizer)
        digest = content_digest(stored.tokenizer)
        stored = replace(stored, config=stored.config.model_copy(update={"tokenizer": digest}))
        if format == "hf":
            chosen, loading = LLAMA, LLAMA.loading
    if isinstance(stored.config.model, BLTSettings) and patching is None:
        raise UserError(f"model: '{stored.source}' has no patching settings; its config.json should have them")
    if patching is not None and chosen.modes is not None and patching.mode not in chosen.modes:
        others = [name for name, other in FORMATS.items() if other.modes is None or patching.mode in other.modes]
        raise UserError(
            f"{format}: the format knows the patching modes {', '.join(chosen.modes)}, not '{patching.in_words()}'; "
            f"use {' or '.join(others)}"
        )
    model = stored.config.model
    for own in (model, stored.byte_lm.config.model if stored.byte_lm is not None else None):
        if chosen.column is not None and own is not None and not isinstance(own, TokenLMSettings):
            check_blocks(own, format, chosen.block_options)
    if licence is not None:
        stored = replace(stored, config=stored.config.with_origin(licence=" ".join(licence.split())))
    check_tensors(stored)
    remove_unfinished(folder)
    with whole_folder(folder) as aside:
        chosen.write(aside, stored, advance)
        if stored.chat_template is not None:
            (aside / CHAT_TEMPLATE).write_text(stored.chat_template.source, encoding="utf-8")
        for file in legal_files(stored.folder) if stored.folder is not None else ():
            shutil.copyfile(file, aside / file.name)
        loading = [line.replace("FOLDER", repr(folder.name)) for line in loading]
        write_card(aside, folder.name, stored, chosen.loaded_by, loading)
        check(aside)


def convert(
    stored: StoredModel,
    folder: Path,
    format: str,
    licence: str | None = None,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Write a model from disk in another format, in the memory of one chunk.

    Raises:
        UserError: as `write_model`; or the disk has too little space, or the folder is the one that is read.
    """
    folder = check_target(folder, format, licence)
    for part in (stored, stored.byte_lm):
        if part is not None and part.folder is not None and part.folder.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"'{folder}' would replace '{part.folder}', which is read; name another folder")
    if stored.config.origin.converted_from is None:
        is_here = stored.folder is not None and Path(stored.source).is_dir()
        name = stored.folder.absolute().name if stored.folder is not None and is_here else stored.source
        stored = replace(stored, config=stored.config.with_origin(converted_from=f"{name} ({stored.format})"))
    parent = next(place for place in folder.parents if place.exists())
    free = shutil.disk_usage(parent).free
    if stored.num_bytes > free:
        raise UserError(f"'{folder}' needs {decimal(stored.num_bytes)} and has room for {decimal(free)}; make room")
    write_model(stored, folder, format, licence, advance)


def check_target(folder: Path, format: str, licence: str | None = None) -> Path:
    """Check where and how a model will be written, before it is fetched or read.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: there is no such format, or the folder holds something else than a saved model.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise UserError(f"format: '{format}' is unknown; use {', '.join(FORMATS)}{nearest(str(format), list(FORMATS))}")
    if licence is not None and not licence.strip():
        raise UserError("licence: it is empty; name one, such as apache-2.0, or leave it out")
    try:
        folder = folder.expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"'{folder}' is a file; name a folder")
        # A run's checkpoint has a manifest, but no card.
        is_model = all((folder / name).is_file() for name in (MANIFEST, CARD))
        if folder.is_dir() and any(folder.iterdir()) and not is_model:
            raise UserError(f"'{folder}' holds something else than a saved model; name another folder")
    except RuntimeError:
        raise UserError(f"'{folder}': there is no such user; write the path without ~") from None
    except OSError as error:
        raise UserError(f"'{folder}' cannot be read: {error.strerror or error}") from None
    return folder
