"""Runs small enough for a test: their text, their settings, their command."""

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bytelatent.training import TrainSettings, read_metrics
from tests import processes

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "went",
    "over",
    "to",
    "see",
    "what",
    "my",
    "dog",
    "was",
    "doing",
    "in",
    "our",
    "yard",
]
STACK = {"dim": 16, "num_layers": 1, "num_heads": 2, "multiple_of": 16}
BYTE_LM = {"kind": "byte_lm", **STACK, "window": 32}
BLT = {
    "kind": "blt",
    "encoder": {**STACK, "window": 32},
    "global_transformer": {**STACK, "dim": 32},
    "decoder": {**STACK, "window": 32},
    "cross_attention": {"k": 2, "num_heads": 2},
    "ngram_hash": {"sizes": [3, 4], "vocab_size": 101},
}


def write_text(path: Path, seed: int, num_documents: int = 60) -> Path:
    draw = random.Random(seed)
    rows = [{"text": " ".join(draw.choice(WORDS) for _ in range(20)) + "."} for _ in range(num_documents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def unigram_bits(path: Path) -> float:
    """What a letter of a text costs one who knows how often each comes."""
    text = "".join(json.loads(line)["text"] for line in path.read_text().splitlines())
    counts = Counter(text)
    return -sum(n / len(text) * math.log2(n / len(text)) for n in counts.values())


def byte_lm_run(run: Path, text: Path, steps: int = 12, **more: Any) -> dict[str, Any]:
    """The values of a byte LM's run; `more` lays over them, `data` key by key."""
    data = {"train": str(text), "context": 64, "batch_bytes": 256, "shuffle_buffer": 8, **more.pop("data", {})}
    return {
        "run": str(run),
        "steps": steps,
        "model": BYTE_LM,
        "data": data,
        "optimizer": {"lr": 3e-3, "warmup_steps": 3},
        "checkpoint": {"every": 5},
        "log_every": 1,
        "device": "cpu",
        "dtype": "float32",
        **more,
    }


def blt_run(run: Path, text: Path, byte_lm: Path, steps: int = 12, **more: Any) -> dict[str, Any]:
    """The same of a BLT that patches by entropy, with a threshold from calibration."""
    own = {
        "model": BLT,
        "patching": {"mode": "entropy"},
        "calibration": {"patch_bytes": 4.0, "text_bytes": 2000},
        "entropy_model": str(byte_lm),
    }
    return byte_lm_run(run, text, steps, **{**own, **more})


def settings(values: dict[str, Any]) -> TrainSettings:
    return TrainSettings.parse(values)


def command(values: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "bytelatent.train", *(f"{key}={json.dumps(value)}" for key, value in values.items())]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def finished(arguments: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """A command or a program run to its end; `more` as for `processes.Command`."""
    return processes.ended(arguments, environment(), **more)


def log_of(caplog: pytest.LogCaptureFixture) -> str:
    """What the package has logged since the last call, a message a line."""
    text = "".join(f"{record.getMessage()}\n" for record in caplog.records if record.name.startswith("bytelatent"))
    caplog.clear()
    return text


def losses(run: Path) -> list[tuple[int, int, float | None, float | None]]:
    """What the metrics of a run say that does not depend on the clock."""
    rows = read_metrics(run / "metrics.jsonl")
    return [
        (row["step"], row["bytes_seen"], row.get("bits_per_byte"), row.get("validation_bits_per_byte")) for row in rows
    ]


def checkpoints(run: Path) -> list[str]:
    return sorted(place.name for place in (run / "checkpoints").iterdir() if not place.name.startswith("."))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / checkpoints(run)[-1] / "model.safetensors")


def assert_equal_runs(run: Path, uninterrupted: Path) -> None:
    """Bit for bit, in the metrics and in the weights."""
    assert losses(run) == losses(uninterrupted)
    assert checkpoints(run)[-1] == checkpoints(uninterrupted)[-1]
    one, other = weights(run), weights(uninterrupted)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
