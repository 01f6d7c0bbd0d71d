"""The demo: from text to bits per byte in minutes, without a download or a GPU.

Text, a byte LM, a BLT, measurements, a report: each step is within its share of the time.
"""

import json
import logging
import platform
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.table import Table

import bytelatent
from bytelatent.blt import BLT
from bytelatent.commands.demo_stages import BATCH_BYTES, Clock, DemoMeasurements, DemoText, collect, measure
from bytelatent.commands.options import DemoSettings
from bytelatent.device import device_name
from bytelatent.errors import Interrupted, UserError
from bytelatent.files import whole_file
from bytelatent.log import Console
from bytelatent.report import RunReport, compare_runs, write_report
from bytelatent.run_folder import NoCheckpoint, newest_checkpoint, read_metrics
from bytelatent.text import BadRows
from bytelatent.text.documents import forget_logged, must_have_read
from bytelatent.training import TrainSettings, train

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
SHOWN_BYTES = 2_000  # of held-out text in the report
MODELS = {"byte LM": "byte_lm", "BLT": "blt"}
OPTIMIZER = {"name": "muon", "lr": 8e-3, "warmup_steps": 40, "weight_decay": 0.05}
BEGINS_AGAIN = "the same command begins again"


def run(settings: DemoSettings) -> dict[str, Any]:
    """Train a byte LM and a BLT, measure, generate, write a report. An earlier demo in the folder is replaced.

    Returns:
        The contents of `summary.json`.

    Raises:
        UserError: there is too little text, or the folder is not a demo's; at the end, if a file could not be read.
        Interrupted: a signal stopped it; the message says what can be used.
    """
    forget_logged()
    _check_folder(settings.out)
    bad = BadRows(settings.max_bad_rows)
    try:
        clock = Clock(settings.minutes)
        text = collect(settings, bad)  # fails before anything is removed
        summary = _run(clock, text, settings)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(_advice_when_stopped(settings.out)) from None
    must_have_read(bad.unread)
    return summary


def _run(clock: Clock, text: DemoText, settings: DemoSettings) -> dict[str, Any]:
    folder, seed = settings.out, settings.seed
    _clear(folder)
    LOGGER.info(f"text: {text.name}: {text.train_bytes:,} bytes to learn from, {text.valid_bytes:,} held out")

    minutes = clock.minutes * BYTE_LM_SHARE
    LOGGER.info(f"byte LM: {minutes:.1f} minutes of training")
    train(_settings("demo-byte-lm", folder / "byte_lm_training", text, seed, minutes=minutes))

    left = clock.left / 60 - MEASURING_SHARE * clock.minutes
    minutes = max(min(clock.minutes * BLT_SHARE, left / CALIBRATION_FACTOR), clock.minutes * 0.05)
    LOGGER.info(f"BLT: {minutes:.1f} minutes of training, patches of about {PATCH_BYTES} bytes")
    patching: dict[str, Any] = {
        "patching": {"mode": "entropy", "threshold": 0.0},
        "calibration": {"patch_bytes": PATCH_BYTES, "text_bytes": CALIBRATION_BYTES},
        "entropy_model": str(folder / "byte_lm_training"),
    }
    optimizer = {"lr_scale": {"hash_tables": 2.0}}
    train(_settings("demo-blt", folder, text, seed, optimizer, minutes=minutes, **patching))

    model = BLT.from_pretrained(folder)
    measured = measure(model, text, min(text.valid_bytes, VALID_BYTES), seed, clock)
    summary = _write_summary(settings, text, model, measured, clock.passed)
    _show(summary, settings)
    return summary


def _settings(
    model: str, run: Path, text: DemoText, seed: int, optimizer: Mapping[str, Any] = MappingProxyType({}), **more: Any
) -> TrainSettings:
    sources = {"train": str(text.train), "valid": str(text.valid)}
    return TrainSettings.parse(
        {
            "run": str(run),
            "seed": seed,
            "model": model,
            "data": {**sources, "context": CONTEXT, "batch_bytes": BATCH_BYTES},
            "optimizer": {**OPTIMIZER, **optimizer},
            "validation": {"every": 10_000, "max_bytes": CURVE_BYTES},
            "checkpoint": {"every": 10_000, "keep": 1},
            "log_every": 1,
            "compile": False,  # compiling takes longer than it saves in a few minutes
            **more,
        }
    )


def _write_summary(
    settings: DemoSettings, text: DemoText, model: BLT, measured: DemoMeasurements, seconds: float
) -> dict[str, Any]:
    """Write `summary.json` and `report.html`, and return the summary.

    In it `train_bytes` is the size of the training text, and `bytes_read` are the bytes of it that each model read.
    """
    folder = settings.out
    runs = {run.summary.kind: run for run in compare_runs([folder]).runs}
    trained = {key: runs[name].summary for name, key in MODELS.items()}
    curves = {name: read_metrics(Path(runs[name].summary.folder) / "metrics.jsonl") for name in MODELS}
    mean_patch_bytes = measured.patches[-1].end / len(measured.patches)
    command = ["demo", "--minutes", f"{settings.minutes:g}", "--out", str(folder), "--seed", str(settings.seed)]
    versions = {"bytelatent": bytelatent.__version__, "torch": torch.__version__, "python": platform.python_version()}
    summary = {
        "bits_per_byte": measured.bits,
        "undertrained": _undertrained(measured.bits, {key: run.steps or 0 for key, run in trained.items()}),
        "mean_patch_bytes": mean_patch_bytes,
        "threshold": model.patching.threshold,  # in nats
        "seconds": round(seconds, 1),  # of the whole demo
        "training_seconds": round(sum(run.seconds or 0.0 for run in trained.values()), 1),
        "bytes_read": {key: run.num_bytes for key, run in trained.items()},
        "steps": {key: run.steps for key, run in trained.items()},
        "parameters": {key: run.num_parameters for key, run in trained.items()},
        "text": text.name,
        "train_bytes": text.train_bytes,
        "valid_bytes": measured.num_bytes,
        "xz": measured.xz,
        "command": shlex.join(["blt", *command, *text_options(settings)]),
        "seed": settings.seed,
        "device": device_name(model.device),
        "threads": next((row["threads"] for row in reversed(curves["BLT"]) if "threads" in row), None),
        "versions": versions,
        "sample": "".join(measured.samples[0]),
    }
    with whole_file(folder / "summary.json") as aside:
        aside.write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
    mean = (
        f"The threshold was chosen for patches of {PATCH_BYTES} bytes on training text; "
        f"unseen files are less predictable, and patches there hold {mean_patch_bytes:.2f}."
    )
    report = RunReport(
        title=f"A byte LM and a BLT, trained on {text.name} in {seconds / 60:.1f} minutes",
        summary=summary,
        curves=curves,
        texts={"held-out text": [patch for patch in measured.patches if patch.end <= SHOWN_BYTES]},
        patch_lengths=[patch.end - patch.start for patch in measured.patches],
        threshold=model.patching.threshold,
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


def _show(summary: dict[str, Any], settings: DemoSettings) -> None:
    """Print the results."""
    console = Console()
    table = Table("", "bits per byte", title="held-out text")
    for key, name in {"blt": "BLT", "byte_lm": "byte LM", "xz": "xz"}.items():
        table.add_row(name, f"{summary['bits_per_byte'][key]:.3f}")
    console.print(table)
    if summary["undertrained"]:
        console.print("[bold yellow]undertrained[/]: ", end="")
        console.print(summary["undertrained"], highlight=False, markup=False, soft_wrap=True)
    for label, line in closing_lines(settings.out, text_options(settings)):
        console.print(f"[bold]{label:<9}[/]", end="")
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def text_options(settings: DemoSettings) -> list[str]:
    """The command line options of a user's own text, without those at their defaults."""
    given = settings.model_dump(include={"text", "text_key", "max_bad_rows", "max_row_bytes"}, exclude_defaults=True)
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def closing_lines(folder: Path, options: list[str]) -> list[tuple[str, str]]:
    """The paths of the results, and the next commands, ready to be pasted into a shell.

    Args:
        options: of the demo's text.
    """
    out = shlex.quote(str(folder))
    blt = _this_command()
    return [
        ("report", shlex.quote(str(folder / "report.html"))),
        ("numbers", shlex.quote(str(folder / "summary.json"))),
        ("next", f"{blt} generate 'def read(self' -m {out}"),
        ("", f"{blt} patch 'any text' -m {out} --entropies"),
        ("", f"{blt} {shlex.join(['demo', '--minutes', '20', '--out', str(folder), *options])}"),
    ]


def _this_command() -> str:
    """`blt` as it must be typed here: with its path if the shell finds none or another one."""
    called = Path(sys.argv[0])
    if called.suffix == ".py" and called.parent.name == "bytelatent":  # python -m
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
        return f"the demo is not done; {BEGINS_AGAIN}"
    use = dict(closing_lines(folder, []))["next"]
    return f"the demo is not done; the BLT as far as it is trained can be used: {use}; {BEGINS_AGAIN}"
