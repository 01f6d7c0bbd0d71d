"""Before a BLT trains: the threshold for the wanted patch size, measured on a sample of its text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from bytelatent.credentials import masked
from bytelatent.data import (
    DataSettings,
    Patcher,
    Piece,
    SourceSettings,
    StoredCheck,
    groups_of,
    split_document,
    stream_of,
)
from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.inference import FastEntropies
from bytelatent.model import ByteLM
from bytelatent.patching import Calibration, PatchSettings, calibrate, mean_patch_bytes
from bytelatent.progress import Progress
from bytelatent.text import MAX_ROW_BYTES, BadRows, Stored, find_files, must_have_read, read_documents
from bytelatent.text.chat import DEFAULT_TEMPLATE, ChatTemplate
from bytelatent.training.settings import CalibrationSettings
from bytelatent.weights import fingerprint

CALIBRATION = "calibration.json"
SPREAD = 8  # text that is read for a sample, as a multiple of the sample
SAMPLE_GROUP = 4096  # ids that the byte LM reads at once: few, so that a slow machine can stop in time


def calibrate_on(
    byte_lm: ByteLM | None,
    data: DataSettings,
    settings: CalibrationSettings,
    patching: PatchSettings,
    device: torch.device,
    dtype: torch.dtype,
    limit: float | None = None,
    chat_template: ChatTemplate = DEFAULT_TEMPLATE,
) -> Calibration:
    """The threshold for a mean patch size on a sample of the training text, checked on the validation text.

    Args:
        byte_lm: gives the entropies; None where they are stored with the text.
        data: the sources.
        patching: of mode entropy; its threshold does not matter.
        device, dtype: of the byte LM.
        limit: seconds after which the rest of a sample is left out, of the training text and of the validation text.
        chat_template: writes conversations.
    """

    def sampled(sources: list[SourceSettings], what: str) -> Sample:
        rows = BadRows(data.max_bad_rows, "data.max_bad_rows"), data.max_row_bytes
        how = {"what": what, "limit": limit, "chat_template": chat_template}
        text_bytes = settings.text_bytes
        return sample_entropies(byte_lm, sources, data.context, patching, text_bytes, device, dtype, *rows, **how)

    sample = sampled(data.train, "calibrating")
    found = calibrate(sample.ids, sample.entropies, sample.position, settings.patch_bytes, patching)
    held_out = None
    if data.valid:
        chosen = patching.model_copy(update={"threshold": found.threshold})
        valid = sampled(data.valid, "calibrating, held-out text")
        held_out = mean_patch_bytes(valid.ids, valid.entropies, valid.position, chosen)
    return found.model_copy(
        update={
            "held_out_mean_patch_bytes": held_out,
            "window": sample.window,
            "data": ", ".join(masked(source.path) for source in data.train),
            "byte_lm": sample.byte_lm,
        }
    )


@dataclass(frozen=True)
class Sample:
    """Text from all over the sources, packed, with its entropies."""

    ids: torch.Tensor  # [T]
    position: torch.Tensor  # [T]
    entropies: torch.Tensor  # [T] nats
    byte_lm: str  # fingerprint of the byte LM that they come from
    window: int | None


def sample_entropies(
    byte_lm: ByteLM | None,
    sources: Sequence[SourceSettings],
    context: int,
    patching: PatchSettings,
    text_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    bad_rows: BadRows | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    what: str = "calibrating",
    limit: float | None = None,
    chat_template: ChatTemplate = DEFAULT_TEMPLATE,
) -> Sample:
    """Entropies of about `text_bytes` of text: those stored with it, else the byte LM's.

    Args:
        device, dtype: of the byte LM.
        what: in front of the progress bar.
        limit: seconds after which the rest of the text is left out.
        chat_template: writes conversations.

    Raises:
        UserError: there is no text, or there are neither stored entropies nor a byte LM.
    """
    mark = fingerprint(byte_lm) if byte_lm is not None else None
    byte_lm = byte_lm.to(device) if byte_lm is not None else None
    patcher = Patcher(patching, byte_lm, dtype, mark, FastEntropies.where_possible(byte_lm, device, dtype))
    stored: list[Stored] = []
    check = StoredCheck(patcher)

    def seen(found: Stored, file: str) -> None:
        if found.patching is None:  # stored starts hold no entropies
            check(found, file)
            stored.append(found)

    pieces: list[Piece] = []
    with Progress(what, limit=limit) as progress:
        chosen = sample_pieces(sources, text_bytes, context, seen, bad_rows, max_row_bytes, chat_template)
        progress.total = sum(map(len, chosen))
        for group in progress.within(groups_of(chosen, SAMPLE_GROUP)):
            pieces.extend(patcher(group))
            progress.advance(sum(map(len, group)))
    stream = stream_of(pieces)
    entropies = torch.from_numpy(np.concatenate([p.entropies for p in pieces if p.entropies is not None]))
    if byte_lm is not None:
        return Sample(stream.ids, stream.position, entropies, str(mark), byte_lm.settings.window)
    origin = stored[0] if stored else None
    return Sample(
        stream.ids, stream.position, entropies, origin.byte_lm if origin else "", origin.window if origin else None
    )


def sample_pieces(
    sources: Sequence[SourceSettings],
    text_bytes: int,
    context: int,
    check: Callable[[Stored, str], None] = lambda stored, file: None,
    bad_rows: BadRows | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    chat_template: ChatTemplate = DEFAULT_TEMPLATE,
) -> list[Piece]:
    """About `text_bytes` of text from all over the sources, by weight: the same pieces each time."""
    random = np.random.default_rng(0)
    total = sum(source.weight for source in sources)
    sample: list[Piece] = []
    for source in sources:
        wanted = text_bytes * source.weight / total
        read, pieces = 0, []
        files = map(str, random.permutation(find_files(source.path)))
        how = {"max_row_bytes": max_row_bytes, "chat": source.chat(chat_template)}
        found = (read_documents(f, source.text_key, check, bad_rows, **how) for f in files)
        for _, document in chain.from_iterable(found):
            pieces.extend(split_document(replace(document, starts=None), context))
            read += len(document.text)
            if read >= SPREAD * wanted:
                break
        random.shuffle(pieces)  # neighbours are alike: a wider stretch gives a better sample
        sizes = np.cumsum([len(piece) for piece in pieces])
        sample.extend(pieces[: int(np.searchsorted(sizes, wanted)) + 1])
    if not sample:
        bad_rows = bad_rows or BadRows(0)
        must_have_read(bad_rows.unread)
        raise UserError(f"data: there is no text to calibrate on: {bad_rows.why_no_text}")
    random.shuffle(sample)  # so that any part of it is of all sources
    return sample


def write_calibration(run: Path, calibration: Calibration) -> None:
    """Write what was measured into the run's folder."""
    with whole_file(run / CALIBRATION) as aside:
        aside.write_text(calibration.model_dump_json(indent=1), encoding="utf-8")


def read_calibration(run: Path) -> Calibration | None:
    """What an earlier start of the run measured; None if there was none.

    Raises:
        UserError: the file is corrupt.
    """
    path = run / CALIBRATION
    try:
        return Calibration.model_validate_json(path.read_text(encoding="utf-8-sig")) if path.is_file() else None
    except (ValidationError, UnicodeDecodeError):
        raise UserError(f"'{path}' is corrupt; remove it, and the same command calibrates again") from None
