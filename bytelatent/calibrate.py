"""The threshold for a patch size, and the picture of how one follows from the other: `blt calibrate`."""

import sys
from pathlib import Path

from bytelatent.data import DataSettings
from bytelatent.interop import load_byte_lm_and_context
from bytelatent.patching import Calibration, PatchSettings, calibrate, patch_bytes_by_threshold
from bytelatent.report import write_threshold_figure
from bytelatent.terminal import say
from bytelatent.text import DamageLimit
from bytelatent.training import sample_entropies


def calibrate_text(
    text: list[str],
    patch_bytes: float,
    model: str | None = None,
    max_bytes: int = 1_000_000,
    figure: Path | None = None,
    device: str = "auto",
) -> Calibration:
    """Choose the threshold for a mean patch of `patch_bytes` bytes.

    Args:
        text: files, folders or globs, with entropies stored or not.
        model: the byte LM that gives entropies where none are stored.
        max_bytes: text to measure on.
        figure: a picture to write: mean patch size against threshold.

    Raises:
        UserError: neither are there stored entropies nor a byte LM, or the size is out of reach.
    """
    data = DataSettings.parse({"train": text})
    rule = PatchSettings(mode="entropy", threshold=0.0)
    # In pieces as in its training, and as `blt entropies` reads it; entropies that are stored were computed so.
    byte_lm, context = (None, data.context) if model is None else load_byte_lm_and_context(model)
    damaged = DamageLimit(data.max_damaged, "rows and files in all", lambda line: say(line, sys.stderr))
    sample = sample_entropies(byte_lm, data.train, context, rule, max_bytes, device, damaged=damaged)
    found = calibrate(sample.ids, sample.entropies, sample.position, patch_bytes, rule)
    if figure is not None:
        thresholds, sizes = patch_bytes_by_threshold(sample.ids, sample.entropies, sample.position, rule)
        write_threshold_figure(figure, thresholds, sizes, (found.threshold, found.mean_patch_bytes))
    origin = {"window": sample.window, "byte_lm": sample.byte_lm, "data": ", ".join(text)}
    return found.model_copy(update=origin)
