"""The demo's steps, one after another."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from bytelatent.blt import BLT
from bytelatent.data import DataSettings, SourceSettings, batches_once
from bytelatent.demo.text import DemoText, collect
from bytelatent.demo.xz import xz_bits_per_byte
from bytelatent.errors import Interrupted, UserError
from bytelatent.evaluation import evaluate
from bytelatent.files import whole_file
from bytelatent.patching import Patch, PatchSettings
from bytelatent.report import Report, write_report
from bytelatent.text import MAX_ROW_BYTES, DamageLimit, read_documents
from bytelatent.text.damage import MAX_BAD_ROWS
from bytelatent.training import TrainSettings, read_metrics, train
from bytelatent.training.settings import (
    CalibrationSettings,
    CheckpointSettings,
    OptimizerSettings,
    ValidationSettings,
)

PATCH_BYTES = 4.5
CONTEXT = 1024
BATCH_BYTES = 2048
BYTE_LM_SHARE, BLT_SHARE = 0.25, 0.55  # of the minutes; the rest measures, generates and reports
VALID_BYTES = 200_000  # of held-out text that bits per byte are measured on
SHOWN_BYTES = 2_000  # of held-out text in the report
PROMPTS = ("def read(self, ", "The history of ", "import ")
SAMPLE_BYTES = 200


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
        minutes: about how long it may take on this machine.
        folder: what an earlier demo left there is replaced.
        own_text: a file or folder; None for Python's standard library.
        text_key: the key or column that holds the text.
        max_bad_rows: bad rows and files of it that are passed over; one more is an error.
        max_row_bytes: a longer row is a bad one.

    Returns:
        What `summary.json` holds.

    Raises:
        UserError: too little text, or a folder that is no demo's.
    """
    began = time.perf_counter()
    _must_be_a_demo(folder)
    bad = DamageLimit(max_bad_rows, say=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
    text = collect(own_text, folder / "text", text_key, bad, max_row_bytes)  # complains before anything is removed
    _clear(folder)
    _say(console, "text", f"{text.what}: {text.train_bytes:,} bytes to learn from, {text.valid_bytes:,} held out")
    held_out = _read(text.valid)[:VALID_BYTES]
    xz, how = xz_bits_per_byte(_read(text.train), held_out)
    _say(console, "xz", f"{xz:.3f} bits per byte ({how})")

    _say(console, "byte LM", f"{minutes * BYTE_LM_SHARE:.1f} minutes of training")
    settings = _settings("demo-byte-lm", folder / "byte_lm_training", text, seed, minutes=minutes * BYTE_LM_SHARE)
    _train(settings, console)

    _say(console, "BLT", f"{minutes * BLT_SHARE:.1f} minutes of training, patches of about {PATCH_BYTES} bytes")
    settings = _settings(
        "demo-blt",
        folder,
        text,
        seed,
        minutes=minutes * BLT_SHARE,
        patching=PatchSettings(mode="entropy", threshold=0.0),
        calibration=CalibrationSettings(patch_bytes=PATCH_BYTES, text_bytes=VALID_BYTES),
        byte_lm=str(folder / "byte_lm_training"),
    )
    _train(settings, console)

    model = BLT.from_pretrained(folder)
    bits = {"blt": _held_out_bits(model, text), "byte_lm": _held_out_bits(model.byte_lm, text), "xz": xz}
    _say(console, "measured", ", ".join(f"{name} {value:.3f}" for name, value in bits.items()) + " bits per byte")
    patches = model.patch(held_out[:VALID_BYTES])
    samples = [(prompt, model.generate(prompt, SAMPLE_BYTES, temperature=0.7, seed=seed)) for prompt in PROMPTS]
    mean = (
        f"The threshold was chosen for patches of {PATCH_BYTES} bytes on training text; "
        f"files never seen are less predictable, and patches there hold {len(held_out) / len(patches):.2f}."
    )
    summary = {
        "bits_per_byte": bits,
        "xz": how,
        "mean_patch_bytes": len(held_out) / len(patches),
        "threshold": model.patching.threshold,
        "seconds": round(time.perf_counter() - began, 1),
        "train_bytes": text.train_bytes,
        "valid_bytes": len(held_out),
        "text": text.what,
        "sample": "".join(samples[0]),
    }
    _write_json(folder / "summary.json", summary)
    report = Report(
        title=f"A byte LM and a BLT, trained on {text.what} in {summary['seconds'] / 60:.1f} minutes",
        summary=summary,
        curves={
            "byte LM": read_metrics(folder / "byte_lm_training" / "metrics.jsonl"),
            "BLT": read_metrics(folder / "metrics.jsonl"),
        },
        texts={"held-out text": _shown(patches)},
        patch_lengths=[patch.end - patch.start for patch in patches],
        threshold=model.patching.threshold,
        samples=samples,
        notes=[f"xz: {how}.", f"Bits per byte are measured on {len(held_out):,} bytes of held-out text.", mean],
    )
    write_report(folder / "report.html", report)
    return summary


def _train(settings: TrainSettings, console: Console) -> None:
    try:
        train(settings, console)
    except Interrupted:
        raise Interrupted("the demo is not done; the same command begins it anew") from None


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
            "validation": ValidationSettings(every=10_000, max_bytes=VALID_BYTES),
            "checkpoint": CheckpointSettings(every=10_000, keep=1),
            "log_every": 1,
            "compile": False,  # compiling takes longer than it saves in a few minutes
            **more,
        }
    )


def _held_out_bits(model: BLT | Any, text: DemoText) -> float:
    """Bits per byte of a BLT or a byte LM on the held-out bytes that xz packed."""
    network, patcher = (model.model, model.patcher) if isinstance(model, BLT) else (model, None)
    sources = [SourceSettings(path=str(text.valid))]
    return evaluate(network, batches_once(sources, CONTEXT, BATCH_BYTES, patcher, VALID_BYTES)).bits_per_byte


def _shown(patches: list[Patch]) -> list[Patch]:
    """The patches of the first bytes, as many as a page should show."""
    return [patch for patch in patches if patch.end <= SHOWN_BYTES]


def _must_be_a_demo(folder: Path) -> None:
    """A folder that is there holds an earlier demo, or nothing."""
    if folder.exists() and (
        not folder.is_dir() or (any(folder.iterdir()) and not (folder / "text" / "train.jsonl").is_file())
    ):
        raise UserError(f"demo: '{folder}' holds something else than an earlier demo; name another folder with --out")


def _clear(folder: Path) -> None:
    """Remove what an earlier demo left, all but the text, which is new."""
    for place in folder.iterdir():
        if place.is_dir() and place.name != "text":
            shutil.rmtree(place)
        elif place.is_file():
            place.unlink()


def _read(jsonl: Path) -> bytes:
    return b"".join(document.text for _, document in read_documents(str(jsonl)))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with whole_file(path) as aside:
        aside.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")


def _say(console: Console, what: str, line: str) -> None:
    console.print(f"[bold]{what:<9}[/]", end="")
    console.print(line, highlight=False, markup=False)
