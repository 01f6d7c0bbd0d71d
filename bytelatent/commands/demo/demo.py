"""The demo, step by step: text, a byte LM, a BLT, measurements, a report; each step within its share of the time."""

import json
import logging
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import bytelatent
from bytelatent.blt import BLT
from bytelatent.commands.demo.measure import BATCH_BYTES, Clock, DemoMeasurements, measure
from bytelatent.commands.demo.text import DemoText, collect
from bytelatent.data import DataSettings, SourceSettings
from bytelatent.errors import Interrupted, UserError
from bytelatent.files import whole_file
from bytelatent.log import Console
from bytelatent.patching import PatchSettings
from bytelatent.report import RunReport, compare_runs, write_report
from bytelatent.run_folder import NoCheckpoint, newest_checkpoint, read_metrics
from bytelatent.text import MAX_ROW_BYTES, BadRows
from bytelatent.text.bad_rows import MAX_BAD_ROWS
from bytelatent.training import TrainSettings, train
from bytelatent.training.settings import CalibrationSettings, CheckpointSettings, OptimizerSettings, ValidationSettings

LOGGER = logging.getLogger(__name__)

PATCH_BYTES = 4.5
CONTEXT = 1024
BYTE_LM_SHARE, BLT_SHARE = 0.25, 0.55  # of the minutes, for training steps
MEASURING_SHARE = 0.18  # of the minutes, for everything after training
CALIBRATION_FACTOR = 1.1  # calibration and validation, which are not counted as training, take at most this much longer
VALID_BYTES = 200_000  # of held-out text for bits per byte
CALIBRATION_BYTES = 100_000  # of training text and of held-out text, for the threshold
CURVE_BYTES = 50_000  # of held-out text for the validation at the end of training
FEWEST_STEPS = 100  # with fewer training steps, a model counts as undertrained
MOST_BITS = 3.5  # per byte; about the value of a model of letter pairs
MODELS = {"byte LM": "byte_lm", "BLT": "blt"}


def run_demo(
    minutes: float,
    folder: Path,
    own_text: str | None,
    seed: int,
    text_key: str = "text",
    max_bad_rows: int = MAX_BAD_ROWS,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> dict[str, Any]:
    """Train a byte LM and a BLT, measure, generate, write a report.

    Args:
        minutes: approximate duration, however fast the machine is.
        folder: an earlier demo in it is replaced.
        own_text: a file or folder; None for Python's standard library.
        text_key: the key or column of the text.
        max_bad_rows: number of bad rows and files to skip; one more is an error.
        max_row_bytes: longer rows are bad rows.

    Returns:
        The contents of `summary.json`.

    Raises:
        UserError: there is too little text, or the folder is not a demo's; at the end, if a file could not be read.
        Interrupted: a signal stopped it; the message says what can be used.
    """
    _check_folder(folder)
    bad = BadRows(max_bad_rows)
    try:
        clock = Clock(minutes)
        text = collect(own_text, folder / "text", text_key, bad, max_row_bytes)  # fails before anything is removed
        options = text_options(own_text, text_key, max_bad_rows, max_row_bytes)
        summary = _run(clock, text, folder, options, seed)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(_advice_when_stopped(folder)) from None
    bad.must_have_read()
    return summary


def _run(clock: Clock, text: DemoText, folder: Path, options: list[str], seed: int) -> dict[str, Any]:
    _clear(folder)
    LOGGER.info(f"text: {text.what}: {text.train_bytes:,} bytes to learn from, {text.valid_bytes:,} held out")

    minutes = clock.minutes * BYTE_LM_SHARE
    LOGGER.info(f"byte LM: {minutes:.1f} minutes of training")
    train(_settings("demo-byte-lm", folder / "byte_lm_training", text, seed, minutes=minutes))

    left = clock.left / 60 - MEASURING_SHARE * clock.minutes
    minutes = max(min(clock.minutes * BLT_SHARE, left / CALIBRATION_FACTOR), clock.minutes * 0.05)
    LOGGER.info(f"BLT: {minutes:.1f} minutes of training, patches of about {PATCH_BYTES} bytes")
    settings = _settings(
        "demo-blt",
        folder,
        text,
        seed,
        minutes=minutes,
        patching=PatchSettings(mode="entropy", threshold=0.0),
        calibration=CalibrationSettings(patch_bytes=PATCH_BYTES, text_bytes=CALIBRATION_BYTES),
        entropy_model=str(folder / "byte_lm_training"),
    )
    train(settings)

    model = BLT.from_pretrained(folder)
    measured = measure(model, text.train, text.valid, min(text.valid_bytes, VALID_BYTES), seed, clock)
    facts = _facts(clock.minutes, folder, options, seed, model.device)
    summary = _write_summary(folder, text, measured, model.patching.threshold, clock.passed, facts)
    _show(summary, folder, options)
    return summary


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


def _write_summary(
    folder: Path,
    text: DemoText,
    measured: DemoMeasurements,
    threshold: float | None,
    seconds: float,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write `summary.json` and `report.html`.

    Args:
        threshold: in nats.
        seconds: duration of the whole demo.
        facts: further entries of the summary.

    Returns:
        The summary. `train_bytes` is the size of the training text, `bytes_read` what each model read of it.
    """
    runs = {run.summary.kind: run for run in compare_runs([folder]).runs}
    trained = {key: runs[name].summary for name, key in MODELS.items()}
    mean_patch_bytes = measured.patches[-1].end / len(measured.patches)
    summary = {
        "bits_per_byte": measured.bits,
        "undertrained": _undertrained(measured.bits, {key: run.steps or 0 for key, run in trained.items()}),
        "mean_patch_bytes": mean_patch_bytes,
        "threshold": threshold,
        "seconds": round(seconds, 1),
        "training_seconds": round(sum(run.seconds or 0.0 for run in trained.values()), 1),
        "bytes_read": {key: run.num_bytes for key, run in trained.items()},
        "steps": {key: run.steps for key, run in trained.items()},
        "parameters": {key: run.num_parameters for key, run in trained.items()},
        "text": text.what,
        "train_bytes": text.train_bytes,
        "valid_bytes": measured.num_bytes,
        "xz": measured.xz,
        **facts,
        "sample": "".join(measured.samples[0]),
    }
    with whole_file(folder / "summary.json") as aside:
        aside.write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    mean = (
        f"The threshold was chosen for patches of {PATCH_BYTES} bytes on training text; "
        f"unseen files are less predictable, and patches there hold {mean_patch_bytes:.2f}."
    )
    report = RunReport(
        title=f"A byte LM and a BLT, trained on {text.what} in {seconds / 60:.1f} minutes",
        summary=summary,
        curves={name: read_metrics(Path(runs[name].summary.folder) / "metrics.jsonl") for name in MODELS},
        texts={"held-out text": measured.shown},
        patch_lengths=[patch.end - patch.start for patch in measured.patches],
        threshold=threshold,
        samples=measured.samples,
        notes=[f"Bits per byte are measured on {measured.num_bytes:,} bytes of held-out text.", mean],
    )
    write_report(folder / "report.html", report)
    return summary


def _undertrained(bits: dict[str, float], steps: dict[str, int]) -> str | None:
    """A warning about models that were trained too little to be meaningful; None if there are none."""
    few = [
        f"the {name} takes {bits[key]:.2f} bits per byte after {steps[key]:,} training steps"
        for name, key in MODELS.items()
        if steps[key] < FEWEST_STEPS or not bits[key] <= MOST_BITS
    ]
    if not few:
        return None
    enough = f"below {MOST_BITS} bits after {FEWEST_STEPS} steps or more"
    return f"{' and '.join(few)} ({enough} is a start); train longer (--minutes), or while the machine has less to do"


def _facts(minutes: float, folder: Path, options: list[str], seed: int, device: torch.device) -> dict[str, Any]:
    """The command, the machine and the versions; `options` are those of the text."""
    command = ["blt", "demo", "--minutes", f"{minutes:g}", "--out", str(folder), "--seed", str(seed), *options]
    rows = read_metrics(folder / "metrics.jsonl")
    return {
        "command": shlex.join(command),
        "seed": seed,
        "device": _device_name(device),
        "threads": next((row["threads"] for row in reversed(rows) if "threads" in row), None),
        "versions": {
            "bytelatent": bytelatent.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    machine = platform.machine()
    if device.type == "cpu" and (info := Path("/proc/cpuinfo")).is_file():
        lines = info.read_text(errors="replace").splitlines()
        machine = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), machine)
    return f"{device.type}, {machine}"


def _show(summary: dict[str, Any], folder: Path, options: list[str]) -> None:
    """Print the results."""
    console = Console()
    table = Table("", "bits per byte", title="held-out text")
    for key, name in {"blt": "BLT", "byte_lm": "byte LM", "xz": "xz"}.items():
        table.add_row(name, f"{summary['bits_per_byte'][key]:.3f}")
    console.print(table)
    if summary["undertrained"]:
        console.print("[bold yellow]undertrained[/]: ", end="")
        console.print(summary["undertrained"], highlight=False, markup=False, soft_wrap=True)
    for label, line in closing_lines(folder, options):
        console.print(f"[bold]{label:<9}[/]", end="")
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def text_options(own_text: str | None, text_key: str, max_bad_rows: int, max_row_bytes: int) -> list[str]:
    """The command line options of a user's own text, without those at their defaults."""
    given = {
        "--text": (own_text, None),
        "--text-key": (text_key, "text"),
        "--max-bad-rows": (max_bad_rows, MAX_BAD_ROWS),
        "--max-row-bytes": (max_row_bytes, MAX_ROW_BYTES),
    }
    return [part for name, (value, default) in given.items() if value != default for part in (name, str(value))]


def closing_lines(folder: Path, options: list[str]) -> list[tuple[str, str]]:
    """The paths of the results, and the next commands, ready to be pasted into a shell.

    Args:
        options: of the demo's text.
    """
    out = shlex.quote(str(folder))
    blt = _this_command()
    return [
        ("look at", shlex.quote(str(folder / "report.html"))),
        ("numbers", shlex.quote(str(folder / "summary.json"))),
        ("next", f"{blt} generate 'def read(self' -m {out}"),
        ("", f"{blt} patch 'any text' -m {out} --entropies"),
        ("", f"{blt} {shlex.join(['demo', '--minutes', '20', '--out', str(folder), *options])}"),
    ]


def _this_command() -> str:
    """`blt` as it must be typed here: with its path if the shell finds none or another one."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name in ("bytelatent", "cli"):  # python -m
        return f"{shlex.quote(sys.executable)} -m bytelatent"
    found = shutil.which("blt")
    if called.name != "blt" or (found is not None and called.exists() and Path(found).samefile(called)):
        return "blt"
    return shlex.quote(str(called))


def _check_folder(folder: Path) -> None:
    """Refuse an existing folder unless it is empty or holds an earlier demo, complete or interrupted at any point."""
    if not folder.exists():
        return
    text = folder / "text"
    names = {place.name for place in folder.iterdir()} if folder.is_dir() else {""}
    if not names or (text / "train.jsonl").is_file():
        return
    # A demo may have been killed while it wrote its first file.
    if names != {"text"} or not text.is_dir() or any(not p.name.startswith(".train.jsonl.") for p in text.iterdir()):
        raise UserError(f"demo: '{folder}' holds something else than an earlier demo; name another folder with --out")


def _clear(folder: Path) -> None:
    """Remove an earlier demo, except for the text, which is new."""
    for place in folder.iterdir():
        if place.is_dir() and place.name != "text":
            shutil.rmtree(place)
        elif place.is_file():
            place.unlink()


def _advice_when_stopped(folder: Path) -> str:
    try:
        newest_checkpoint(folder)
    except NoCheckpoint:
        return "the demo is not done; the same command begins again"
    use = dict(closing_lines(folder, []))["next"]
    return f"the demo is not done; the BLT as far as it is trained can be used: {use}; the same command begins again"
