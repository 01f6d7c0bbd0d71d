"""The threshold that gives a wanted mean patch size."""

import torch
from torch import Tensor

from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.patching.modes import PatchSettings
from bytelatent.patching.starts import next_starts
from bytelatent.vocab import OFFSET

# Shapes: T ids in a packed stream of documents


class Calibration(Settings):
    """A threshold and what it was measured on. Another byte LM, window or kind of text needs another threshold."""

    threshold: float  # nats
    wanted_patch_bytes: float
    mean_patch_bytes: float  # on the text the threshold was chosen on
    held_out_mean_patch_bytes: float | None = None
    window: int | None = None  # the byte LM's attention window in ids
    data: str = ""  # the text it was measured on
    data_bytes: int = 0
    byte_lm: str = ""  # fingerprint of the byte LM's weights


def mean_patch_bytes(ids: Tensor, entropies: Tensor | None, position: Tensor, settings: PatchSettings) -> float:
    """Bytes per patch of a packed stream, counting the patches that hold at least one byte.

    Args:
        ids: [T] packed documents.
        entropies: [T] nats, where the mode needs them.
        position: [T] position in the document.
        settings: where patches start.
    """
    first = torch.ones_like(ids[:1], dtype=torch.bool)
    begins = torch.cat([first, next_starts(ids, entropies, position, settings)[:-1]])
    patch = (begins | (position == 0)).cumsum(dim=0)
    is_byte = ids >= OFFSET
    with_bytes = patch[is_byte]  # in rising order
    num_patches = int((with_bytes[1:] != with_bytes[:-1]).sum()) + (len(with_bytes) > 0)
    return len(with_bytes) / num_patches if num_patches else 0.0


def patch_bytes_by_threshold(
    ids: Tensor, entropies: Tensor, position: Tensor, settings: PatchSettings, num_points: int = 60
) -> tuple[list[float], list[float]]:
    """Mean patch sizes over the thresholds that occur, for a curve.

    Args:
        ids: [T] packed documents.
        entropies: [T] nats.
        position: [T] position in the document.
        settings: of mode `entropy`; its threshold does not matter.
        num_points: of the curve.

    Returns:
        Thresholds in nats, rising, and the mean bytes per patch at each.
    """
    values = _compared(entropies, settings)
    shares = torch.linspace(0.02, 0.98, num_points, dtype=torch.float64)
    thresholds = values.double().sort().values[(shares * (len(values) - 1)).long()].unique().tolist()
    candidates = [settings.model_copy(update={"threshold": threshold}) for threshold in thresholds]
    return thresholds, [mean_patch_bytes(ids, entropies, position, candidate) for candidate in candidates]


def calibrate(
    ids: Tensor, entropies: Tensor, position: Tensor, wanted_patch_bytes: float, settings: PatchSettings | None = None
) -> Calibration:
    """Choose the threshold whose mean patch size is nearest to the wanted one.

    The number of patches only falls as the threshold rises, so a bisection over the values that occur finds it.

    Args:
        ids: [T] packed documents.
        entropies: [T] nats.
        position: [T] position in the document.
        wanted_patch_bytes: wanted mean bytes per patch.
        settings: of mode `entropy`; their own threshold does not matter. By default patches start above the threshold.

    Raises:
        UserError: no threshold comes near the wanted size on this text.
    """
    if not bool((ids >= OFFSET).any()):
        raise UserError("calibration: the text holds no bytes")
    settings = settings or PatchSettings(mode="entropy", threshold=0.0)
    values = _compared(entropies, settings)
    candidates = torch.unique(values)  # sorted; a patch starts strictly above, so midpoints are safe from rounding
    thresholds = torch.cat([candidates[:1] - 1.0, (candidates[:-1] + candidates[1:]) / 2, candidates[-1:] + 1.0])

    def size(index: int) -> float:
        chosen = settings.model_copy(update={"threshold": float(thresholds[index])})
        return mean_patch_bytes(ids, entropies, position, chosen)

    low, high = 0, len(thresholds) - 1
    smallest, largest = size(low), size(high)
    if not smallest * 0.95 <= wanted_patch_bytes <= largest * 1.05:
        raise UserError(
            f"calibration: a mean patch of {wanted_patch_bytes:g} bytes is out of reach; "
            f"on this text these settings give {smallest:.2f} to {largest:.2f}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        if size(middle) < wanted_patch_bytes:
            low = middle
        else:
            high = middle
    best = min((low, high), key=lambda index: abs(size(index) - wanted_patch_bytes))
    return Calibration(
        threshold=float(thresholds[best]),
        wanted_patch_bytes=wanted_patch_bytes,
        mean_patch_bytes=size(best),
        data_bytes=int((ids >= OFFSET).sum()),
    )


def _compared(entropies: Tensor, settings: PatchSettings) -> Tensor:
    """[T] what the threshold is compared with: the entropies, or by how much they rise."""
    values = entropies.float()
    return values.diff(prepend=values[:1]) if settings.monotonicity else values
