"""The folder of a run as training starts: its settings, its byte LM or tokenizer, its calibration, and the
list of its text.

`text.json` in the run's folder holds the state of each file of text at the last start: text that changed since is not
trained on unnoticed.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bytelatent.config import load_yaml
from bytelatent.data import DataSettings, Patcher
from bytelatent.errors import UserError
from bytelatent.files import json_if_any, only_writer, whole_file, whole_folder
from bytelatent.inference import FastEntropies
from bytelatent.log import log_file
from bytelatent.model import ByteLM, LanguageModelSettings, ModelSettings
from bytelatent.run_folder import checkpoints_of
from bytelatent.text import FileState, find_files
from bytelatent.text.chat import CHAT_TEMPLATE, DEFAULT_TEMPLATE, ChatTemplate
from bytelatent.text.documents import forget_logged, logged_lines, mark_logged
from bytelatent.text.tokenizer import TOKENIZER, Tokenizer, content_digest
from bytelatent.training.calibration import calibrate_on, read_calibration, write_calibration
from bytelatent.training.checkpoint.manager import check_takes_checkpoints
from bytelatent.training.checks import check_text
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.initial import earlier_origin, identity_of, keep_side_files, open_initial, origin_of
from bytelatent.training.settings import TrainSettings
from bytelatent.vocab import BYTES, Vocabulary
from bytelatent.weights import BYTE_LM, Config, Origin, StoredModel, fingerprint, load_byte_lm, save

LOGGER = logging.getLogger(__name__)

# What may differ when a run resumes: nothing that changes the steps already done.
MAY_CHANGE = {
    *("steps", "minutes", "validation", "checkpoint", "parallel", "faults"),
    *("log_every", "device", "compile", "cuda_graph", "determinism", "entropy_model"),
    *("float8", "track", "wandb", "profile", "statistics_every"),
}
DATA_MAY_CHANGE = {
    "workers",
    "max_bad_rows",
    "allow_changed",
    "tokenizer",
    "chat_template",
}  # of files: their paths
OPTIMIZER_MAY_CHANGE = {
    "accumulation",  # with the number of processes, so that a step stays as large
    *("schedule", "decay_share", "decay_steps", "decay_minutes"),  # the rate continues from where it is
}

CALIBRATION_SHARE = 0.1  # of the minutes: the most that calibration may take beside them

LOG = "train.log"  # these are in the run's folder
LISTING = "text.json"
READ_WHOLE = 1 << 28  # bytes of text in all, up to which every byte counts
EDGE = 1 << 15  # bytes of the beginning and of the end of each file, where there is more
NAMED = 5  # files in a message

Listing = dict[tuple[str, str], FileState]  # by the setting that names a file, `train` or `valid`, and by its name


@dataclass
class Run:
    """A run that is ready for training.

    Attributes:
        settings: with the threshold that calibration chose.
        vocabulary: of the model's ids.
        changes: a line about each setting that differs from those the run had before, and about its text.
        text: the files of its text as they are now.
        initial: of a run that begins from a model, which state of it: see `identity_of`.
        chat_template: writes its conversations.
    """

    settings: TrainSettings
    config: Config
    patcher: Patcher | None
    vocabulary: Vocabulary
    changes: list[str]
    text: Listing
    initial: tuple[str, str] | None
    chat_template: ChatTemplate


def lock_folder(folder: Path, data: DataSettings, resources: ExitStack) -> None:
    """Keep other processes out of the run's folder until `resources` close, and check the text and the folder."""
    resources.enter_context(only_writer(folder))
    resources.enter_context(log_file(folder / LOG))
    check_text(data)
    check_takes_checkpoints(folder)


def open_run(folder: Path, settings: TrainSettings, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> Run:
    """Make a run's folder, or open it as an earlier start left it; the first rank does so for all.

    Raises:
        UserError: the folder is another run's, or its text has changed.
    """
    forget_logged()
    (settings, config, changes, text, initial), lines = ranks.on_first(
        lambda: (_prepare(folder, settings, device, dtype), logged_lines())
    )
    mark_logged(lines)
    patcher = None
    if settings.patching is not None:
        byte_lm = load_byte_lm(folder / BYTE_LM) if settings.entropy_model is not None else None
        mark = fingerprint(byte_lm) if byte_lm is not None else None
        byte_lm = byte_lm.to(device) if byte_lm is not None else None
        patcher = Patcher(settings.patching, byte_lm, dtype, mark, FastEntropies.where_possible(byte_lm, device, dtype))
    vocabulary = BYTES
    if settings.data.tokenizer is not None:
        vocabulary = Tokenizer.read(folder / TOKENIZER)
    chat_template = ChatTemplate.find(folder) or DEFAULT_TEMPLATE
    return Run(settings, config, patcher, vocabulary, changes, text, initial, chat_template)


def write_settings(folder: Path, run: Run) -> None:
    """Write the settings and the list of text files; call it once a first gradient has been computed."""
    with whole_file(folder / "settings.yaml") as aside:
        aside.write_text(run.settings.to_yaml(), encoding="utf-8")
    with whole_file(folder / LISTING) as aside:
        rows = [{"key": key, **file._asdict()} for (key, _), file in run.text.items()]
        aside.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _prepare(
    folder: Path, settings: TrainSettings, device: torch.device, dtype: torch.dtype
) -> tuple[TrainSettings, Config, list[str], Listing, tuple[str, str] | None]:
    """What `Run` holds beside the patcher."""
    earlier = _earlier_settings(folder)
    changes = _changes(settings, earlier, folder) if earlier is not None else []
    text = list_text(settings.data)
    if earlier is not None:
        changes += check_listing(folder, text, settings.data.allow_changed)
    initial, origin = None, Origin() if earlier is None else earlier_origin(folder)
    if earlier is None and settings.init is not None:
        initial = open_initial(settings)
        LOGGER.info(f"begins from {initial.in_a_line()}")
        keep_side_files(initial, folder)
        origin = origin_of(initial, settings.init)
    byte_lm = None
    if settings.entropy_model is not None:
        byte_lm = _own_byte_lm(folder, settings.entropy_model, settings.data.context, resumes=earlier is not None)
    digest = None
    if settings.data.tokenizer is not None:
        digest = _keep_tokenizer(folder, settings.data.tokenizer, settings.model, resumes=earlier is not None)
    chat_template = _keep_chat_template(folder, settings.data, initial, resumes=earlier is not None)
    calibration = read_calibration(folder) if earlier is not None else None
    if initial is not None and settings.calibration is None and initial.config.calibration is not None:
        calibration = initial.config.calibration
        write_calibration(folder, calibration)
    if settings.calibration is not None and settings.patching is not None:
        if calibration is None:
            LOGGER.info(f"calibrating for patches of {settings.calibration.patch_bytes:g} bytes")
            limit = None if settings.minutes is None else CALIBRATION_SHARE / 2 * 60 * settings.minutes
            how = settings.calibration, settings.patching, device, dtype, limit, chat_template or DEFAULT_TEMPLATE
            calibration = calibrate_on(byte_lm, settings.data, *how)
            write_calibration(folder, calibration)
        patching = settings.patching.model_copy(update={"threshold": calibration.threshold})
        settings = settings.model_copy(update={"patching": patching})
    config = Config(
        model=settings.model,
        context=settings.data.context,
        patching=settings.patching,
        calibration=calibration,
        tokenizer=digest,
        origin=origin,
    )
    return settings, config, changes, text, None if initial is None else identity_of(initial)


def _own_byte_lm(folder: Path, entropy_model: str, context: int, resumes: bool) -> ByteLM:
    """The frozen byte LM: the run's own copy, made when the run begins."""
    copy = folder / BYTE_LM
    if resumes and copy.is_dir():
        return load_byte_lm(copy)  # as stored: in float32, or as a run of an earlier version began
    byte_lm = load_byte_lm(entropy_model, dtype="float32", setting="entropy_model")
    with whole_folder(copy) as aside:
        save(aside, byte_lm, Config(model=byte_lm.settings, context=context))
    return byte_lm


def _keep_chat_template(
    folder: Path, data: DataSettings, initial: StoredModel | None, resumes: bool
) -> ChatTemplate | None:
    """Copy the chat template into the run's folder, from where its models have it; when it resumes it is the same.

    Args:
        initial: the model that the run begins from, whose template it takes unless another is given.

    Returns:
        The run's template; None where it neither has conversations nor was given one.
    """
    copy, path = folder / CHAT_TEMPLATE, data.chat_template
    kept = ChatTemplate.read(copy) if resumes and copy.is_file() else None
    given = kept
    if path is not None and (kept is None or Path(path).exists()):
        given = ChatTemplate.read(path, "data.chat_template")
    if kept is not None:
        if given != kept:
            raise UserError(
                f"data.chat_template: '{path}' is not the one that '{folder}' was begun with; name '{copy}'"
            )
        return kept
    found = given or (initial.chat_template if initial is not None else None)
    found = found or (DEFAULT_TEMPLATE if data.has_chats else None)
    if found is None:
        copy.unlink(missing_ok=True)  # of a start that came to nothing
        return None
    with whole_file(copy) as aside:
        aside.write_text(found.source, encoding="utf-8")
    return found


def _keep_tokenizer(folder: Path, path: str, model: ModelSettings, resumes: bool) -> str:
    """Copy the tokenizer into the run's folder when the run begins; when it resumes it must be the same, or gone.

    Returns:
        Its digest.
    """
    copy = folder / TOKENIZER
    used = copy if resumes and copy.is_file() else Path(path)
    tokenizer = Tokenizer.read(used, "data.tokenizer")
    digest = content_digest(used)
    if resumes:
        newest = max(checkpoints_of(folder).items())[1]
        if (json_if_any(newest / "state" / "config.json") or {}).get("tokenizer") not in (None, digest):
            why = f"is not the one that '{folder}' was begun with; put that one back"
            raise UserError(f"data.tokenizer: '{used}' {why}")
    if used == copy and not Path(path).is_file():
        return digest
    if used == copy:
        if content_digest(Path(path)) != digest:
            raise UserError(f"data.tokenizer: '{path}' is not the one that '{folder}' was begun with; name '{copy}'")
        return digest
    assert isinstance(model, LanguageModelSettings)
    if tokenizer.size > model.vocab_size:
        raise UserError(
            f"model.vocab_size: {model.vocab_size:,} is less than the {tokenizer.size:,} ids of '{path}'; set "
            f"model.vocab_size={tokenizer.size}"
        )
    with whole_file(copy) as aside:
        aside.write_text(tokenizer.text, encoding="utf-8")
    return digest


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
    """One line about each setting that differs from those the run had before; a `UserError` where one may not."""
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
            lines.append(f"resumes with {key}: {after}, before {before}")
    return lines


def _differences(then: dict[str, Any], now: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The innermost keys whose values differ, and both values."""
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{within}{name}.")
        elif before != after:
            yield f"{within}{name}", before, after


def list_text(data: DataSettings) -> Listing:
    """All files of a run's text; where it is large, only the beginning and end of each file is read.

    Raises:
        UserError: a source has none.
    """
    found = [
        (key, file)
        for key, sources in (("train", data.train), ("valid", data.valid))
        for source in sources
        for file in find_files(source.path)
    ]
    total = sum(os.path.getsize(file) for _, file in found if os.path.isfile(file))
    edge = None if total <= READ_WHOLE else EDGE
    states = [(key, FileState.of(file, edge)) for key, file in found]
    return {(key, state.name): state for key, state in states}


def check_listing(run: Path, now: Listing, allow_changed: bool) -> list[str]:
    """Compare the files with those of the run's last start.

    Returns:
        Lines about what differs.

    Raises:
        UserError: text has changed, and that is not allowed.
    """
    then = _read_listing(run)
    if then is None:
        return []
    same = {place for place, file in now.items() if place in then and file.is_as(then[place])}
    changed = [
        f"{file.quoted} was {then[place]}, now {file}"
        for place, file in now.items()
        if place in then and place not in same
    ]
    changed += [f"{file.quoted} is new ({file})" for place, file in now.items() if place not in then]
    changed += [f"{file.quoted} is gone (was {file})" for place, file in then.items() if place not in now]
    unsure = [
        f"{file.quoted} was of {then[place].changed}, now of {file.changed}"
        for place, file in now.items()
        if place in same and then[place].edge is not None and then[place].changed != file.changed
    ]
    lines = []
    if unsure:
        lines.append(f"data: same size, beginning and end, and so taken for the same text: {_some(unsure)}")
    if changed:
        line = f"data: the text of '{run}' has changed; these files are not those of the checkpoint: {_some(changed)}"
        if not allow_changed:
            raise UserError(
                f"{line}; put it back as it was, or train on what is there now: data.allow_changed=true, or use "
                "another run=FOLDER"
            )
        lines.append(f"{line}; training continues with what is there now (data.allow_changed)")
    return lines


def _read_listing(run: Path) -> Listing | None:
    path = run / LISTING
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return None if rows is None else {(row.pop("key"), row["name"]): FileState(**row) for row in rows}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"'{path}', the list of the run's text, is corrupt; remove it to train on the text that is there"
        ) from None


def _some(of: list[str]) -> str:
    more = f", and {len(of) - NAMED:,} more" if len(of) > NAMED else ""
    return ", ".join(of[:NAMED]) + more
