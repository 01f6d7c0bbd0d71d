"""`blt export`: the model of any checkpoint, also of one that several processes wrote in parts."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from bytelatent.commands.options import ExportSettings
from bytelatent.errors import UserError
from bytelatent.files import find_corruption
from bytelatent.run_folder import checkpoints_of, newest_checkpoint
from bytelatent.terminal import print_line
from bytelatent.text.chat import ChatTemplate
from bytelatent.text.tokenizer import TOKENIZER
from bytelatent.training.checkpoint.storage import open_stored
from bytelatent.weights import BYTE_LM, NATIVE, check_target, is_run, open_pretrained, origin_of_run, write_model

LOGGER = logging.getLogger(__name__)


def run(settings: ExportSettings) -> None:
    print_line(str(export_checkpoint(settings.run, settings.step, settings.out)))


def export_checkpoint(run: str, step: int | None, out: str) -> Path:
    """Write a checkpoint's model in our format, in the memory of its largest tensor, and read it before it appears.

    Args:
        step: the steps that were done; None for the last whole checkpoint.
        out: the folder to write, which does not exist or is empty.

    Raises:
        UserError: there is no such checkpoint, or it is corrupt; or the folder is not empty.
    """
    folder, target = Path(run), check_target(Path(out), "native")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"'{target}' holds a model already; name another folder, or move it away")
    checkpoint, lines = _checkpoint(folder, step)
    stored = open_stored(checkpoint / "state")
    byte_lm = NATIVE.open(folder / BYTE_LM) if (folder / BYTE_LM).is_dir() else None
    config = stored.config.model_copy(update={"origin": origin_of_run(folder, checkpoint, stored.config.origin)})
    tokenizer = folder / TOKENIZER if (folder / TOKENIZER).is_file() else None
    stored = replace(stored, config=config, folder=folder, byte_lm=byte_lm, tokenizer=tokenizer)
    stored = replace(stored, chat_template=ChatTemplate.find(folder))
    for line in lines:
        LOGGER.warning(line)
    LOGGER.info(stored.in_a_line())

    def compare(aside: Path) -> None:
        again = open_pretrained(aside)
        for name, tensor in stored.tensors.items():
            if not torch.equal(again.tensors[name].load(), tensor.load()):
                raise UserError(f"'{target}': {name} is not as '{checkpoint}' has it; is the disk in order? Try again")

    write_model(stored, target, "native", check=compare)
    return target


def _checkpoint(run: Path, step: int | None) -> tuple[Path, list[str]]:
    """A run's checkpoint, and a line about each later one that is corrupt."""
    if not is_run(run):
        raise UserError(f"'{run}' is no run; name the folder of one, as in blt export runs/mine --out FOLDER")
    if step is None:
        return newest_checkpoint(run)
    known = checkpoints_of(run)
    if (found := known.get(step)) is None:
        raise UserError(f"'{run}' has no checkpoint after step {step}; it has {', '.join(map(str, known)) or 'none'}")
    if (why := find_corruption(found)) is not None:
        raise UserError(f"'{found}' is corrupt ({why}); name another step, or leave it out for the last whole one")
    return found, []
