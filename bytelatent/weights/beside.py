"""`bytelatent.json`: what another format has no room for, kept beside it.

A model that is written in another format and read again is the same to the last setting: the context it was trained
with, its calibration, where it comes from. The other format's own files stay the authority: if they were changed since,
what stands beside them is left out.
"""

from collections.abc import Callable
from pathlib import Path

from bytelatent.errors import UserError
from bytelatent.model import ModelSettings
from bytelatent.patching import PatchSettings
from bytelatent.weights.safetensors_io import read_json, write_json
from bytelatent.weights.stored_model import Config

Expressed = tuple[ModelSettings, PatchSettings | None, int]  # the last is the context

FILE = "bytelatent.json"


def remember(folder: Path, config: Config, name: str = FILE) -> None:
    write_json(folder / name, config.shown())


def recall(
    folder: Path,
    found: Config,
    as_expressed: Callable[[Config], Expressed],
    name: str = FILE,
) -> Config:
    """What we wrote beside, if it says the same as the other format does; else what was found there.

    Args:
        found: as the other format's files say it.
        as_expressed: what is left of a configuration that is written in the other format and read again.
    """
    if not (folder / name).is_file():
        return found
    earlier = Config.parse(read_json(folder / name), where=str(folder / name))
    if earlier.model.kind != found.model.kind or (earlier.patching is None) != (found.patching is None):
        return found
    try:
        same = as_expressed(earlier) == (found.model, found.patching, found.context)
    except UserError:  # it cannot be expressed at all, so it was not written for this
        same = False
    return earlier if same else found
