"""The files beside weights: the model card, licences, `bytelatent.json`, and the tokenizer.

A model that is written in another format and read again is the same to its last setting: `bytelatent.json` next to the
other format's files holds our `config.json`. The other format's own files remain the authority: if they have changed
since, `bytelatent.json` is ignored.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.model import BLTSettings
from bytelatent.text.tokenizer import SPECIAL_TOKENS, TOKENIZER, tokenizer_json
from bytelatent.weights.safetensors_io import read_json_object, shown, write_json_object
from bytelatent.weights.stored_model import Config, StoredModel, num_parameters

CARD = "README.md"
SIDECAR = "bytelatent.json"
# Licences that the hub knows by these names; any other is given as `other` with its name.
KNOWN_LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense",
    "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "odc-by",
}  # fmt: skip
LICENCES = ("LICENSE*", "LICENCE*")
LEGAL_FILES = (*LICENCES, "USE_POLICY*", "NOTICE*")
PAPER = "https://arxiv.org/abs/2412.09871"
DESCRIPTIONS = {
    "blt": f"A Byte Latent Transformer ([Pagnoni et al. 2024]({PAPER})): a language model over bytes, without a\n"
    "tokenizer, whose large transformer runs once per patch.",
    "byte_lm": f"A byte LM: the entropy model of a Byte Latent Transformer ([Pagnoni et al. 2024]({PAPER})), which "
    "says where\npatches begin.",
    "token_lm": "A token LM: a transformer on the ids of a byte-level BPE, trained as Byte Latent Transformers are.",
}


def stated_licence(folder: Path) -> str | None:
    """The licence on a model's card, or else its licence file; None if there is neither."""
    head = _head_of_card(folder / CARD)
    stated = head.get("license")
    if stated == "other":
        stated = head.get("license_name") or stated
    if isinstance(stated, list) and all(isinstance(name, str) for name in stated):
        stated = ", ".join(stated)
    if isinstance(stated, str) and stated.strip():
        return shown(stated.strip())
    named = legal_files(folder, LICENCES)
    return f"see {named[0].name}" if named else None


def _head_of_card(card: Path) -> dict[str, Any]:
    """The metadata of a card; empty if it is corrupt, because a card is not a part of the model."""
    try:
        text = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() and not leads_out(card) else ""
        head = yaml.safe_load(text[3:].split("\n---", 1)[0]) if text.startswith("---") else None
    except (yaml.YAMLError, ValueError, RecursionError, OSError):  # ValueError: dates such as 2024-99-99
        return {}
    return head if isinstance(head, dict) else {}


def legal_files(folder: Path, patterns: Sequence[str] = LEGAL_FILES) -> list[Path]:
    """The licences, notices and policies of a model, which must accompany the weights."""
    found = (file for pattern in patterns for file in sorted(folder.glob(pattern)))
    return [file for file in found if file.is_file() and not leads_out(file)]


def leads_out(file: Path) -> bool:
    """Whether a file of a model is a link out of its folder, perhaps to a private file of the user.

    A snapshot of the hub's cache also holds links, to files of the same repository in `blobs/`.
    """
    place, folder = Path(os.path.realpath(file)), Path(os.path.realpath(file.parent))
    blobs = folder.parent.parent / "blobs"
    return not (place.is_relative_to(folder) or (folder.parent.name == "snapshots" and place.is_relative_to(blobs)))


def write_card(folder: Path, title: str, stored: StoredModel, library: str, loading: Sequence[str]) -> None:
    """Write the card of a model into an existing folder: `README.md` with metadata for the hub at its head.

    Args:
        library: the Python package that loads it, for the hub.
        loading: lines of Python that load it.
    """
    licence, is_token_lm = stored.config.origin.licence, stored.config.model.kind == "token_lm"
    head: dict[str, Any] = {} if licence is None else {"license": licence}
    if licence is not None and licence not in KNOWN_LICENCES:
        head = {"license": "other", "license_name": licence}
    head |= {"library_name": library, "pipeline_tag": "text-generation"}
    head |= {"tags": ["bpe"] if is_token_lm else ["byte-level", "tokenizer-free", "blt"]}
    lines = ["---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", f"# {title}", ""]
    lines += [DESCRIPTIONS[stored.config.model.kind], ""]
    lines += ["```python", *loading, "```", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in _facts(stored).items()]
    (folder / CARD).write_text(masked("\n".join(lines)) + "\n", encoding="utf-8")


def _facts(stored: StoredModel) -> dict[str, str]:
    config, origin, model = stored.config, stored.config.origin, stored.config.model
    facts = {"parameters": f"{num_parameters(model):,}"}
    if isinstance(model, BLTSettings):
        for name in ("encoder", "global_transformer", "decoder"):
            stack = getattr(model, name)
            title = name.replace("_", " ") if name == "global_transformer" else f"local {name}"
            facts[title] = f"{stack.num_layers} x {stack.dim}"
    else:
        facts["shape"] = f"{model.num_layers} x {model.dim}, window {model.window or 'none'}"
    if config.patching is not None:
        facts["patches"] = config.patching.in_words()
    if config.calibration is not None:
        facts["mean patch"] = f"{config.calibration.mean_patch_bytes:.2f} bytes on {config.calibration.data}"
    if stored.byte_lm is not None:
        facts["byte LM"] = f"{num_parameters(stored.byte_lm.config.model):,} parameters"
    facts["context"] = f"{config.context:,} {'tokens' if model.kind == 'token_lm' else 'bytes'}"
    read = f"; {origin.training_bytes:,} bytes read" if origin.training_bytes else ""
    facts["training text"] = ", ".join(origin.training_text) + read if origin.training_text else "not stated"
    held_out = f" on {', '.join(origin.validation_text)}" if origin.bits_per_byte and origin.validation_text else ""
    facts["bits per byte"] = "not measured" if origin.bits_per_byte is None else f"{origin.bits_per_byte:.4f}{held_out}"
    if origin.trained_from:
        facts["trained from"] = origin.trained_from
    if origin.converted_from:
        facts["converted from"] = origin.converted_from
    return facts | {"licence": origin.licence or "not stated; state one before you publish the weights"}


def write_sidecar(folder: Path, config: Config, name: str = SIDECAR) -> None:
    write_json_object(folder / name, config.shown())


def read_sidecar(folder: Path, found: Config, again: Callable[[Config], Config], name: str = SIDECAR) -> Config:
    """Our own configuration from the sidecar, if it agrees with the other format's files; else `found`.

    Args:
        found: the configuration that the other format's files describe.
        again: what remains of a configuration after writing it in the other format and reading it again.
    """
    if not (folder / name).is_file():
        return found
    own = Config.parse(read_json_object(folder / name), where=str(folder / name))
    if own.model.kind != found.model.kind or (own.patching is None) != (found.patching is None):
        return found
    try:
        return own if again(own) == found else found
    except UserError:  # the format cannot hold it, so it was written for another model
        return found


def write_tokenizer(folder: Path, context: int, for_chat: bool = False) -> None:
    """Write a byte-level tokenizer without merges for transformers' `AutoTokenizer`: a text becomes BOS and its bytes.

    It has no padding token and so refuses to pad: the patcher and the global transformer of `BltForCausalLM` do not
    mask padding, and would silently read it as text.

    Args:
        for_chat: a chat template writes BOS and EOS by their names. These then hold a byte that our template drops from
            what people write, so that `<s>` in a message is three bytes.
    """
    values = tokenizer_json()
    if for_chat:
        for token in SPECIAL_TOKENS:
            values = values.replace(json.dumps(token), json.dumps(_unwritable(token)))
    (folder / TOKENIZER).write_text(values, encoding="utf-8")
    names = [_unwritable(token) if for_chat else token for token in ("<s>", "</s>")]
    write_tokenizer_config(folder, context, *names, for_chat=for_chat)


def _unwritable(token: str) -> str:
    return f"{token[:-1]}\x04>"


def write_tokenizer_config(folder: Path, context: int, bos: str, eos: str, for_chat: bool = False) -> None:
    """Write what `AutoTokenizer` reads beside `tokenizer.json`; `bos` and `eos` are tokens.

    Args:
        for_chat: these names in a text mean the tokens, as a chat template writes them.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": bos,
        "eos_token": eos,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not for_chat,  # the text <s> means these three bytes
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
