"""Train the same model on real text in several variants, and compare bits per byte.

    python benchmarks/real.py --text text [fast plain] [--steps 300] [--seeds 0 1 2] [--model blt-100m] [--bytes 16384]
    python benchmarks/real.py --text text fast rows float8 --steps 1000 --seeds 0 1

Every variant trains the same few steps from the same seeds. Patches begin at spaces, so that no byte LM is needed.
`text` is a folder with train.jsonl and valid.jsonl. Prints bits per byte on the validation text for each seed, the
standard deviation over the seeds, and the differences between each variant and the first one.

fast     with kernels, compiled blocks, block masks and a CUDA graph; dense gradients of the hash tables
rows     as fast, but with sparse gradients and steps: of the rows of the hash tables that a step uses
float8   as fast, but with the global transformer's products in 8-bit floats
plain    plain PyTorch: patches by gathers and scatters, explicit masks, dense gradients

The ten-minute run itself: `apps/bytelatent/configs/blt_100m.yaml`.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bytelatent.commands.train import main as train
from bytelatent.kernels import patch_attention, patch_pooling
from bytelatent.kernels.hash_embed import hash_rows
from bytelatent.model import attention, ngram_hash

VARIANTS = {  # with their settings; plain comes last because it cannot be undone in a process
    "fast": {},
    "rows": {"optimizer.hash_gradients": "rows"},
    "float8": {"float8": "rowwise"},
    "plain": {},
}


def use_plain_operations() -> None:
    """Replace the kernels of this project and FlexAttention for the rest of the process."""

    def sums(tail: Tensor, history: Tensor, powers: Tensor, tables: Tensor, *, new: int, sparse: bool) -> Tensor:
        return F.embedding_bag(hash_rows(tail, history, powers, len(tables) // len(powers), new), tables, mode="sum")

    patch_attention.takes_kernels = patch_pooling.takes_kernels = lambda _: False
    ngram_hash.ngram_sums = sums  # type: ignore[assignment]
    attention.FLEX_FROM = 2**62


def trained(given: Any, seed: int, variant: str) -> tuple[list[float], float, float]:
    """Bits per byte of the training batches, of the validation text at the end, and seconds."""
    fast = variant != "plain" and torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        settings = {
            "run": f"{folder}/run",
            "model": given.model,
            "seed": seed,
            "steps": given.steps,
            "patching.mode": "space",
            "data.train": f"{given.text}/train.jsonl",
            "data.valid": f"{given.text}/valid.jsonl",
            "data.context": 2048,
            "data.batch_bytes": given.bytes,
            "data.batch_patches": int(given.bytes / 3),
            "optimizer.lr": 1e-3,
            "optimizer.warmup_steps": 50,
            "validation.every": given.steps,
            "validation.max_bytes": 500_000,
            "checkpoint.every": given.steps,
            "compile": fast,
            "cuda_graph": fast,
            **VARIANTS[variant],
        }
        run = train([f"{key}={json.dumps(value)}" for key, value in settings.items()])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curve = [line["bits_per_byte"] for line in lines if "bits_per_byte" in line]
        [valid] = [line["validation_bits_per_byte"] for line in lines if "validation_bits_per_byte" in line][-1:]
        return curve, valid, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["fast", "plain"], help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="blt-100m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--bytes", type=int, default=16_384)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    if wrong := [variant for variant in given.variants if variant not in VARIANTS]:
        parser.error(f"unknown variant {wrong[0]}; use some of {', '.join(VARIANTS)}")
    valid: dict[str, list[float]] = {variant: [] for variant in given.variants}
    for variant in sorted(valid, key=list(VARIANTS).index):
        if variant == "plain":
            use_plain_operations()
        for seed in given.seeds:
            torch._dynamo.reset()
            curve, found, seconds = trained(given, seed, variant)
            valid[variant].append(found)
            print(
                f"{variant}, seed {seed}: {found:.4f} valid, last batches {curve[-1]:.4f}, {seconds:.0f} s", flush=True
            )
    for variant, found in valid.items():
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{variant}: mean {statistics.mean(found):.4f}, standard deviation of the seeds {spread:.4f}")
    first, *others = valid
    for variant in others:
        apart = [one - other for one, other in zip(valid[variant], valid[first], strict=True)]
        each = ", ".join(f"{a:+.4f}" for a in apart)
        print(f"{variant} - {first}, seed by seed: {each}; mean {statistics.mean(apart):+.4f}")


if __name__ == "__main__":
    main()
