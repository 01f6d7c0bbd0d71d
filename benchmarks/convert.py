"""Measure memory and time of conversions, with a random model of a released shape.

    python benchmarks/convert.py [--preset blt-1b] [--dtype bfloat16] [--folder DIR]

The model is written in our format, then `blt convert` writes it in transformers' format, in Meta's and in ours again,
each time in a new process whose peak resident memory is measured. The final weights must equal the first ones byte for
byte. The disk needs room for the model twice.
"""

import argparse
import filecmp
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from bytelatent.log import Console
from bytelatent.model import ModelSettings, preset
from bytelatent.patching import PatchSettings
from bytelatent.weights import NATIVE, Config, StoredModel, StoredTensor
from bytelatent.weights.safetensors_io import CHUNK_BYTES
from bytelatent.weights.stored_model import shapes


class RandomTensor(StoredTensor):
    """A tensor that is never in memory: its values are drawn while they are written."""

    def chunks(self) -> Iterator[np.ndarray]:
        left = self.num_bytes
        block = torch.randn(CHUNK_BYTES // 4).mul(0.02).to(self.dtype).view(torch.uint8).numpy()
        while left:
            part = block[: min(left, len(block))]
            left -= len(part)
            yield part


def random_model(settings: ModelSettings, dtype: torch.dtype, byte_lm: StoredModel | None = None) -> StoredModel:
    tensors = {name: RandomTensor(dtype, tuple(shape), ()) for name, shape in shapes(settings).items()}
    patching = PatchSettings(threshold=1.335442066192627) if byte_lm is not None else None
    config = Config(model=settings, context=8192, patching=patching)
    return StoredModel(config, tensors, byte_lm, "random", "memory")


def run_alone(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak resident memory in GiB of a `blt` process."""
    began = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, "-m", "bytelatent.cli", *arguments], dict(os.environ))
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(f"blt {' '.join(arguments)} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="blt-1b")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--folder", type=Path, help="where to put the files; default: the temporary folder")
    given = parser.parse_args()
    console, dtype = Console(), getattr(torch, given.dtype)
    model = random_model(preset(given.preset), dtype, random_model(preset("entropy"), torch.float32))
    largest = max(tensor.num_bytes for tensor in model.tensors.values())
    table = Table(title=f"{given.preset} in {given.dtype} with its byte LM: {model.num_bytes / 1e9:.2f} GB, "
                  f"largest tensor {largest / 2**30:.2f} GiB")  # fmt: skip
    for heading in ("", "seconds", "peak GiB"):
        table.add_column(heading, justify="right" if heading else "left")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        (folder / "start").mkdir()
        NATIVE.write(folder / "start", model)
        source = folder / "start"
        for number, to in enumerate(("hf", "meta", "native")):
            target = folder / f"{number}-{to}"
            seconds, peak = run_alone(["convert", str(source), str(target), "--to", to])
            table.add_row(f"to {to}", f"{seconds:.1f}", f"{peak:.2f}")
            if source != folder / "start":
                shutil.rmtree(source)
            source = target
        first = sorted(file.relative_to(folder / "start") for file in (folder / "start").rglob("*.safetensors"))
        same = all(filecmp.cmp(folder / "start" / file, source / file, shallow=False) for file in first)
        console.print(table)
        console.print("back again: the same bytes" if same else "back again: OTHER BYTES")
        sys.exit(0 if same and first else 1)


if __name__ == "__main__":
    main()
