"""Where patches begin: one interface, the modes, threshold calibration.

Every mode answers two questions with the same result: the starts in a whole batch at once (`next_starts`), and, from a
small carried state, whether the next id starts a patch (`PatchState`, `step`).
"""

from bytelatent.patching.bpe import Tail
from bytelatent.patching.calibration import Calibration, calibrate, mean_patch_bytes, patch_bytes_by_threshold
from bytelatent.patching.modes import MODES, PatchSettings
from bytelatent.patching.starts import Patch, PatchState, next_starts, patch_lengths, starts_of_lengths, step

__all__ = [
    "MODES",
    "Calibration",
    "Patch",
    "PatchSettings",
    "PatchState",
    "Tail",
    "calibrate",
    "mean_patch_bytes",
    "next_starts",
    "patch_bytes_by_threshold",
    "patch_lengths",
    "starts_of_lengths",
    "step",
]
