"""The threshold for a patch size, and the figure of how one follows from the other: `blt calibrate`."""

from bytelatent.commands.options import CalibrateSettings
from bytelatent.credentials import masked
from bytelatent.data import DataSettings
from bytelatent.device import choose_device, choose_dtype
from bytelatent.patching import Calibration, PatchSettings, calibrate, patch_bytes_by_threshold
from bytelatent.report import figure_format, write_threshold_figure
from bytelatent.terminal import print_line
from bytelatent.text import BadRows
from bytelatent.text.documents import forget_logged, must_have_read
from bytelatent.training import sample_entropies
from bytelatent.weights import load_byte_lm_and_context


def run(settings: CalibrateSettings) -> None:
    found, unread = calibrate_text(settings)
    print_line(found.model_dump_json(indent=1))
    must_have_read(unread)


def calibrate_text(settings: CalibrateSettings) -> tuple[Calibration, dict[str, str]]:
    """Choose the threshold for a mean patch size.

    Returns:
        The threshold, and the files of which nothing could be read, each with the reason.

    Raises:
        UserError: there are neither stored entropies nor a byte LM, the size is out of reach, or the figure's suffix is
            unknown.
    """
    forget_logged()
    device = choose_device(settings.device)  # before anything is read
    if settings.figure is not None:
        figure_format(settings.figure)
    sources = [{"path": path, "text_key": settings.text_key} for path in settings.text]
    limits = {"max_bad_rows": settings.max_bad_rows, "max_row_bytes": settings.max_row_bytes}
    data = DataSettings.parse({"train": sources, **limits})
    patching = PatchSettings(mode="entropy", threshold=0.0, reset_at_newline=settings.reset_at_newline)
    # In pieces as in its training, and as `blt entropies` reads it; entropies that are stored were computed so.
    byte_lm, context = None, data.context
    if settings.model is not None:
        byte_lm, context = load_byte_lm_and_context(settings.model, dtype="float32")
    bad = BadRows(data.max_bad_rows)
    sample = sample_entropies(
        byte_lm,
        data.train,
        context,
        patching,
        settings.max_bytes,
        device,
        choose_dtype("auto", device),
        bad,
        data.max_row_bytes,
    )
    found = calibrate(sample.ids, sample.entropies, sample.position, settings.patch_bytes, patching)
    if settings.figure is not None:
        thresholds, sizes = patch_bytes_by_threshold(sample.ids, sample.entropies, sample.position, patching)
        write_threshold_figure(settings.figure, thresholds, sizes, (found.threshold, found.mean_patch_bytes))
    origin = {"window": sample.window, "byte_lm": sample.byte_lm, "data": ", ".join(masked(settings.text))}
    return found.model_copy(update=origin), bad.unread
