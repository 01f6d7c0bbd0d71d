"""How fast a run is, and how much of the device that uses."""

import sys
from typing import Any, NamedTuple

import torch

from bytelatent.model.flops import costs
from bytelatent.training.checkpoint import TrainState
from bytelatent.training.ranks import Ranks
from bytelatent.training.settings import TrainSettings

# Dense bfloat16 products a second, as the makers state them, by what the device's name holds; the first that fits.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Totals(NamedTuple):
    """What a run has done so far."""

    num_bytes: int
    num_patches: int
    seconds: float
    waited: float

    @classmethod
    def of(cls, state: TrainState) -> "Totals":
        return cls(state.bytes_seen, state.patches_seen, state.seconds, state.waited)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Products and sums a second that a device can do at most; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def speed(then: Totals, now: Totals, settings: TrainSettings, peak: float | None, ranks: Ranks) -> dict[str, Any]:
    """Rates between two moments; None where no time has passed, or they are not known.

    Args:
        peak: of one device.
    """
    seconds = now.seconds - then.seconds
    num_bytes, num_patches = now.num_bytes - then.num_bytes, now.num_patches - then.num_patches
    found: dict[str, Any] = {
        "bytes_per_second": None,
        "patches_per_second": None,
        "model_flops_utilisation": None,
        "data_wait": None,
        "peak_memory_gib": round(max(ranks.gather(peak_memory())) / 2**30, 3),
    }
    waited = max(ranks.gather(now.waited - then.waited))
    if seconds > 0:
        found["bytes_per_second"] = round(num_bytes / seconds)
        found["patches_per_second"] = round(num_patches / seconds) if num_patches else None
        found["data_wait"] = round(min(waited / seconds, 1.0), 4)
        if peak is not None:
            parts = costs(settings.model, num_bytes / (num_patches or num_bytes), settings.data.context)
            flops = 3 * sum(part.flops_per_byte for part in parts) * num_bytes / seconds
            found["model_flops_utilisation"] = round(flops / (peak * ranks.world), 4)
    return found


def peak_memory() -> int:
    """The most bytes that this process held at a time: on its GPU where it computes there, else in all."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
