"""The rates in the metrics."""

from pathlib import Path

import pytest

from bytelatent.device import peak_memory
from bytelatent.model.flops import costs
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.metrics import Totals, speed
from tests.training.tiny_runs import BLT, byte_lm_run, settings


def test_rates_between_two_moments() -> None:
    asked = settings(byte_lm_run(Path("x"), Path("x"), model=BLT, patching={"mode": "space"}))
    then, now = Totals(1000, 300, 10.0, 1.0), Totals(9000, 2300, 14.0, 2.0)
    before = peak_memory()
    found = speed(then, now, asked.model, 64, 1e9, Ranks())
    memory = found.pop("peak_memory_gib")
    flops = sum(part.flops_per_byte for part in costs(asked.model, patch_bytes=4.0, context=64))
    assert found == {
        "bytes_per_second": 2000,
        "patches_per_second": 500,
        "model_flops_utilisation": pytest.approx(3 * flops * 2000 / 1e9, abs=1e-4),
        "data_wait": 0.25,
    }
    assert 0.05 < before / 2**30 - 1e-3 <= memory <= peak_memory() / 2**30 + 1e-3
    nothing = speed(now, now, asked.model, 64, 1e9, Ranks())
    assert set(nothing.values()) == {None, nothing["peak_memory_gib"]}
    unknown = speed(then, now, asked.model, 64, None, Ranks())
    assert unknown["model_flops_utilisation"] is None
    assert unknown["bytes_per_second"] == 2000
