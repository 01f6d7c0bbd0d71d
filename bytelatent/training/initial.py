"""Training that begins from a model that exists: `init=SOURCE`.

The model's settings, patching, threshold, entropy model and tokenizer are taken over as settings are read; its weights
as the run begins. From its first checkpoint on, a run does not need the source any more.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from bytelatent.config import laid_over, load_yaml
from bytelatent.errors import UserError
from bytelatent.files import json_if_any
from bytelatent.model import BLTSettings, TokenLMSettings, settings_class
from bytelatent.run_folder import checkpoints_of
from bytelatent.text.tokenizer import content_digest
from bytelatent.training.distributed.parallelize import copy_local_part
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.weights import Origin, StoredModel, fingerprint, load_byte_lm, open_pretrained
from bytelatent.weights.side_files import legal_files

GROUPS = ("model", "patching")  # settings that are taken over key by key
TAKEN_OVER = (*GROUPS, "entropy_model")


def taken_over(values: dict[str, Any], run: Path) -> dict[str, Any]:
    """Values of training settings, with those that they leave out taken over from the model that `init` names.

    Only the model's configuration is read; of a run that has a checkpoint only its own `settings.yaml`.

    Args:
        values: plain values, with a text as `init`.
        run: the folder of the run.

    Raises:
        UserError: there is no such model; or a value differs from its own.
    """
    source = values["init"]
    if _is_complete(values):
        return values
    has_begun = (run / "settings.yaml").is_file() and checkpoints_of(run)
    theirs = load_yaml(run / "settings.yaml") if has_begun else settings_of(_open(source, weights=False), source)
    found = {**values}
    for group in GROUPS:
        mine, their = values.get(group), theirs.get(group)
        if isinstance(mine, dict) and "preset" not in mine and isinstance(their, dict):
            if not has_begun:
                must_be_same(mine, their, group, source, is_calibrated=bool(values.get("calibration")))
            found[group] = laid_over(their, mine)
        elif mine is None and their is not None:
            found[group] = their
    if "entropy_model" not in values and theirs.get("entropy_model") is not None:
        found["entropy_model"] = theirs["entropy_model"]
    data, tokenizer = values.get("data"), (theirs.get("data") or {}).get("tokenizer")
    if isinstance(data, dict) and "tokenizer" not in data and tokenizer is not None:
        found["data"] = {**data, "tokenizer": tokenizer}
    return found


def _is_complete(values: dict[str, Any]) -> bool:
    """Whether nothing is left out, as in the `settings.yaml` of a run."""
    model = values.get("model")
    if not all(key in values for key in TAKEN_OVER) or not isinstance(model, dict):
        return False
    try:
        settings_class(model).model_validate(model)
    except ValidationError:
        return False
    return True


def settings_of(stored: StoredModel, source: str) -> dict[str, Any]:
    """What a model has of the settings of a training, as plain values."""
    config = stored.config
    found: dict[str, Any] = {"model": config.model.plain()}
    if isinstance(config.model, BLTSettings) and config.patching is not None:
        found["patching"] = config.patching.plain()
        if config.patching.needs_entropies and stored.byte_lm is not None:
            found["entropy_model"] = source
    if isinstance(config.model, TokenLMSettings) and stored.tokenizer is not None:
        found["data"] = {"tokenizer": str(stored.tokenizer)}
    return found


def must_be_same(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], within: str, source: str, is_calibrated: bool = False
) -> None:
    """Check that the values that are there are the model's own.

    Args:
        within: their group.
        is_calibrated: another threshold will be chosen.

    Raises:
        UserError: one differs; it names its key.
    """
    for name, value in mine.items():
        key = f"{within}.{name}"
        if name not in theirs or (is_calibrated and key == "patching.threshold"):
            continue
        if isinstance(value, Mapping) and isinstance(theirs[name], Mapping):
            must_be_same(value, theirs[name], key, source, is_calibrated)
        elif value != theirs[name]:
            other = (
                ", or choose a threshold on your text: calibration.patch_bytes=4.5"
                if key == "patching.threshold"
                else ""
            )
            raise UserError(
                f"{key}: it is {json.dumps(value)}, and that of init='{source}' is {json.dumps(theirs[name])}; leave "
                f"it out, which takes the model's own{other}"
            )


def open_initial(settings: Any) -> StoredModel:
    """The model that `init` names, which the settings of a training must fit; its weights stay on the disk.

    Raises:
        UserError: it does not exist, or a setting differs from the model's own.
    """
    stored = _open(settings.init)
    known = settings_of(stored, settings.init)
    for group in GROUPS:
        if (given := getattr(settings, group)) is not None and group in known:
            must_be_same(given.plain(), known[group], group, settings.init, settings.calibration is not None)
    leave_out = "leave it out, which takes the model's own"
    if stored.byte_lm is not None and settings.entropy_model not in (None, settings.init):
        mine = fingerprint(load_byte_lm(settings.entropy_model, setting="entropy_model"))
        if (theirs := fingerprint(stored.byte_lm.load().model)) != mine:
            raise UserError(
                f"entropy_model: '{settings.entropy_model}' (fingerprint {mine}) is not the entropy model of "
                f"init='{settings.init}' ({theirs}); {leave_out}"
            )
    tokenizer, own = settings.data.tokenizer, stored.tokenizer
    named = None if tokenizer is None else Path(tokenizer)
    if own is not None and named is not None and named.is_file() and content_digest(named) != content_digest(own):
        raise UserError(f"data.tokenizer: '{tokenizer}' is not the one of init='{settings.init}'; {leave_out}")
    return stored


def identity_of(stored: StoredModel) -> tuple[str, str]:
    """What tells one state of a source from another: the checkpoint of a run, or the commit of a repository."""
    return stored.source, "" if stored.folder is None else stored.folder.name


def load_initial(model: nn.Module, source: str, place: tuple[str, str], ranks: Ranks) -> None:
    """Copy the weights of the model that `init` names into one that may be spread over ranks. All ranks call it.

    Raises:
        UserError: a rank does not find the model that the first rank found.
    """

    def load() -> None:
        stored = _open(source)
        if identity_of(stored) != place:
            raise UserError(f"init: '{source}' changes as it is read; name a folder that stays, as blt export writes")
        for name, weight in model.named_parameters():
            copy_local_part(weight.detach(), stored.tensors[name].load())

    ranks.on_all(load)


def keep_side_files(stored: StoredModel, run: Path) -> None:
    """Copy the licences and notices that must accompany the weights into a run's folder."""
    for file in legal_files(stored.folder) if stored.folder is not None else ():
        shutil.copyfile(file, run / file.name)


def origin_of(stored: StoredModel, source: str) -> Origin:
    """For the card of a model that was trained from another."""
    return Origin(licence=stored.config.origin.licence, trained_from=source)


def earlier_origin(run: Path) -> Origin:
    """What `origin_of` gave as the run began."""
    newest = max(checkpoints_of(run).items())[1]
    values = (json_if_any(newest / "state" / "config.json") or json_if_any(newest / "config.json") or {}).get("origin")
    return Origin.parse(values) if values else Origin()


def _open(source: str, weights: bool = True) -> StoredModel:
    return open_pretrained(source, weights=weights, setting="init")
