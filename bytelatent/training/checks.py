"""Checks of a training's settings, all before anything is opened: each complains early of what cannot be.

`check_settings` and `check_inputs` also run where a job is submitted, `check_machine` only where it trains.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from bytelatent.data import Batch, DataSettings, batches_once
from bytelatent.data.packing import ID_BYTES
from bytelatent.device import free_memory
from bytelatent.errors import UserError
from bytelatent.hub import Unreachable
from bytelatent.text import BadRows, find_files
from bytelatent.text.documents import TextError
from bytelatent.text.streams import is_remote
from bytelatent.training.distributed.plan import check_parallel
from bytelatent.training.float8 import check_float8
from bytelatent.training.optimizer import OptimizerSettings
from bytelatent.training.settings import TrainSettings
from bytelatent.weights import find_byte_lm


def check_settings(settings: TrainSettings, world_size: int, device: torch.device) -> None:
    """Check what this number of processes can do on such a device.

    Raises:
        UserError: the processes cannot divide the model, or cannot train in this way.
    """
    check_parallel(settings.parallel, settings.model, world_size)
    check_optimizer(settings.optimizer, world_size)
    check_cuda_graph(settings.cuda_graph, device, world_size)


def check_machine(settings: TrainSettings, device: torch.device, dtype: torch.dtype) -> None:
    """Check what this machine has: its device, installed libraries, free memory.

    Raises:
        UserError: something is missing.
    """
    check_float8(settings.float8, device, dtype)
    for name in settings.track:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder 'wandb', such as the library leaves, is no library
            raise UserError(
                f"track: {name} is not installed; pip install 'bytelatent[track]', or leave it out of track"
            )
    check_shuffle_buffer(settings.data)


def check_optimizer(settings: OptimizerSettings, world_size: int) -> None:
    """
    Raises:
        UserError: the optimizer is for one process, and there are several.
    """
    if world_size > 1 and settings.hash_gradients == "rows":
        raise UserError(f"optimizer.hash_gradients: rows is for one process, not for {world_size}; take dense")
    if world_size > 1 and settings.name == "muon":
        raise UserError(f"optimizer.name: muon is for one process, not for {world_size}; take adamw")


def check_cuda_graph(wanted: bool, device: torch.device, world_size: int = 1) -> None:
    """
    Raises:
        UserError: there is not one process on CUDA.
    """
    if wanted and (device.type != "cuda" or world_size > 1):
        here = f"{world_size} processes" if world_size > 1 else f"device {device.type}"
        raise UserError(f"cuda_graph: it is for one process on CUDA, not for {here}; do without it")


def check_shuffle_buffer(data: DataSettings) -> None:
    """Refuse a buffer that this machine's memory does not hold once it is full.

    Raises:
        UserError: it takes more than is free.
    """
    most, free = data.shuffle_buffer * data.context * ID_BYTES, free_memory()
    if free is not None and most > free:
        raise UserError(
            f"data.shuffle_buffer: {data.shuffle_buffer:,} pieces of up to data.context={data.context:,} bytes take up "
            f"to {most / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; take fewer"
        )


def check_inputs(settings: TrainSettings, whence: str) -> None:
    """Check, where a job is submitted, that the text and the byte LM exist; not what lies on other machines.

    Args:
        whence: is added to messages about relative paths: where the job looks for them.

    Raises:
        UserError: it names the setting.
    """
    check_sources(settings.data, whence, remote=False)
    if settings.entropy_model is None:
        return
    try:
        find_byte_lm(settings.entropy_model, weights=False, setting="entropy_model")
    except Unreachable:
        pass  # a hub that does not answer may have it
    except UserError as error:
        is_absolute = Path(settings.entropy_model).expanduser().is_absolute()
        raise UserError(f"{error}{'' if is_absolute else whence}") from None


def check_sources(data: DataSettings, whence: str = "", remote: bool = True) -> None:
    """Check that each source of text has files.

    Args:
        whence: as in `check_inputs`.
        remote: also look at sources on other machines.

    Raises:
        UserError: it names the setting.
    """
    for key, sources in (("train", data.train), ("valid", data.valid)):
        for source in sources:
            if is_remote(source.path) and not remote:
                continue
            try:
                find_files(source.path)
            except TextError as error:
                way_out = "; or train without held-out text: data.valid=null" if key == "valid" else ""
                where = "" if Path(source.path).expanduser().is_absolute() else whence
                raise UserError(f"data.{key}: {error.line}{way_out}{where}") from None


def check_text(data: DataSettings) -> None:
    """Check before the first step that each source has files, and that there is held-out text to read.

    Raises:
        UserError: it names the setting.
    """
    check_sources(data)
    bad_rows = BadRows(data.max_bad_rows, "data.max_bad_rows")
    limits = {"bad_rows": bad_rows, "max_row_bytes": data.max_row_bytes}
    if data.valid and next(batches_once(data.valid, data.context, data.batch_bytes, **limits), None) is None:
        raise UserError(f"data.valid: there is no text in {', '.join(repr(source.path) for source in data.valid)}")


def hints_about_batches(data: DataSettings, first: Batch) -> list[str]:
    """A line about each setting that another setting keeps from having its effect."""
    lines = []
    if data.batch_bytes < data.context:
        lines.append(
            f"data.batch_bytes={data.batch_bytes} is less than data.context={data.context}: no piece of a document is "
            f"longer than {data.batch_bytes} ids"
        )
    if data.batch_patches is not None and 2 * first.num_targets < data.batch_bytes:
        fills = data.batch_patches * data.batch_bytes // first.num_targets
        lines.append(
            f"data.batch_patches={data.batch_patches} is full before data.batch_bytes={data.batch_bytes} is: the first "
            f"batch holds {first.num_targets} ids; about data.batch_patches={fills} fills it"
        )
    return lines
