"""The formats of weights, and models written in any of them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bytelatent.errors import UserError, nearest
from bytelatent.files import MANIFEST, whole_folder
from bytelatent.model import BLTSettings
from bytelatent.weights.hugging_face import HUGGING_FACE
from bytelatent.weights.meta import META
from bytelatent.weights.model_card import CARD, copy_legal_files, write_card
from bytelatent.weights.native import NATIVE
from bytelatent.weights.stored_model import Advance, StoredModel, WeightsFormat
from bytelatent.weights.translation import check_tensors

FORMATS: dict[str, WeightsFormat] = {"native": NATIVE, "hf": HUGGING_FACE, "meta": META}


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
    if isinstance(stored.config.model, BLTSettings) and patching is None:
        raise UserError(f"model: '{stored.source}' has no patching settings; its config.json should have them")
    if patching is not None and chosen.modes is not None and patching.mode not in chosen.modes:
        others = [name for name, other in FORMATS.items() if other.modes is None or patching.mode in other.modes]
        raise UserError(
            f"{format}: the format knows the patching modes {', '.join(chosen.modes)}, not '{patching.in_words()}'; "
            f"use {' or '.join(others)}"
        )
    if licence is not None:
        stored = replace(stored, config=stored.config.with_origin(licence=" ".join(licence.split())))
    check_tensors(stored)
    with whole_folder(folder) as aside:
        chosen.write(aside, stored, advance)
        if stored.folder is not None:
            copy_legal_files(stored.folder, aside)
        loading = [line.replace("FOLDER", repr(folder.name)) for line in chosen.loading]
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
        UserError: as `write_model`; or the disk has too little room, or the folder is the one that is read.
    """
    folder = check_target(folder, format, licence)
    for part in (stored, stored.byte_lm):
        if part is not None and part.folder is not None and part.folder.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"'{folder}' would replace '{part.folder}', which is read; name another folder")
    if stored.config.origin.converted_from is None:
        origin = f"{_name(stored)} ({stored.format})"
        stored = replace(stored, config=stored.config.with_origin(converted_from=origin))
    parent = folder.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if stored.num_bytes > free:
        raise UserError(
            f"'{folder}' needs {stored.num_bytes / 1e9:.1f} GB and has room for {free / 1e9:.1f} GB; make room"
        )
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
    except RuntimeError:
        raise UserError(f"'{folder}': there is no such user; write the path without ~") from None
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file; name a folder")
    if not _may_be_replaced(folder):
        raise UserError(f"'{folder}' holds something else than a saved model; name another folder")
    return folder


def _may_be_replaced(folder: Path) -> bool:
    """Whether the folder is absent, empty or written by `write_model`; a run's checkpoint is not."""
    try:
        return not folder.is_dir() or not any(folder.iterdir()) or all((folder / n).is_file() for n in (MANIFEST, CARD))
    except OSError as error:
        raise UserError(f"'{folder}' cannot be read: {error.strerror or error}") from None


def _name(stored: StoredModel) -> str:
    """The repository, or the name of the folder."""
    is_local = stored.folder is not None and Path(stored.source).is_dir()
    return stored.folder.absolute().name if is_local and stored.folder is not None else stored.source
