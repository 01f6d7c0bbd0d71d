"""How fast a run is, and how much of the device that uses."""

from typing import Any, NamedTuple

from bytelatent.device import peak_memory
from bytelatent.model.flops import training_flops
from bytelatent.training.checkpoint.manager import TrainState
from bytelatent.training.distributed.ranks import Ranks
from bytelatent.training.settings import TrainSettings


class Totals(NamedTuple):
    """What a run has done so far."""

    num_bytes: int
    num_patches: int
    seconds: float
    waited: float

    @classmethod
    def of(cls, state: TrainState) -> "Totals":
        return cls(state.bytes_seen, state.patches_seen, state.seconds, state.waited)


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
            patch_bytes = num_bytes / (num_patches or num_bytes)
            flops = training_flops(settings.model, patch_bytes, settings.data.context) * num_bytes / seconds
            found["model_flops_utilisation"] = round(flops / (peak * ranks.world_size), 4)
    return found
