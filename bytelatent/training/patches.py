"""Before a BLT trains: its byte LM, and the threshold for the wanted patch size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bytelatent.credentials import masked
from bytelatent.data import DataSettings, Patcher, Piece, StoredCheck, cut, groups_of, stream_of
from bytelatent.data.settings import SourceSettings
from bytelatent.device import choose_device, choose_dtype
from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.hub import Unreachable
from bytelatent.inference import FastEntropies
from bytelatent.model import ByteLM
from bytelatent.patching import Calibration, PatchSettings, calibrate, mean_patch_bytes
from bytelatent.progress import Progress
from bytelatent.text import MAX_ROW_BYTES, BadRows, Stored, find_files, read_documents
from bytelatent.weights import find_byte_lm, fingerprint

SPREAD = 8  # text that is read for a sample, as a multiple of the sample
SAMPLE_GROUP = 4096  # ids that the byte LM reads at once: few, so that a slow machine can stop in time


def must_have_byte_lm(source: str, whence: str = "") -> None:
    """Complain where there is no byte LM, before there is work for it; one on a hub that does not answer may be there.

    Args:
        whence: is said of relative paths: where they are looked for.

    Raises:
        UserError: it names the setting.
    """
    try:
        find_byte_lm(source, weights=False, setting="entropy_model")
    except Unreachable:
        pass
    except UserError as error:
        raise UserError(f"{error}{'' if Path(source).expanduser().is_absolute() else whence}") from None


def calibrate_on(
    byte_lm: ByteLM | None,
    data: DataSettings,
    wanted_patch_bytes: float,
    rule: PatchSettings,
    text_bytes: int,
    device: str = "auto",
    dtype: str = "auto",
    limit: float | None = None,
) -> Calibration:
    """The threshold for a mean patch size on a sample of the training text, checked on the validation text.

    Args:
        byte_lm: gives the entropies; None where they are stored with the text.
        data: the sources.
        wanted_patch_bytes: mean bytes a patch.
        rule: the entropy rule; its threshold does not matter.
        text_bytes: how much text to measure on.
        limit: seconds after which the rest of a sample is left out, of the training text and of the validation text.
    """

    def sampled(sources: list[SourceSettings], what: str) -> Sample:
        bad = BadRows(data.max_bad_rows, "data.max_bad_rows")
        rows = bad, data.max_row_bytes
        with Progress(what, text_bytes, limit) as progress:
            return sample_entropies(byte_lm, sources, data.context, rule, text_bytes, device, dtype, *rows, progress)

    sample = sampled(data.train, "calibrating")
    found = calibrate(sample.ids, sample.entropies, sample.position, wanted_patch_bytes, rule)
    held_out = None
    if data.valid:
        chosen = rule.model_copy(update={"threshold": found.threshold})
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
    rule: PatchSettings,
    text_bytes: int,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    bad_rows: BadRows | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    progress: Progress | None = None,
) -> Sample:
    """Entropies of about `text_bytes` of text: those stored with it, else the byte LM's.

    Args:
        progress: is shown how far it is; where its time is up, the rest of the text is left out.

    Raises:
        UserError: there is no text, or neither are there stored entropies nor a byte LM.
    """
    place = choose_device(device)
    mark = fingerprint(byte_lm) if byte_lm is not None else None
    precision = choose_dtype(dtype, place)
    byte_lm = byte_lm.to(place) if byte_lm is not None else None
    patcher = Patcher(rule, byte_lm, precision, mark, FastEntropies.where_possible(byte_lm, place, precision))
    stored: list[Stored] = []
    check = StoredCheck(patcher)

    def seen(found: Stored, file: str) -> None:
        if found.rule is None:  # starts say nothing of entropies
            check(found, file)
            stored.append(found)

    chosen = sample_pieces(sources, text_bytes, context, seen, bad_rows, max_row_bytes)
    progress = progress or Progress("calibrating")
    progress.total = sum(map(len, chosen))
    pieces: list[Piece] = []
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
) -> list[Piece]:
    """About `text_bytes` of text from all over the sources, by weight: the same pieces each time."""
    random = np.random.default_rng(0)
    total = sum(source.weight for source in sources)
    sample: list[Piece] = []
    for source in sources:
        wanted = text_bytes * source.weight / total
        read, pieces = 0, []
        for file in random.permutation(find_files(source.path)):
            for _, document in read_documents(str(file), source.text_key, check, bad_rows, max_row_bytes=max_row_bytes):
                pieces.extend(cut(replace(document, starts=None), context))
                read += len(document.text)
                if read >= SPREAD * wanted:
                    break
            if read >= SPREAD * wanted:
                break
        random.shuffle(pieces)  # neighbours are alike: a sample from a wider stretch says more
        sizes = np.cumsum([len(piece) for piece in pieces])
        sample.extend(pieces[: int(np.searchsorted(sizes, wanted)) + 1])
    if not sample:
        if bad_rows is not None:
            bad_rows.must_have_read()
        raise UserError("data: there is no text to calibrate on: every document is empty")
    random.shuffle(sample)  # so that any part of it is of all sources
    return sample


def write_calibration(run: Path, calibration: Calibration) -> None:
    with whole_file(run / "calibration.json") as aside:
        aside.write_text(calibration.model_dump_json(indent=1), encoding="utf-8")
