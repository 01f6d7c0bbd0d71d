"""Studies small enough for a test: two families of tiny models, and their text."""

import copy
import json
from pathlib import Path
from typing import Any

import yaml

from bytelatent.study.results import StudyRow, read_rows
from bytelatent.study.run import StudyOptions, run_study
from tests.training.tiny_runs import BLT, BYTE_LM, STACK, write_text

BUDGETS = 4e8, 9e8
FAMILIES: dict[str, Any] = {
    "token": {
        "label": "token LM",
        "settings": {"model": {"kind": "token_lm", **STACK, "dim": 48, "vocab_size": 290}},
        "sizes": {BUDGETS[0]: {"model": {"num_layers": 1}}, BUDGETS[1]: {"model": {"num_layers": 2}}},
    },
    "entropy": {
        "settings": {
            "model": BLT,
            "patching": {"mode": "entropy"},
            "calibration": {"patch_bytes": 4.0, "text_bytes": 2000},
            "entropy_model": "tiny",
        }
    },
}
PLAN: dict[str, Any] = {
    "text": {"category": "kind", "measured_bytes": 4000},
    "base": {
        "data": {"context": 64, "batch_bytes": 256, "shuffle_buffer": 8},
        "optimizer": {"lr": 3e-3},
        "validation": {"every": 6, "max_bytes": 500},
        "checkpoint": {"every": 5, "keep": 1},
        "log_every": 1,
        "device": "cpu",
        "dtype": "float32",
    },
    "entropy_models": {"tiny": {"model": BYTE_LM, "steps": 6}},
    "budgets": list(BUDGETS),
    "families": FAMILIES,
}


def write_texts(folder: Path) -> dict[str, str]:
    """The texts of a study; the documents that are held out are of two kinds in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"train": write_text(folder / "train.jsonl", 0, 400)}
    for number, key in enumerate(("tuning", "held_out"), start=1):
        texts[key] = write_text(folder / f"{key}.jsonl", number, 20)
        rows = [json.loads(line) for line in texts[key].read_text().splitlines()]
        lines = [json.dumps({**row, "kind": ("prose", "code")[at % 2]}) for at, row in enumerate(rows)]
        texts[key].write_text("".join(f"{line}\n" for line in lines))
    return {key: str(path) for key, path in texts.items()}


def write_plan(path: Path, texts: dict[str, str], **changes: Any) -> Path:
    """A plan file; `changes` by whole keys with `__` between, as in `text__category`."""
    plan = copy.deepcopy(PLAN)
    plan["text"] |= texts
    for key, value in changes.items():
        *groups, name = key.split("__")
        group = plan
        for part in groups:
            group = group[part]
        group[name] = value
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return path


def study(path: Path, folder: Path, **options: Any) -> list[StudyRow]:
    """Run a plan to its end; its rows by name."""
    run_study(path, StudyOptions(folder, **options)).raise_failures()
    return read_rows([folder / "trials" if options.get("trials") else folder])


def without_clock(row: StudyRow) -> dict[str, Any]:
    """What a row holds that is the same each time, wherever its folder is."""
    values = row.plain()
    for name in ("seconds", "bytes_per_second", "date"):
        del values[name]
    for point in values["curve"]:
        del point["seconds"]
    return values
