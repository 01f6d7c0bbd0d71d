"""The rates in the metrics."""

from pathlib import Path

import pytest
import torch

from bytelatent.model.flops import costs
from bytelatent.training.ranks import Ranks
from bytelatent.training.speed import Totals, peak_flops, peak_memory, speed
from tests.training.tiny_runs import BLT, byte_lm_run, settings


def test_rates_between_two_moments() -> None:
    rule = settings(byte_lm_run(Path("x"), Path("x"), model=BLT, patching={"mode": "space"}))
    then, now = Totals(1000, 300, 10.0, 1.0), Totals(9000, 2300, 14.0, 2.0)
    before = peak_memory()
    found = speed(then, now, rule, 1e9, Ranks())
    memory = found.pop("peak_memory_gib")
    flops = sum(part.flops_per_byte for part in costs(rule.model, patch_bytes=4.0, context=64))
    assert found == {
        "bytes_per_second": 2000,
        "patches_per_second": 500,
        "model_flops_utilisation": pytest.approx(3 * flops * 2000 / 1e9, abs=1e-4),
        "data_wait": 0.25,
    }
    assert 0.05 < before / 2**30 - 1e-3 <= memory <= peak_memory() / 2**30 + 1e-3
    nothing = speed(now, now, rule, 1e9, Ranks())
    assert set(nothing.values()) == {None, nothing["peak_memory_gib"]}
    unknown = speed(then, now, rule, None, Ranks())
    assert unknown["model_flops_utilisation"] is None
    assert unknown["bytes_per_second"] == 2000


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Tesla T4", None),
    ],
)
def test_what_a_device_can_do(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
