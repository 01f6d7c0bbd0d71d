"""The model card: `README.md` with metadata for the hub at its head."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bytelatent.credentials import masked
from bytelatent.model import BLTSettings
from bytelatent.weights.safetensors_io import shown
from bytelatent.weights.stored_model import Origin, StoredModel, num_parameters

CARD = "README.md"
# Licences that the hub knows by these names; any other is given as `other` with its name.
KNOWN_LICENCES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "odc-by"),
}
LEGAL_FILES = ("LICENSE*", "LICENCE*", "USE_POLICY*", "NOTICE*")
PAPER = "https://arxiv.org/abs/2412.09871"


def stated_licence(folder: Path) -> str | None:
    """The licence on a model's card, or else its licence file; None if there is neither."""
    head = _head_of_card(folder / CARD)
    stated = head.get("license")
    if stated == "other":
        stated = head.get("license_name") or stated
    if isinstance(stated, str) and stated.strip():
        return shown(stated.strip())
    if isinstance(stated, list) and stated and all(isinstance(name, str) for name in stated):
        return shown(", ".join(stated))
    named = [file.name for pattern in LEGAL_FILES[:2] for file in legal_files(folder, pattern)]
    return f"see {named[0]}" if named else None


def _head_of_card(card: Path) -> dict[str, Any]:
    """The metadata of a card; none if it is corrupt, because a card is not a part of the model."""
    try:
        text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() and not leads_out(card) else ""
        head = yaml.safe_load(text[3:].split("\n---", 1)[0]) if text.startswith("---") else None
    except (yaml.YAMLError, ValueError, RecursionError, OSError):  # ValueError: dates such as 2024-99-99
        return {}
    return head if isinstance(head, dict) else {}


def legal_files(folder: Path, *patterns: str) -> list[Path]:
    """The licences, notices and policies of a model, or those that match `patterns`."""
    found = (file for pattern in patterns or LEGAL_FILES for file in sorted(folder.glob(pattern)))
    return [file for file in found if file.is_file() and not leads_out(file)]


def leads_out(file: Path) -> bool:
    """Whether a file of a model is a link out of its folder, perhaps to a private file of the user.

    A snapshot of the hub's cache also holds links, to files of the same repository in `blobs/`.
    """
    place, folder = Path(os.path.realpath(file)), Path(os.path.realpath(file.parent))
    blobs = folder.parent.parent / "blobs"
    return not (place.is_relative_to(folder) or (folder.parent.name == "snapshots" and place.is_relative_to(blobs)))


def copy_legal_files(source: Path, target: Path) -> None:
    """Copy the licences, notices and policies, which must accompany the weights."""
    for file in legal_files(source):
        shutil.copyfile(file, target / file.name)


def write_card(folder: Path, title: str, stored: StoredModel, library: str, loading: Sequence[str]) -> None:
    """Write the card of a model into an existing folder.

    Args:
        library: the Python package that loads it, for the hub.
        loading: lines of Python that load it.
    """
    head = {**_licence(stored.config.origin), "library_name": library, "pipeline_tag": "text-generation"}
    head |= {"tags": ["byte-level", "tokenizer-free", "blt"]}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {title}", ""]
    lines += [*_description(stored), ""]
    lines += ["```python", *loading, "```", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in _facts(stored)]
    (folder / CARD).write_text(masked("\n".join(lines)) + "\n", encoding="utf-8")


def _licence(origin: Origin) -> dict[str, str]:
    if origin.licence is None:
        return {}
    if origin.licence in KNOWN_LICENCES:
        return {"license": origin.licence}
    return {"license": "other", "license_name": origin.licence}


def _description(stored: StoredModel) -> list[str]:
    if isinstance(stored.config.model, BLTSettings):
        return [
            f"A Byte Latent Transformer ([Pagnoni et al. 2024]({PAPER})): a language model over bytes, without a",
            "tokenizer, whose large transformer runs once per patch.",
        ]
    return [
        f"A byte LM: the entropy model of a Byte Latent Transformer ([Pagnoni et al. 2024]({PAPER})), which says where",
        "patches begin.",
    ]


def _facts(stored: StoredModel) -> list[tuple[str, str]]:
    config, origin = stored.config, stored.config.origin
    model = config.model
    facts = [("parameters", f"{num_parameters(model):,}")]
    if isinstance(model, BLTSettings):
        encoder, middle, decoder = model.encoder, model.global_transformer, model.decoder
        facts += [
            ("local encoder", f"{encoder.num_layers} x {encoder.dim}"),
            ("global transformer", f"{middle.num_layers} x {middle.dim}"),
            ("local decoder", f"{decoder.num_layers} x {decoder.dim}"),
        ]
    else:
        facts += [("shape", f"{model.num_layers} x {model.dim}, window {model.window or 'none'}")]
    if config.patching is not None:
        facts.append(("patches", config.patching.in_words()))
    if config.calibration is not None:
        facts.append(("mean patch", f"{config.calibration.mean_patch_bytes:.2f} bytes on {config.calibration.data}"))
    if stored.byte_lm is not None:
        facts.append(("byte LM", f"{num_parameters(stored.byte_lm.config.model):,} parameters"))
    facts.append(("context", f"{config.context:,} bytes"))
    facts.append(("training text", _text(origin.training_text, origin.training_bytes)))
    bits = "not measured" if origin.bits_per_byte is None else f"{origin.bits_per_byte:.4f}"
    held_out = f" on {', '.join(origin.validation_text)}" if origin.bits_per_byte and origin.validation_text else ""
    facts.append(("bits per byte", bits + held_out))
    if origin.converted_from:
        facts.append(("converted from", origin.converted_from))
    facts.append(("licence", origin.licence or "not stated; state one before you publish the weights"))
    return facts


def _text(names: Sequence[str], num_bytes: int | None) -> str:
    if not names:
        return "not stated"
    return ", ".join(names) + (f"; {num_bytes:,} bytes read" if num_bytes else "")
