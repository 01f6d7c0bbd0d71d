#!/usr/bin/env python3
"""Make the model in the package, bytelatent/tiny: its text, a byte LM, a BLT, and a card with what was measured.

    train_tiny.py WORK_DIR [--minutes 7] [--device auto] [--out bytelatent/tiny] [--cache DIR]
    train_tiny.py WORK_DIR --text-only [--cache DIR]

WORK_DIR/text holds the text, by category, from `build_corpus.py --permissive`, which is called where it is missing;
--text-only ends there. It is read as it is or packed (xz -T0 -6 WORK_DIR/text/*/*.jsonl: 17 MB), so a machine without a
network gets it as a copy. Training resumes: give the same command again. The weights are rounded to bfloat16, the byte
LM before patches are made with it, and the BLT before it is measured.
"""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from build_corpus import CATEGORIES, LICENCES, build

from bytelatent.device import choose_device, device_name
from bytelatent.errors import UserError, guarded
from bytelatent.evaluation import Measured, ReadSettings, Texts, find_models, measure_texts
from bytelatent.log import configure
from bytelatent.report import compare_runs
from bytelatent.text import read_documents
from bytelatent.training import TrainSettings, train
from bytelatent.weights import StoredModel, load, write_model
from bytelatent.weights.side_files import CARD

OUT = Path(__file__).parents[1] / "bytelatent" / "tiny"
WEIGHTS = {"prose": 0.35, "docs": 0.25, "multilingual": 0.15, "code": 0.25}  # of the documents of a batch
SHARES = {"byte_lm": 0.2, "blt": 0.75}  # of the minutes
PATCH_BYTES = 4.5
MOST_BYTES = 12_000_000  # of the package's files
ABOUT = "the text below"
NGRAMS = {"sizes": [3, 4, 5, 6], "vocab_size": 5003}
OPTIMIZER = {"name": "muon", "lr": 8e-3, "warmup_steps": 40, "weight_decay": 0.05}
# A GPU takes larger batches, from processes that read ahead, and replays its step.
BATCHES = {"cpu": {"batch_bytes": 2048}, "cuda": {"batch_bytes": 32_768, "workers": 4}}


def text(folder: Path, cache: Path) -> None:
    for name in CATEGORIES:
        if not list((folder / name).glob("train.jsonl*")):
            build(folder / name, {name}, cache, permissive=True)


def parts(folder: Path, name: str) -> dict[str, str]:
    """The files train.jsonl or valid.jsonl, packed or not, by category."""
    return {category: str(next((folder / category).glob(f"{name}.jsonl*"))) for category in CATEGORIES}


def settings(run: Path, texts: Path, model: Any, minutes: float, device: str, **more: Any) -> TrainSettings:
    sources = [{"path": path, "weight": WEIGHTS[name]} for name, path in parts(texts, "train").items()]
    data = {"train": sources, "valid": list(parts(texts, "valid").values()), "context": 1024}
    kind, optimizer = choose_device(device).type, OPTIMIZER | more.pop("optimizer", {})
    if kind == "cuda" and "patching" in more:
        data["patch_bytes"] = PATCH_BYTES
    return TrainSettings.parse(
        {
            "run": str(run),
            "model": model,
            "minutes": minutes,
            "device": device,
            "data": data | BATCHES.get(kind, BATCHES["cpu"]),
            "cuda_graph": kind == "cuda",
            "optimizer": optimizer,
            "validation": {"every": 1000, "max_bytes": 50_000},
            "checkpoint": {"every": 250, "keep": 2},
            **more,
        }
    )


def write_in_bfloat16(run: Path, out: Path, finish: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a run's model, and the byte LM in it, as bfloat16; `finish` is called with the folder before it appears."""
    found = load(run)
    byte_lm = found.byte_lm.to(torch.bfloat16) if found.byte_lm is not None else None
    config = found.config.with_origin(training_text=[ABOUT], validation_text=[ABOUT], bits_per_byte=None)
    if config.calibration is not None:
        config = config.model_copy(update={"calibration": config.calibration.model_copy(update={"data": ABOUT})})
    write_model(
        StoredModel.of(found.model.to(torch.bfloat16), config, byte_lm), out, "native", "apache-2.0", check=finish
    )


def bits_per_byte(model: Path, texts: Path, device: str) -> dict[str, float]:
    """Of held-out text, by category."""
    found = find_models([str(model)], None, ReadSettings(choose_device(device)))[0].load()
    measured = {name: Measured() for name in CATEGORIES}
    for name, path in parts(texts, "valid").items():
        measure_texts(found, Texts([path]), measured[name])
    return {name: each.bits_per_byte for name, each in measured.items()}


def card(given: argparse.Namespace, bits: dict[str, dict[str, float]]) -> str:
    """What the model's card says of its text, its training and its measurements."""
    sizes: dict[tuple[str, str], int] = {}
    texts = given.work / "text"
    for category, path in parts(texts, "train").items():
        for _, document in read_documents(path, field_key="source"):
            key = category, str(document.field)
            sizes[key] = sizes.get(key, 0) + len(document.text)
    rows = [f"| {kind} | {name} | {LICENCES[name]} | {size / 1e6:.1f} |" for (kind, name), size in sizes.items()]
    lines = ["## Text", "", "| category | source | licence | MB |", "| --- | --- | --- | --- |", *rows, ""]
    shares = ", ".join(f"{name} {weight:.0%}" for name, weight in WEIGHTS.items())
    lines += [
        f"`setup/build_corpus.py --permissive` fetches it from Debian 12. Documents of each category: {shares}.",
        "",
    ]
    lines += ["## Bits per byte", "", "Of held-out documents, with the weights as they are here.", ""]
    lines += ["| | " + " | ".join(CATEGORIES) + " |", "| --- |" + " --- |" * len(CATEGORIES)]
    lines += [f"| {name} | " + " | ".join(f"{of[part]:.3f}" for part in CATEGORIES) + " |" for name, of in bits.items()]
    lines += [
        "",
        "## Training",
        "",
        f"`python setup/train_tiny.py WORK_DIR --minutes {given.minutes:g} --device {given.device}`",
        "",
    ]
    for run in (given.work / "runs" / name for name in SHARES):
        found = compare_runs([run]).runs[0].summary
        lines.append(
            f"- {found.kind}: {(found.seconds or 0) / 60:.1f} minutes, {found.steps:,} steps, {found.num_bytes:,} bytes"
        )
    machine = (
        f"{device_name(choose_device(given.device))}, torch {torch.__version__}, Python {platform.python_version()}"
    )
    if choose_device(given.device).type == "cpu":
        machine += f", {torch.get_num_threads()} thread"
    lines += ["", f"On {machine}.", "", "It is small: it shows how patches and generation work. Do not expect facts."]
    lines += ["It writes like its text: a Bible, novels of 1811 to 1818, manuals, and code."]
    return "\n".join(["", *lines, ""])


def make(given: argparse.Namespace) -> None:
    """Build the text, train, and write the package's folder.

    Raises:
        UserError: the text cannot be had, or the files are too large for the package.
    """
    texts, runs, byte_lm = given.work / "text", given.work / "runs", given.work / "byte_lm"
    text(texts, given.cache)
    if given.text_only:
        return
    minutes = {name: share * given.minutes for name, share in SHARES.items()}
    train(settings(runs / "byte_lm", texts, "demo-byte-lm", minutes["byte_lm"], given.device))
    if not byte_lm.is_dir():
        write_in_bfloat16(runs / "byte_lm", byte_lm)
    patching: dict[str, Any] = {
        "patching": {"mode": "entropy"},
        "calibration": {"patch_bytes": PATCH_BYTES, "text_bytes": 300_000},
        "entropy_model": str(byte_lm),
        "optimizer": {"lr_scale": {"hash_tables": 2.0}},
    }
    model = {"preset": "demo-blt", "ngram_hash": NGRAMS}
    train(settings(runs / "blt", texts, model, minutes["blt"], given.device, **patching))
    package(given)


def package(given: argparse.Namespace) -> None:
    """Measure the runs' models, in bfloat16, and write the package's folder with its card."""
    folders = {"BLT": given.work / "blt", "byte LM": given.work / "byte_lm"}
    write_in_bfloat16(given.work / "runs" / "blt", folders["BLT"])
    bits = {name: bits_per_byte(folder, given.work / "text", given.device) for name, folder in folders.items()}

    def finish(folder: Path) -> None:
        mean = sum(bits["BLT"].values()) / len(bits["BLT"])
        begin = (folder / CARD).read_text(encoding="utf-8")
        begin = begin.replace("not measured", f"{mean:.3f}, the mean of the categories below")
        (folder / CARD).write_text(begin + card(given, bits), encoding="utf-8")
        if (size := sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())) > MOST_BYTES:
            raise UserError(f"'{given.out}' would hold {size:,} bytes, more than {MOST_BYTES:,}; take smaller shapes")

    write_in_bfloat16(given.work / "runs" / "blt", given.out, finish)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", metavar="WORK_DIR", type=Path)
    parser.add_argument("--minutes", type=float, default=7.0, help="of training; on a GPU the rest takes two more")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", metavar="DIR", type=Path, default=OUT)
    parser.add_argument("--cache", metavar="DIR", type=Path, default=Path("/tmp/corpus-debs"))
    parser.add_argument("--text-only", action="store_true")
    given = parser.parse_args()
    configure()
    make(given)


if __name__ == "__main__":
    guarded(main)
