"""The folder of a run as training starts: its settings, its byte LM, its calibration, and the list of its text."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bytelatent.config import load_yaml
from bytelatent.data import Patcher
from bytelatent.errors import UserError
from bytelatent.files import whole_file, whole_folder
from bytelatent.inference import FastEntropies
from bytelatent.model import ByteLM
from bytelatent.run_folder import checkpoints_of
from bytelatent.text.documents import forget_logged, logged_lines, mark_logged
from bytelatent.training.calibration import calibrate_on, read_calibration, write_calibration
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.settings import TrainSettings
from bytelatent.training.text_files import TextFile, check_listing, list_text, write_listing
from bytelatent.weights import BYTE_LM, Config, fingerprint, load_byte_lm, save

LOGGER = logging.getLogger(__name__)

# What may differ when a run resumes: nothing that changes the steps already done.
MAY_CHANGE = {
    *("steps", "minutes", "validation", "checkpoint", "parallel", "faults"),
    *("log_every", "device", "compile", "cuda_graph", "determinism", "entropy_model"),
    *("track", "wandb", "profile", "statistics_every"),
}
DATA_MAY_CHANGE = {"workers", "max_bad_rows", "allow_changed"}
OPTIMIZER_MAY_CHANGE = {
    "accumulation",  # with the number of processes, so that a step stays as large
    *("schedule", "decay_share", "decay_steps", "decay_minutes"),  # the rate continues from where it is
}

CALIBRATION_SHARE = 0.1  # of the minutes: the most that calibration may take beside them


@dataclass
class Run:
    """A run's folder that is ready for training.

    Attributes:
        settings: with the threshold that calibration chose.
        changes: a line about each setting that differs from those the run had before, and about its text.
        text: the files of its text as they are now.
    """

    folder: Path
    settings: TrainSettings
    config: Config
    patcher: Patcher | None
    changes: list[str]
    text: list[TextFile]

    def write_settings(self, ranks: Ranks) -> None:
        """Write the settings and the list of text files; call it once a first gradient has been computed."""

        def write() -> None:
            with whole_file(self.folder / "settings.yaml") as aside:
                aside.write_text(self.settings.to_yaml(), encoding="utf-8")
            write_listing(self.folder, self.text)

        ranks.on_first(write)


def open_run(settings: TrainSettings, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> Run:
    """Make a run's folder, or open it as an earlier start left it; the first rank does so for all.

    Raises:
        UserError: the folder is another run's, or its text has changed.
    """
    forget_logged()
    folder = Path(settings.run)
    (settings, config, changes, text), lines = ranks.on_first(lambda: (_prepare(folder, settings), logged_lines()))
    mark_logged(lines)
    patcher = None
    if settings.patching is not None:
        byte_lm = load_byte_lm(folder / BYTE_LM) if settings.entropy_model is not None else None
        mark = fingerprint(byte_lm) if byte_lm is not None else None
        byte_lm = byte_lm.to(device) if byte_lm is not None else None
        patcher = Patcher(settings.patching, byte_lm, dtype, mark, FastEntropies.where_possible(byte_lm, device, dtype))
    return Run(folder, settings, config, patcher, changes, text)


def _prepare(folder: Path, settings: TrainSettings) -> tuple[TrainSettings, Config, list[str], list[TextFile]]:
    """What `Run` holds beside the patcher."""
    earlier = _earlier_settings(folder)
    changes = _changes(settings, earlier, folder) if earlier is not None else []
    text = list_text(settings.data)
    if earlier is not None:
        changes += check_listing(folder, text, settings.data.allow_changed)
    byte_lm = _own_byte_lm(folder, settings, resumes=earlier is not None)
    calibration = read_calibration(folder) if earlier is not None else None
    if settings.calibration is not None and settings.patching is not None:
        if calibration is None:
            LOGGER.info(f"calibrating for patches of {settings.calibration.patch_bytes:g} bytes")
            limit = None if settings.minutes is None else CALIBRATION_SHARE / 2 * 60 * settings.minutes
            calibration = calibrate_on(
                byte_lm,
                settings.data,
                settings.calibration,
                settings.patching,
                settings.device,
                settings.dtype,
                limit,
            )
            write_calibration(folder, calibration)
        patching = settings.patching.model_copy(update={"threshold": calibration.threshold})
        settings = settings.model_copy(update={"patching": patching})
    config = Config(
        model=settings.model, context=settings.data.context, patching=settings.patching, calibration=calibration
    )
    return settings, config, changes, text


def _own_byte_lm(folder: Path, settings: TrainSettings, resumes: bool) -> ByteLM | None:
    """The frozen byte LM: the run's own copy, made when the run begins."""
    if settings.entropy_model is None:
        return None
    copy = folder / BYTE_LM
    if resumes and copy.is_dir():
        return load_byte_lm(copy)
    byte_lm = load_byte_lm(settings.entropy_model, setting="entropy_model")
    with whole_folder(copy) as aside:
        save(aside, byte_lm, Config(model=byte_lm.settings, context=settings.data.context))
    return byte_lm


def _earlier_settings(folder: Path) -> TrainSettings | None:
    """The settings of a run that has a checkpoint; before its first, nothing binds it."""
    path = folder / "settings.yaml"
    if not path.is_file() or not checkpoints_of(folder):
        return None
    try:
        values = load_yaml(path)
        values = {TrainSettings.old_names.get(name, name): value for name, value in values.items()}
        return TrainSettings.parse(values, where=str(path))
    except UserError as error:
        raise UserError(
            f"{error}; these are the settings that the run had: put the file back, or remove it and give the same ones "
            "again, or use another run=FOLDER"
        ) from None


def _changes(settings: TrainSettings, earlier: TrainSettings, folder: Path) -> list[str]:
    """One line about each setting that differs from those the run had before.

    Raises:
        UserError: one of them may not.
    """
    now, then = settings.shown(), earlier.shown()  # credentials may be new ones
    if settings.calibration is not None:  # calibration decides the threshold
        for values in (now, then):
            (values.get("patching") or {}).pop("threshold", None)
    lines = []
    for key, before, after in _differences(then, now):
        group, _, name = key.partition(".")
        inner = {"data": DATA_MAY_CHANGE, "optimizer": OPTIMIZER_MAY_CHANGE}.get(group, set())
        is_given_or_taken = key == "entropy_model" and None in (before, after)  # not just another path of the byte LM
        if is_given_or_taken or (group not in MAY_CHANGE | {"run"} and name not in inner):
            raise UserError(
                f"'{folder}' was begun with other settings ({key}: {before}, now {after}); "
                "use them again, or another run=FOLDER"
            )
        if group != "run":
            lines.append(f"goes on with {key}: {after}, before {before}")
    return lines


def _differences(then: dict[str, Any], now: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The innermost keys whose values differ, and both values."""
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{within}{name}.")
        elif before != after:
            yield f"{within}{name}", before, after
