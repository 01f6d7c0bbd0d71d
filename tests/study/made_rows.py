"""Rows of a study that nobody ran: bits per byte follow known laws, with known noise of seeds."""

import math
import random
from typing import Any

from bytelatent.study import HeldOut, StudyRow
from bytelatent.study.results import CurvePoint, GroupBits

CATEGORIES = {"prose": 1.1, "documentation": 0.9, "code": 0.7, "other languages": 1.3}
# E, A at 1e17 FLOPs, alpha
LAWS = {
    "token-8k": ("token LM, BPE of 8k", "token_lm", None, (0.0, 1.090, 0.052), 2.9),
    "token-16k": ("token LM, BPE of 16k", "token_lm", None, (0.0, 1.062, 0.055), 3.33),
    "token-32k": ("token LM, BPE of 32k", "token_lm", None, (0.0, 1.068, 0.061), 3.7),
    "flat": ("flat byte LM", "byte_lm", None, (0.0, 1.251, 0.058), 1.0),
    "entropy-3.3": ("BLT, entropy, 3.3 bytes per patch", "blt", "entropy", (0.0, 1.103, 0.066), 3.3),
    "entropy-4.5": ("BLT, entropy, 4.5 bytes per patch", "blt", "entropy", (0.0, 1.088, 0.074), 4.5),
    "entropy-6": ("BLT, entropy, 6 bytes per patch", "blt", "entropy", (0.0, 1.110, 0.078), 6.0),
    "entropy-8": ("BLT, entropy, 8 bytes per patch", "blt", "entropy", (0.0, 1.151, 0.081), 8.0),
    "space": ("BLT, space", "blt", "space", (0.0, 1.120, 0.070), 5.6),
    "static": ("BLT, static, 4 bytes per patch", "blt", "static", (0.0, 1.210, 0.068), 4.0),
}
BUDGETS = (1e16, 3e16, 1e17)
SEED_NOISE = 0.003  # relative


def held_out(bits: float) -> HeldOut:
    mean = sum(CATEGORIES.values()) / len(CATEGORIES)
    parts = {name: GroupBits(bits_per_byte=bits * share / mean, bytes=700_000) for name, share in CATEGORIES.items()}
    return HeldOut(bits_per_byte=bits, bytes=2_800_000, by_category=parts)


def made_row(
    family: str = "entropy-4.5", budget: float = 1e16, seed: int = 0, bits: float = 1.2, **more: Any
) -> StudyRow:
    label, kind, mode, _, unit_bytes = LAWS[family]
    num_parameters = int(3e7 * math.sqrt(budget / 1e16))
    per_byte = 6.0 * num_parameters / (unit_bytes if kind != "byte_lm" else 1.0)
    num_tables = 6 * 200_003 * 384 if kind == "blt" else 0
    patching = {"patching": {"mode": mode}} if mode else {}
    values: dict[str, Any] = {
        "name": f"{family}-{budget:.0e}-{seed}".replace("+", ""),
        "family": family,
        "label": label,
        "budget": budget,
        "seed": seed,
        "kind": kind,
        "settings": {"run": f"runs/{family}-{seed}", "seed": seed, "optimizer": {"lr": 1e-3}, **patching},
        "parameters": {"model": num_parameters},
        "table_parameters": num_tables,
        "table_bytes": 4 * num_tables,
        "steps": 2000,
        "batch_bytes": 65_536.0,
        "bytes_read": int(budget / per_byte),
        "epochs": budget / per_byte / 190e6,
        "mean_patch_bytes": unit_bytes,
        "training_flops_per_byte": {"model": per_byte},
        "training_flops": budget * (1 + 0.002 * seed),
        "entropy_model_training_flops": 1.2e15 if mode == "entropy" else 0.0,
        "inference_flops_per_byte": per_byte / 3,
        "seconds": budget / (1.6e14 if kind == "token_lm" else 1.0e14),
        "bytes_per_second": budget / per_byte / (budget / 1.3e14),
        "held_out": held_out(bits),
        "tuning": held_out(bits + 0.01),
        "curve": [
            CurvePoint(training_flops=budget * i / 50, seconds=i, bits_per_byte=bits + 3 / (1 + i))
            for i in range(1, 51)
        ],
        "device": "NVIDIA H200",
        "versions": {"torch": "2.11.0", "bytelatent": "0.1.0"},
        "date": "2026-11-30",
        **more,
    }
    return StudyRow.parse(values)


def law(family: str, flops: float) -> float:
    limit, scale, exponent = LAWS[family][3]
    return limit + scale * (flops / 1e17) ** -exponent


def made_rows(budgets: tuple[float, ...] = BUDGETS, noise: float = SEED_NOISE, seeds: int = 3) -> list[StudyRow]:
    """Each family at each budget, with several seeds at the smallest one."""
    drawn = random.Random(0)
    return [
        made_row(family, budget, seed, law(family, budget) * math.exp(drawn.gauss(0, noise)))
        for family in LAWS
        for budget in budgets
        for seed in range(seeds if budget == budgets[0] else 1)
    ]
