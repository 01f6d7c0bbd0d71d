"""`blt speedrun`: train an entry for ten minutes on a fixed text, measure it, and check results of others."""

import gc
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bytelatent import __version__
from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.eval_text import evaluate_models
from bytelatent.commands.export import export_checkpoint
from bytelatent.commands.options import TokenizerSettings
from bytelatent.commands.study_options import SpeedrunSettings
from bytelatent.commands.tokenizer import train_on_text
from bytelatent.config import to_yaml
from bytelatent.device import choose_device, choose_dtype, device_name
from bytelatent.errors import Interrupted, UserError
from bytelatent.files import json_if_any, whole_file, write_whole_json
from bytelatent.run_folder import read_metrics
from bytelatent.study.cost import run_cost
from bytelatent.study.results import GroupBits, HeldOut
from bytelatent.study.speedrun import (
    HELD_OUT,
    TOLERANCE,
    Entry,
    SpeedrunResult,
    as_table,
    check_speedrun_text,
    digest_of_model,
    read_result,
    table_of_results,
)
from bytelatent.terminal import print_json, print_line
from bytelatent.training import TrainSettings, train
from bytelatent.training.calibration import calibrate_on
from bytelatent.training.checks import check_machine, check_settings
from bytelatent.weights import load_byte_lm

LOGGER = logging.getLogger(__name__)
ENTRY, TRAINED, WEIGHTS = "entry.yaml", "trained.json", "weights"  # in the folder of an entry


def run(settings: SpeedrunSettings) -> None:
    if settings.table or settings.check:
        place = "--table" if settings.table else "--check"
        for name in ("minutes", "as_json", *(["check", "entry"] if settings.table else [])):
            if getattr(settings, name):
                raise UserError(f"{name.removeprefix('as_')}: it has no effect with {place}; leave it out")
    if settings.table is not None:
        print_line(table_of_results(settings.table))
        return
    if settings.entry is None:
        raise UserError("speedrun: name an entry: blt speedrun apps/bytelatent/speedrun/tokens.yaml --text text")
    if settings.check is not None:
        print_line(check_result(settings.check, Path(settings.entry), settings.text))
        return
    try:
        result, path = run_entry(settings)
    except (Interrupted, KeyboardInterrupt):
        line = "training does not resume, and the same command begins it again, unless only measurements are left"
        raise Interrupted(line) from None
    if settings.as_json:
        print_json(result.plain())
    else:
        print_line(as_table([result]))
        print_line(f"-> {path}{'; ' if result.trial() else ''}{result.trial()}")


def run_entry(settings: SpeedrunSettings) -> tuple[SpeedrunResult, Path]:
    """Train an entry, measure its model twice, and write its result.

    Raises:
        UserError: the entry, the text or the folder is bad, or the two measurements differ.
    """
    if (world_size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"speedrun: {world_size} processes were started, and an entry has one GPU; start one, by blt")
    entry = Entry.read(Path(settings.entry or ""), settings.text, settings.out, settings.minutes)
    out, path = settings.out / entry.name, settings.out / f"{entry.name}.json"
    if path.exists():
        raise UserError(f"out: '{path}' is there already; move it away, or name another folder: --out")
    if out.exists() and not (out / ENTRY).is_file():
        raise UserError(f"out: '{out}' holds something else than an entry; name another folder: --out")
    device = choose_device(entry.model.device)
    check_settings(entry.model, 1, device)
    check_machine(entry.model, device, choose_dtype(entry.model.dtype, device))
    text = check_speedrun_text(settings.text)
    LOGGER.info(f"{entry.name}: {entry.model.minutes:g} minutes on {device_name(device)}; the text is the speedrun's")
    begun = {"entry": entry.values, "minutes": entry.model.minutes}
    trained = json_if_any(out / TRAINED)
    if trained is None or trained | begun != trained:
        shutil.rmtree(out, ignore_errors=True)
        with whole_file(out / ENTRY) as aside:
            aside.write_text(to_yaml(entry.values), encoding="utf-8")
        trained = begun | _train(entry, settings.text / "train.jsonl", device)
        write_whole_json(out / TRAINED, trained)
    shutil.rmtree(out / WEIGHTS, ignore_errors=True)
    weights = export_checkpoint(str(out / "model"), None, str(out / WEIGHTS))
    LOGGER.info(f"measuring '{weights}' on {HELD_OUT}, and once more in another process")
    result = SpeedrunResult(
        name=entry.name,
        **trained,
        held_out=_measured(weights, settings.text, device),
        again=_measured_again(weights, settings.text, device),
        device=device_name(device),
        versions={"bytelatent": __version__, "torch": torch.__version__, "python": platform.python_version()},
        date=datetime.now(UTC).date().isoformat(),
        text=text,
        weights=digest_of_model(weights),
    ).signed()
    if (problem := result.problem()) is not None:
        raise UserError(f"speedrun: {entry.name}: {problem}")
    with whole_file(path) as aside:
        aside.write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return result, path


def _train(entry: Entry, text: Path, device: torch.device) -> dict[str, Any]:
    """Train what an entry names, one after another, in its minutes.

    Returns:
        Fields of the result.
    """
    settings, byte_lm, clock, before = entry.model, entry.entropy_model, SpeedrunClock(), 0.0
    minutes, dtype = settings.minutes or 0.0, choose_dtype(settings.dtype, device)
    if entry.tokenizer is not None:
        with clock.counts("tokenizer"):
            given = entry.tokenizer.plain() | {"text": [str(text)], "out": settings.data.tokenizer}
            train_on_text(TokenizerSettings.parse(given))
    if byte_lm is not None:
        last = clock.train("entropy model", byte_lm)
        before = run_cost(byte_lm.model, 1.0, byte_lm.data.context).flops_per_byte * last["bytes_seen"]
    if settings.calibration is not None and settings.patching is not None:
        with clock.counts("threshold"):
            data = settings.data.model_copy(update={"valid": []})
            frozen = load_byte_lm(settings.entropy_model or "", dtype="float32")
            found = calibrate_on(frozen, data, settings.calibration, settings.patching, device, dtype)
        patching = settings.patching.model_copy(update={"threshold": found.threshold})
        settings = settings.model_copy(update={"patching": patching, "calibration": None})
    left = 60 * minutes - sum(clock.seconds.values())
    if left <= 0:
        raise UserError(f"speedrun: {entry.name}: nothing of {minutes:g} minutes is left for the model; {clock}")
    last = clock.train("model", settings.model_copy(update={"minutes": left / 60}))
    patch_bytes = last["bytes_seen"] / last["patches_seen"] if last.get("patches_seen") else 1.0
    context = settings.data.context * (patch_bytes if settings.model.kind == "token_lm" else 1.0)
    cost = run_cost(settings.model, patch_bytes, context, byte_lm and byte_lm.model)
    return {
        "kind": settings.model.kind,
        "parameters": sum(cost.parameters.values()),
        "table_parameters": cost.table_parameters,
        "steps": last["step"],
        "bytes_read": last["bytes_seen"],
        "mean_patch_bytes": patch_bytes,
        "seconds": clock.seconds,
        "threshold": None if settings.patching is None else settings.patching.threshold,
        "training_flops": cost.flops_per_byte * last["bytes_seen"],
        "entropy_model_training_flops": before,
    }


class SpeedrunClock:
    """What counts of the minutes: seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f} s" for part, seconds in self.seconds.items())

    @contextmanager
    def counts(self, part: str) -> Iterator[None]:
        """Count all the time that the block takes."""
        began = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - began
        LOGGER.info(f"the clock: {self}")

    def train(self, part: str, settings: TrainSettings) -> dict[str, Any]:
        """Train, and count the steps; the first one, which also compiles, as long as the mean one.

        Returns:
            The last row of metrics.
        """
        LOGGER.info(f"{part}: {settings.minutes:.3g} minutes of training")
        rows = read_metrics(train(settings) / "metrics.jsonl")
        last = next(row for row in reversed(rows) if "seconds" in row)
        self.seconds[part] = last["seconds"] * last["step"] / (last["step"] - 1)
        LOGGER.info(f"the clock: {self}")
        gc.collect()  # the next part has the device to itself
        if torch.cuda.is_available():
            torch.compiler.reset()
            torch.cuda.empty_cache()
        return last


def _measured(weights: Path, text: Path, device: torch.device) -> HeldOut:
    """Exact bits per byte of the held-out text."""
    settings = EvaluateSettings(text=[str(text / HELD_OUT)], model=[str(weights)], by="category", device=str(device))
    found = evaluate_models(settings)
    by_category = {group: _bits(numbers) for group, numbers in found["groups"].items()}
    return HeldOut(**_bits(found).plain(), by_category=by_category)


def _bits(numbers: dict[str, Any]) -> GroupBits:
    return GroupBits(bits_per_byte=numbers["bits_per_byte"], bytes=numbers["num_bytes"])


def _measured_again(weights: Path, text: Path, device: torch.device) -> float:
    """The same by `blt eval` in a new process."""
    command = [sys.executable, "-m", "bytelatent", "eval", str(text / HELD_OUT), "--model", str(weights)]
    done = subprocess.run([*command, "--device", str(device), "--json", "--quiet"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"speedrun: the model in '{weights}' cannot be measured again: {done.stderr.strip()}")
    return json.loads(done.stdout)["bits_per_byte"]


def check_result(path: Path, model: Path, text: Path) -> str:
    """Measure the model of a result.

    Returns:
        A line that confirms it.

    Raises:
        UserError: the result, the model or the text is another one.
    """
    result = read_result(path)
    if (problem := result.problem()) is not None:
        raise UserError(f"check: '{path}': {problem}")
    if digest_of_model(model) != result.weights:
        raise UserError(f"check: '{model}' is not the model of '{path}': the digest of its files is another")
    check_speedrun_text(text)
    bits, stated = _measured(model, text, choose_device()).bits_per_byte, result.held_out.bits_per_byte
    if abs(bits - stated) > TOLERANCE:
        raise UserError(f"check: '{model}' has {bits:.5f} bits per byte here, and '{path}' states {stated:.5f}")
    remark = f"; {result.trial()}" if result.trial() else ""
    return f"'{path}' is confirmed: {stated:.4f} bits per byte, measured again {bits:.4f}{remark}"
