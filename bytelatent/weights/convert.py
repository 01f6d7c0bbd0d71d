"""Models written in any of the formats."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bytelatent.errors import UserError, nearest
from bytelatent.files import MANIFEST, whole_folder
from bytelatent.model import BLTSettings
from bytelatent.weights.hugging_face import write_hugging_face
from bytelatent.weights.meta import write_meta
from bytelatent.weights.model_card import CARD, copy_legal_files, write_card
from bytelatent.weights.native import write_native
from bytelatent.weights.stored_model import StoredModel, check_tensors

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Format:
    write: Callable[[Path, StoredModel, Advance], None]
    loads_with: str  # what the hub shows it for
    loading: tuple[str, ...]  # Python that loads it


OURS = ("from bytelatent import BLT", "", "model = BLT.from_pretrained(FOLDER)", 'model.generate("The history of")')
FORMATS = {
    "native": Format(write_native, "bytelatent", OURS),
    "hf": Format(
        write_hugging_face,
        "transformers",
        (
            "from transformers import AutoTokenizer, BltForCausalLM",
            "",
            "model = BltForCausalLM.from_pretrained(FOLDER)",
            "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
            "# Batch texts of one length only: transformers reads padding as text. Version 4 has no attention windows.",
            "",
            "# or, many times faster:",
            *OURS,
        ),
    ),
    "meta": Format(write_meta, "bytelatent", OURS),
}


def write_model(
    stored: StoredModel,
    folder: Path,
    format: str,
    licence: str | None = None,
    advance: Advance = lambda num_bytes: None,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a model and its card into a folder, which appears whole or not at all.

    Args:
        format: `native`; `hf` for transformers; `meta` for Meta's hub format.
        licence: to state on the card; None: the one that the model came with.
        advance: told how many more bytes of weights are written.
        check: looks at all that was written before it appears; what it raises keeps it from that.

    Raises:
        UserError: the format has no room for one of the model's settings, its tensors are not those of its settings, or
            the folder holds something else than a saved model. The folder stays as it was.
    """
    folder = check_target(folder, format, licence)
    chosen = FORMATS[format]
    if isinstance(stored.config.model, BLTSettings) and stored.config.patching is None:
        raise UserError(f"model: '{stored.source}' names no patching rule; its config.json should have one")
    if licence is not None:
        licence = " ".join(licence.split())
        origin = stored.config.origin.model_copy(update={"licence": licence})
        stored = replace(stored, config=stored.config.model_copy(update={"origin": origin}))
    check_tensors(stored)
    with whole_folder(folder) as aside:
        chosen.write(aside, stored, advance)
        if stored.folder is not None:
            copy_legal_files(stored.folder, aside)
        loading = [line.replace("FOLDER", repr(folder.name)) for line in chosen.loading]
        write_card(aside, folder.name, stored, chosen.loads_with, loading)
        check(aside)


def convert(
    stored: StoredModel,
    folder: Path,
    format: str,
    licence: str | None = None,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Write a model that lies elsewhere in another format, in the memory of one chunk.

    Raises:
        UserError: as `write_model`, or the disk has no room, or the model would be replaced while it is read.
    """
    folder = check_target(folder, format, licence)
    for part in (stored, stored.byte_lm):
        if part is not None and part.folder is not None and part.folder.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"'{folder}' would replace '{part.folder}', which is read; name another folder")
    origin = stored.config.origin
    if origin.converted_from is None:
        origin = origin.model_copy(update={"converted_from": f"{_name(stored)} ({stored.format})"})
    stored = replace(stored, config=stored.config.model_copy(update={"origin": origin}))
    needed, parent = num_bytes(stored), folder.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(f"'{folder}' needs {needed / 1e9:.1f} GB and has room for {free / 1e9:.1f} GB; make room")
    write_model(stored, folder, format, licence, advance)


def num_bytes(stored: StoredModel) -> int:
    """What the weights take, those of the byte LM included."""
    inner = num_bytes(stored.byte_lm) if stored.byte_lm is not None else 0
    return inner + sum(tensor.num_bytes for tensor in stored.tensors.values())


def check_target(folder: Path, format: str, licence: str | None = None) -> Path:
    """Complain early, before a model is fetched or read, about where and how it is to be written.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: there is no such format, or the folder holds something else than a saved model.
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise UserError(f"format: '{format}' is none of {', '.join(FORMATS)}{nearest(str(format), list(FORMATS))}")
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
    """Whether there is nothing, or a model as `write_model` leaves it; a run's checkpoint is none."""
    try:
        return not folder.is_dir() or not any(folder.iterdir()) or all((folder / n).is_file() for n in (MANIFEST, CARD))
    except OSError as error:
        raise UserError(f"'{folder}' cannot be read: {error.strerror or error}") from None


def _name(stored: StoredModel) -> str:
    """The repository, or the name of the folder."""
    is_local = stored.folder is not None and Path(stored.source).is_dir()
    return stored.folder.absolute().name if is_local and stored.folder is not None else stored.source
