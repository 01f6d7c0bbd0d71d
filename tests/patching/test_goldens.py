"""The patch lengths of the published code, on its own entropies and tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent.patching import PatchSettings, patch_lengths

CASES = json.loads((Path(__file__).parent.parent / "goldens" / "patches.json").read_text())


def name(case: dict[str, Any]) -> str:
    numbers = ",".join(f"{key}={value}" for key, value in case["args"].items())
    size = len(case["tokens"]) if "tokens" in case else "x".join(map(str, torch.tensor(case["entropies"]).shape))
    return f"{case['mode']}({numbers})-{size}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_patch_lengths_equal_the_published(case: dict[str, Any]) -> None:
    settings = PatchSettings(mode=case["mode"], **case["args"])
    ids = torch.tensor([case["tokens"]]) if "tokens" in case else None
    entropies = torch.tensor(case["entropies"]) if "entropies" in case else None
    lengths = patch_lengths(ids, entropies, settings, include_next=case["include_next"])
    published = torch.tensor(case["patch_lengths"])
    assert lengths.tolist() == (published if published.dim() == 2 else published[None]).tolist()


def test_every_mode_but_bpe_has_goldens() -> None:
    assert {case["mode"] for case in CASES} == {"entropy", "space", "static", "byte"}
    numbers = {number for case in CASES for number in case["args"]}
    assert numbers == {"threshold", "monotonicity", "threshold_add", "max_patch_length", "patch_size"}
