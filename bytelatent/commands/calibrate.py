"""The threshold for a patch size, and the picture of how one follows from the other: `blt calibrate`."""

from pathlib import Path

from bytelatent.commands.settings import CalibrateSettings
from bytelatent.credentials import masked
from bytelatent.data import DataSettings
from bytelatent.device import choose_device, choose_dtype
from bytelatent.patching import Calibration, PatchSettings, calibrate, patch_bytes_by_threshold
from bytelatent.report import figure_format, write_threshold_figure
from bytelatent.terminal import print_line
from bytelatent.text import MAX_ROW_BYTES, BadRows
from bytelatent.text.documents import MAX_BAD_ROWS, forget_logged, must_have_read
from bytelatent.training import sample_entropies
from bytelatent.weights import load_byte_lm_and_context


def run(settings: CalibrateSettings) -> None:
    given = settings.model_dump()
    found, unread = calibrate_text(given.pop("text"), given.pop("patch_bytes"), **given)
    print_line(found.model_dump_json(indent=1))
    must_have_read(unread)


def calibrate_text(
    text: list[str],
    patch_bytes: float,
    model: str | None = None,
    max_bytes: int = 1_000_000,
    figure: Path | None = None,
    device: str = "auto",
    text_key: str = "text",
    max_bad_rows: int = MAX_BAD_ROWS,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> tuple[Calibration, dict[str, str]]:
    """Choose the threshold for a mean patch of `patch_bytes` bytes.

    Args:
        text: files, folders or globs, with entropies stored or not.
        model: the byte LM that gives entropies where none are stored.
        max_bytes: text to measure on.
        figure: a picture to write: mean patch size against threshold.
        text_key: the key or column that holds the text.
        max_bad_rows: bad rows and files that are passed over; one more is an error.
        max_row_bytes: a longer row is a bad one.

    Returns:
        The threshold, and the files of which nothing could be read, each with the reason.

    Raises:
        UserError: neither are there stored entropies nor a byte LM, the size is out of reach, or the figure's ending is
            not known.
    """
    forget_logged()
    place = choose_device(device)  # before anything is read
    if figure is not None:
        figure_format(figure)
    sources = [{"path": path, "text_key": text_key} for path in text]
    data = DataSettings.parse({"train": sources, "max_bad_rows": max_bad_rows, "max_row_bytes": max_row_bytes})
    patching = PatchSettings(mode="entropy", threshold=0.0)
    # In pieces as in its training, and as `blt entropies` reads it; entropies that are stored were computed so.
    byte_lm, context = (None, data.context) if model is None else load_byte_lm_and_context(model)
    bad = BadRows(data.max_bad_rows)
    sample = sample_entropies(
        byte_lm,
        data.train,
        context,
        patching,
        max_bytes,
        place,
        choose_dtype("auto", place),
        bad,
        data.max_row_bytes,
    )
    found = calibrate(sample.ids, sample.entropies, sample.position, patch_bytes, patching)
    if figure is not None:
        thresholds, sizes = patch_bytes_by_threshold(sample.ids, sample.entropies, sample.position, patching)
        write_threshold_figure(figure, thresholds, sizes, (found.threshold, found.mean_patch_bytes))
    origin = {"window": sample.window, "byte_lm": sample.byte_lm, "data": ", ".join(masked(text))}
    return found.model_copy(update=origin), bad.unread
