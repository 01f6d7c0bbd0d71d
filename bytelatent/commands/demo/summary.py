"""What the demo leaves to read: `summary.json`, `report.html`, and what to do next."""

import json
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import bytelatent
from bytelatent.commands.demo.measure import Measured
from bytelatent.commands.demo.text import DemoText
from bytelatent.files import whole_file
from bytelatent.report import RunReport, compare_runs, write_report
from bytelatent.run_folder import read_metrics
from bytelatent.text import MAX_ROW_BYTES
from bytelatent.text.bad_rows import MAX_BAD_ROWS

LEAST_STEPS = 100  # of training; a model that did fewer has hardly begun
MOST_BITS = 3.5  # per byte; about what counting pairs of letters comes to
MODELS = {"byte LM": "byte_lm", "BLT": "blt"}


def write_summary(
    folder: Path,
    text: DemoText,
    measured: Measured,
    threshold: float | None,
    wanted_patch_bytes: float,
    seconds: float,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write `summary.json` and `report.html` into the demo's folder.

    Args:
        threshold: of the patches, in nats.
        seconds: from start to finish.
        facts: what else is to be known of it.

    Returns:
        The summary. `train_bytes` is the text that there is to learn from, `bytes_read` what each model read of it.
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
        f"The threshold was chosen for patches of {wanted_patch_bytes} bytes on training text; "
        f"files never seen are less predictable, and patches there hold {mean_patch_bytes:.2f}."
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
    """A line about models that were trained too little to say anything; None if both were trained enough."""
    few = [
        f"the {name} takes {bits[key]:.2f} bits per byte after {steps[key]:,} training steps"
        for name, key in MODELS.items()
        if steps[key] < LEAST_STEPS or not bits[key] <= MOST_BITS
    ]
    if not few:
        return None
    enough = f"below {MOST_BITS} bits after {LEAST_STEPS} steps or more"
    return f"{' and '.join(few)} ({enough} is a start); train longer (--minutes), or while the machine has less to do"


def text_options(own_text: str | None, text_key: str, max_bad_rows: int, max_row_bytes: int) -> list[str]:
    """The options of the command line that name a user's own text, as far as they are not the defaults."""
    given = {
        "--text": own_text,
        "--text-key": text_key,
        "--max-bad-rows": max_bad_rows,
        "--max-row-bytes": max_row_bytes,
    }
    usual = {"--text": None, "--text-key": "text", "--max-bad-rows": MAX_BAD_ROWS, "--max-row-bytes": MAX_ROW_BYTES}
    return [part for name, value in given.items() if value != usual[name] for part in (name, str(value))]


def about(minutes: float, folder: Path, options: list[str], seed: int, device: torch.device) -> dict[str, Any]:
    """How the demo was run, and on what; `options` are those of its text."""
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


def closing_lines(folder: Path, options: list[str]) -> list[tuple[str, str]]:
    """Where the results are and what to do next, as commands that run when they are pasted.

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
    """`blt` as it has to be typed here: by its path where the shell does not find it, or finds another one."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name in ("bytelatent", "cli"):  # python -m
        return f"{shlex.quote(sys.executable)} -m bytelatent"
    found = shutil.which("blt")
    if called.name != "blt" or (found is not None and called.exists() and Path(found).samefile(called)):
        return "blt"
    return shlex.quote(str(called))
