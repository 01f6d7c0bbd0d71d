"""The demo's steps, one after another, each within its share of the minutes."""

import shutil
from pathlib import Path
from typing import Any

from rich.table import Table

from bytelatent.blt import BLT
from bytelatent.commands.demo.measure import BATCH_BYTES, Clock, measure
from bytelatent.commands.demo.summary import about, closing_lines, text_options, write_summary
from bytelatent.commands.demo.text import DemoText, collect
from bytelatent.data import DataSettings, SourceSettings
from bytelatent.errors import Interrupted, UserError
from bytelatent.log import Console
from bytelatent.patching import PatchSettings
from bytelatent.run_folder import newest_whole
from bytelatent.text import MAX_ROW_BYTES, BadRows
from bytelatent.text.bad_rows import MAX_BAD_ROWS
from bytelatent.training import TrainSettings, train
from bytelatent.training.checkpoint.settings import CheckpointSettings
from bytelatent.training.settings import CalibrationSettings, OptimizerSettings, ValidationSettings

PATCH_BYTES = 4.5
CONTEXT = 1024
BYTE_LM_SHARE, BLT_SHARE = 0.25, 0.55  # of the minutes, for the steps of training at most
MEASURING_SHARE = 0.18  # kept for what comes after training
BESIDE_STEPS = 1.1  # calibration and validation, which the minutes of a training do not count; mostly less
VALID_BYTES = 200_000  # of held-out text that bits per byte are measured on
CALIBRATION_BYTES = 100_000  # of training text, and of held-out text, for the threshold
CURVE_BYTES = 50_000  # of held-out text that training ends with, for a point beside its curve


def run_demo(
    minutes: float,
    folder: Path,
    own_text: str | None,
    seed: int,
    console: Console,
    text_key: str = "text",
    max_bad_rows: int = MAX_BAD_ROWS,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> dict[str, Any]:
    """Train a byte LM and a BLT, measure, generate, report.

    Args:
        minutes: about how long it may take, however fast this machine is.
        folder: what an earlier demo left there is replaced.
        own_text: a file or folder; None for Python's standard library.
        text_key: the key or column that holds the text.
        max_bad_rows: bad rows and files of it that are passed over; one more is an error.
        max_row_bytes: a longer row is a bad one.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: too little text, or a folder that is no demo's; at the end, where nothing of a file could be read.
        Interrupted: it was asked to stop; the message says what can be used.
    """
    _must_be_a_demo(folder)
    bad = BadRows(max_bad_rows)
    try:
        clock = Clock(minutes)
        text = collect(own_text, folder / "text", text_key, bad, max_row_bytes)  # complains before anything is removed
        options = text_options(own_text, text_key, max_bad_rows, max_row_bytes)
        summary = _run(clock, text, folder, options, seed, console)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(_what_is_left(folder)) from None
    bad.must_have_read()
    return summary


def _run(clock: Clock, text: DemoText, folder: Path, options: list[str], seed: int, console: Console) -> dict[str, Any]:
    minutes = clock.minutes
    _clear(folder)
    _say(console, "text", f"{text.what}: {text.train_bytes:,} bytes to learn from, {text.valid_bytes:,} held out")

    of_steps = minutes * BYTE_LM_SHARE
    _say(console, "byte LM", f"{of_steps:.1f} minutes of training")
    train(_settings("demo-byte-lm", folder / "byte_lm_training", text, seed, minutes=of_steps), console)

    left = clock.left / 60 - MEASURING_SHARE * minutes
    of_steps = max(min(minutes * BLT_SHARE, left / BESIDE_STEPS), minutes * 0.05)
    _say(console, "BLT", f"{of_steps:.1f} minutes of training, patches of about {PATCH_BYTES} bytes")
    settings = _settings(
        "demo-blt",
        folder,
        text,
        seed,
        minutes=of_steps,
        patching=PatchSettings(mode="entropy", threshold=0.0),
        calibration=CalibrationSettings(patch_bytes=PATCH_BYTES, text_bytes=CALIBRATION_BYTES),
        entropy_model=str(folder / "byte_lm_training"),
    )
    train(settings, console)

    model = BLT.from_pretrained(folder)
    max_bytes = min(text.valid_bytes, VALID_BYTES)
    measured = measure(model, text.train, text.valid, max_bytes, seed, clock, console)
    facts = about(minutes, folder, options, seed, model.device)
    summary = write_summary(folder, text, measured, model.patching.threshold, PATCH_BYTES, clock.passed, facts)
    _show(summary, folder, options, console)
    return summary


def _show(summary: dict[str, Any], folder: Path, options: list[str], console: Console) -> None:
    table = Table("", "bits per byte", title="held-out text")
    for key, name in {"blt": "BLT", "byte_lm": "byte LM", "xz": "xz"}.items():
        table.add_row(name, f"{summary['bits_per_byte'][key]:.3f}")
    console.print(table)
    if summary["undertrained"]:
        console.print("[bold yellow]undertrained[/]: ", end="")
        console.print(summary["undertrained"], highlight=False, markup=False, soft_wrap=True)
    for label, line in closing_lines(folder, options):
        _say(console, label, line)


def _settings(model: str, run: Path, text: DemoText, seed: int, **more: Any) -> TrainSettings:
    return TrainSettings.model_validate(
        {
            "run": str(run),
            "seed": seed,
            "model": model,
            "data": DataSettings(
                train=[SourceSettings(path=str(text.train))],
                valid=[SourceSettings(path=str(text.valid))],
                context=CONTEXT,
                batch_bytes=BATCH_BYTES,
            ),
            "optimizer": OptimizerSettings(lr=4e-3, warmup_steps=40, weight_decay=0.05),
            "validation": ValidationSettings(every=10_000, max_bytes=CURVE_BYTES),
            "checkpoint": CheckpointSettings(every=10_000, keep=1),
            "log_every": 1,
            "compile": False,  # compiling takes longer than it saves in a few minutes
            **more,
        }
    )


def _must_be_a_demo(folder: Path) -> None:
    """A folder that is there holds an earlier demo, finished or stopped as early as can be, or nothing."""
    if not folder.exists():
        return
    text = folder / "text"
    names = {place.name for place in folder.iterdir()} if folder.is_dir() else {""}
    if names and not (text / "train.jsonl").is_file() and not (names == {"text"} and _is_only_begun(text)):
        raise UserError(f"demo: '{folder}' holds something else than an earlier demo; name another folder with --out")


def _is_only_begun(text: Path) -> bool:
    """Whether a demo was stopped, perhaps killed, while it wrote its first file."""
    return text.is_dir() and all(place.name.startswith(".train.jsonl.") for place in text.iterdir())


def _clear(folder: Path) -> None:
    """Remove what an earlier demo left, all but the text, which is new."""
    for place in folder.iterdir():
        if place.is_dir() and place.name != "text":
            shutil.rmtree(place)
        elif place.is_file():
            place.unlink()


def _what_is_left(folder: Path) -> str:
    """What a demo that was stopped has come to."""
    if newest_whole(folder / "checkpoints")[0] is None:
        return "the demo is not done; the same command begins again"
    use = dict(closing_lines(folder, []))["next"]
    return f"the demo is not done; the BLT as far as it is trained can be used: {use}; the same command begins again"


def _say(console: Console, what: str, line: str) -> None:
    console.print(f"[bold]{what:<9}[/]", end="")
    console.print(line, highlight=False, markup=False, soft_wrap=True)
