"""Models written in any of the formats."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bytelatent.errors import UserError, nearest
from bytelatent.files import MANIFEST, whole_folder
from bytelatent.interop.card import copy_legal_files, write_card
from bytelatent.interop.hugging_face import write_hugging_face
from bytelatent.interop.meta import write_meta
from bytelatent.interop.native import write_native
from bytelatent.interop.stored import StoredModel

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Format:
    write: Callable[[Path, StoredModel, Advance], None]
    library: str  # what the hub shows it for
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
) -> None:
    """Write a model and its card into a folder, which appears whole or not at all.

    Args:
        format: `native`; `hf` for transformers; `meta` for Meta's hub format.
        licence: to state on the card; None: the one that the model came with.
        advance: told how many more bytes of weights are written.

    Raises:
        UserError: the format has no room for one of the model's settings, or the folder holds something else than a
            saved model.
    """
    chosen = _format(format)
    folder = folder.expanduser().absolute()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise UserError(f"'{folder}' holds something else than a model; name another folder")
    if licence is not None:
        origin = stored.config.origin.model_copy(update={"licence": licence})
        stored = replace(stored, config=stored.config.model_copy(update={"origin": origin}))
    with whole_folder(folder) as aside:
        chosen.write(aside, stored, advance)
        if Path(stored.source).is_dir():
            copy_legal_files(Path(stored.source), aside)
        loading = [line.replace("FOLDER", repr(folder.name)) for line in chosen.loading]
        write_card(aside, folder.name, stored, chosen.library, loading)


def convert(
    stored: StoredModel,
    folder: Path,
    format: str,
    licence: str | None = None,
    advance: Advance = lambda num_bytes: None,
) -> None:
    """Write a model that lies elsewhere in another format, in the memory of one chunk.

    Raises:
        UserError: as `write_model`, or the disk has no room.
    """
    _format(format)
    origin = stored.config.origin
    if origin.converted_from is None:
        origin = origin.model_copy(update={"converted_from": f"{Path(stored.source).name} ({stored.format})"})
    stored = replace(stored, config=stored.config.model_copy(update={"origin": origin}))
    needed, parent = num_bytes(stored), folder.expanduser().absolute().parent
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


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"format: '{name}' is none of {', '.join(FORMATS)}{nearest(name, list(FORMATS))}")
    return FORMATS[name]
