"""Where patches begin: one interface, the rules, threshold calibration.

Every rule answers two questions with the same result: the starts in a whole batch at once (`next_starts`), and, from a
small carried state, whether the next id starts a patch (`PatchState`, `step`). The decision about position i+1 uses
only ids 0..i, so a prefix is patched the same with or without what follows.
"""

from bytelatent.patching.bpe import Tail
from bytelatent.patching.calibration import Calibration, calibrate, mean_patch_bytes, patch_bytes_by_threshold
from bytelatent.patching.modes import PatchState, next_starts, patch_lengths, step
from bytelatent.patching.patch import Patch
from bytelatent.patching.settings import PatchSettings

__all__ = [
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
    "step",
]
