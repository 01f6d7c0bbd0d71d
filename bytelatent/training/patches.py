"""Before a BLT trains: its byte LM, and the threshold for the wanted patch size."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bytelatent.data import DataSettings, Patcher, Piece, cut, patch_in_groups, stream_of
from bytelatent.data.settings import SourceSettings
from bytelatent.device import choose_device, choose_dtype
from bytelatent.errors import UserError
from bytelatent.files import whole_file
from bytelatent.interop import fingerprint
from bytelatent.model import ByteLM
from bytelatent.patching import Calibration, PatchSettings, calibrate, mean_patch_bytes
from bytelatent.text import Document, find_files, read_documents

SPREAD = 8  # text that is read for a sample, as a multiple of the sample


def calibrate_on(
    byte_lm: ByteLM,
    data: DataSettings,
    wanted_patch_bytes: float,
    rule: PatchSettings,
    text_bytes: int,
    device: str = "auto",
    dtype: str = "auto",
) -> Calibration:
    """The threshold for a mean patch size on a sample of the training text, checked on the validation text.

    Args:
        byte_lm: gives the entropies.
        data: the sources.
        wanted_patch_bytes: mean bytes a patch.
        rule: the entropy rule; its threshold does not matter.
        text_bytes: how much text to measure on.
    """
    place = choose_device(device)
    patcher = Patcher(rule, byte_lm.to(place), choose_dtype(dtype, place))
    sample = patch_in_groups(patcher, sample_pieces(data.train, text_bytes, data.context))
    stream, entropies = stream_of(sample), _entropies(sample)
    found = calibrate(stream.ids, entropies, stream.position, wanted_patch_bytes, rule)
    held_out = None
    if data.valid:
        chosen = rule.model_copy(update={"threshold": found.threshold})
        pieces = patch_in_groups(patcher, sample_pieces(data.valid, text_bytes, data.context))
        stream = stream_of(pieces)
        held_out = mean_patch_bytes(stream.ids, _entropies(pieces), stream.position, chosen)
    return found.model_copy(
        update={
            "held_out_mean_patch_bytes": held_out,
            "window": byte_lm.settings.window,
            "data": ", ".join(source.path for source in data.train),
            "byte_lm": fingerprint(byte_lm),
        }
    )


def sample_pieces(sources: Sequence[SourceSettings], text_bytes: int, context: int) -> list[Piece]:
    """About `text_bytes` of text from all over the sources, by weight: the same pieces each time."""
    random = np.random.default_rng(0)
    total = sum(source.weight for source in sources)
    sample: list[Piece] = []
    for source in sources:
        wanted = text_bytes * source.weight / total
        read, pieces = 0, []
        for file in random.permutation(find_files(source.path)):
            for _, document in read_documents(str(file), source.text_key):
                pieces.extend(cut(Document(document.text), context))
                read += len(document.text)
                if read >= SPREAD * wanted:
                    break
            if read >= SPREAD * wanted:
                break
        random.shuffle(pieces)  # neighbours are alike: a sample from a wider stretch says more
        sizes = np.cumsum([len(piece) for piece in pieces])
        sample.extend(pieces[: int(np.searchsorted(sizes, wanted)) + 1])
    if not sample:
        raise UserError("data: there is no text to calibrate on: every document is empty")
    return sample


def _entropies(pieces: Sequence[Piece]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([p.entropies for p in pieces if p.entropies is not None]))


def write_calibration(run: Path, calibration: Calibration) -> None:
    with whole_file(run / "calibration.json") as aside:
        aside.write_text(calibration.model_dump_json(indent=1), encoding="utf-8")
