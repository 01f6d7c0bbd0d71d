"""How long does the optimizer's step take alone? AdamW's and Muon's, on random gradients of some shapes.

    python benchmarks/optimizers.py [PRESET...] [--device cuda] [--profile]

Whole, and until the host has launched it, which is the shorter the less a small model is bound by launches. The hash
tables are left out: what a step by rows takes depends on the text. Several GPUs: `scale.py measure`.
"""

import argparse
import gc
import statistics
import time
from typing import get_args

import torch
from gpu_trace import print_kernels

from bytelatent.device import choose_device
from bytelatent.model import build_model, preset
from bytelatent.training.muon import Muon, newton_schulz_cost
from bytelatent.training.optimizer import build_optimizer, single_optimizers
from bytelatent.training.profiling.measure import seconds_of, wait_for
from bytelatent.training.settings import OptimizerSettings
from bytelatent.training.sparse_rows import SparseRowsAdamW

PRESETS = ["demo-blt", "blt-100m", "blt-400m", "blt-1b"]
NAMES = get_args(OptimizerSettings.model_fields["name"].annotation)


def measure(shape: str, name: str, device: torch.device, profiled: bool) -> None:
    with device:
        model = build_model(preset(shape))
    optimizer = build_optimizer(model, OptimizerSettings.parse({"name": name, "hash_gradients": "rows"}))
    weights, flops = 0, 0.0
    for one in single_optimizers(optimizer):
        for weight in (weight for group in one.param_groups for weight in group["params"]):
            if not isinstance(one, SparseRowsAdamW):
                weight.grad = torch.randn_like(weight)
                weights += weight.numel()
                flops += newton_schulz_cost(*weight.shape) if isinstance(one, Muon) else 0
    whole, launched = seconds_of(optimizer.step, device), []
    for _ in range(10):
        wait_for(device)
        began = time.perf_counter()
        optimizer.step()
        launched.append(time.perf_counter() - began)
    rate = f" ({flops / whole / 1e12:.3g} TFLOP/s)" if flops else ""
    print(
        f"{shape}, {name}: {weights / 1e6:,.1f} million weights, {whole * 1e3:.2f} ms{rate}, "
        f"launched in {statistics.median(launched) * 1e3:.2f} ms",
        flush=True,
    )
    if profiled:
        print_kernels(optimizer.step, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step, too")
    given = parser.parse_args()
    device = choose_device(given.device)
    for shape in given.presets:
        for name in NAMES:
            measure(shape, name, device, given.profile)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
