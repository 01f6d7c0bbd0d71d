"""Checks of a training's settings against processes, devices and files, all before anything is opened.

`check_settings` and `check_inputs` also run where a job is submitted, `check_machine` and `check_text` only where it
trains. What needs none of these is checked as settings are read; see `settings`.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from rich.filesize import decimal

from bytelatent.data import Batch, DataSettings, held_out_batches
from bytelatent.device import free_memory
from bytelatent.errors import UserError
from bytelatent.hub import Unreachable
from bytelatent.text import BadRows, find_files
from bytelatent.text.chat import DEFAULT_TEMPLATE, ChatTemplate
from bytelatent.text.documents import TextError
from bytelatent.text.streams import is_remote
from bytelatent.text.tokenizer import Tokenizer
from bytelatent.training.distributed.float8 import check_gain, expected_patches
from bytelatent.training.distributed.settings import Float8
from bytelatent.training.settings import TrainSettings
from bytelatent.vocab import BYTES
from bytelatent.weights import find_byte_lm, open_pretrained

FLOAT8_CAPABILITY = (8, 9)  # the first CUDA devices that multiply 8-bit floats


def check_settings(settings: TrainSettings, world_size: int, device: torch.device) -> None:
    """Check what this number of processes can do on such a device.

    Raises:
        UserError: the processes cannot divide the work, or cannot train in this way.
    """
    parallel, optimizer = settings.parallel, settings.optimizer
    tensor, data = parallel.tensor, world_size // parallel.tensor
    if world_size % tensor:
        raise UserError(
            f"parallel.tensor: {world_size} processes are no multiple of {tensor}; start another number of them"
        )
    if world_size > 1 and parallel.data == "hybrid" and data % (parallel.replicas or 1):
        raise UserError(
            f"parallel.replicas: {data} processes{' beside those of parallel.tensor' if tensor > 1 else ''} are no "
            f"multiple of {parallel.replicas}; start another number of them"
        )
    if world_size > 1 and optimizer.hash_gradients == "rows" and parallel.tables != "rows":
        raise UserError(
            f"optimizer.hash_gradients: rows of {world_size} processes need row-sharded tables, not parallel.tables="
            f"{parallel.tables}; take parallel.tables=rows, or optimizer.hash_gradients=dense"
        )
    check_cuda_graph(settings.cuda_graph, device, world_size)


def check_machine(settings: TrainSettings, device: torch.device, dtype: torch.dtype) -> None:
    """Check what this machine has: its device, installed libraries, free memory.

    Raises:
        UserError: something is missing.
    """
    check_float8(settings.float8, device, dtype)
    if settings.float8 is not None:
        num_patches = expected_patches(settings.data, settings.calibration and settings.calibration.patch_bytes)
        check_gain(settings.model, settings.float8, num_patches, settings.parallel)
    for name in settings.track:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder 'wandb', such as the library leaves, is no library
            raise UserError(
                f"track: {name} is not installed; pip install 'bytelatent[track]', or leave it out of track"
            )
    data, free = settings.data, free_memory()
    most = data.shuffle_buffer * data.context * BYTES.dtype.itemsize  # once it is full
    if free is not None and most > free:
        raise UserError(
            f"data.shuffle_buffer: {data.shuffle_buffer:,} pieces of up to data.context={data.context:,} ids take up "
            f"to {decimal(most)}, and {decimal(free)} are free; take fewer"
        )


def check_cuda_graph(wanted: bool, device: torch.device, world_size: int = 1) -> None:
    """Check that a graph, if it is wanted, is for one process on CUDA.

    Raises:
        UserError: it is not.
    """
    if wanted and (device.type != "cuda" or world_size > 1):
        here = f"{world_size} processes" if world_size > 1 else f"device {device.type}"
        raise UserError(f"cuda_graph: it is for one process on CUDA, not for {here}; do without it")


def check_float8(float8: Float8 | None, device: torch.device, dtype: torch.dtype) -> None:
    """Check that products in 8-bit floats, if they are wanted, can be computed here.

    Raises:
        UserError: the device or the dtype does not support them, or torchao is not installed.
    """
    if float8 is None:
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FLOAT8_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise UserError(
            f"float8: {name} does not multiply 8-bit floats (an NVIDIA device of compute capability "
            f"{'.'.join(map(str, FLOAT8_CAPABILITY))} or later does, such as L4, H100); leave it out: float8=null"
        )
    if dtype != torch.bfloat16:
        raise UserError("float8: its products give bfloat16; take dtype=bfloat16, or leave it out: float8=null")
    if find_spec("torchao") is None:
        raise UserError("float8 needs torchao: pip install 'bytelatent[fp8]'")


def check_inputs(settings: TrainSettings, whence: str) -> None:
    """Check, where a job is submitted, that the text and the named models exist; not what lies on other machines.

    Args:
        whence: is added to messages about relative paths: where the job looks for them.

    Raises:
        UserError: it names the setting.
    """
    check_sources(settings.data, whence, remote=False)
    if settings.data.tokenizer is not None:
        Tokenizer.read(settings.data.tokenizer, "data.tokenizer")
    for setting, find in (("init", open_pretrained), ("entropy_model", find_byte_lm)):
        source = getattr(settings, setting)
        if source is None:
            continue
        try:
            find(source, weights=False, setting=setting)
        except Unreachable:
            pass  # a hub that does not answer may have it
        except UserError as error:
            is_absolute = Path(source).expanduser().is_absolute()
            raise UserError(f"{error}{'' if is_absolute else whence}") from None


def check_sources(data: DataSettings, whence: str = "", remote: bool = True) -> None:
    """Check that each source of text has files.

    Args:
        whence: as in `check_inputs`.
        remote: also check sources on other machines.

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
    template = DEFAULT_TEMPLATE
    if data.chat_template is not None and Path(data.chat_template).exists():  # else the run may have a copy
        template = ChatTemplate.read(data.chat_template, "data.chat_template")
    bad_rows = BadRows(data.max_bad_rows, "data.max_bad_rows")
    if data.valid and next(held_out_batches(data, chat_template=template, bad_rows=bad_rows), None) is None:
        where = ", ".join(repr(source.path) for source in data.valid)
        raise UserError(f"data.valid: there is no text in {where}: {bad_rows.why_no_text}")


def hints_about_batches(data: DataSettings, first: Batch) -> list[str]:
    """A line about each setting that another setting keeps from having its effect."""
    lines = []
    ids = "" if data.batch_ids == data.batch_bytes else f", {data.batch_ids} ids,"
    if data.batch_ids < data.context:
        lines.append(
            f"data.batch_bytes={data.batch_bytes}{ids} is less than data.context={data.context}: no piece of a "
            f"document is longer than {data.batch_ids} ids"
        )
    if data.patch_slots is not None and 2 * first.num_ids < data.batch_ids:
        fills = data.patch_slots * data.batch_bytes // first.num_ids
        lines.append(
            f"data.batch_patches={data.patch_slots} is full before data.batch_bytes={data.batch_bytes} is: the first "
            f"batch holds {first.num_ids} ids; about data.batch_patches={fills} fills it"
        )
    return lines


def how_to_save_memory(settings: TrainSettings) -> str:
    """The settings to change where memory is not enough."""
    data, accumulation = settings.data, settings.optimizer.accumulation
    return (
        f"lower data.batch_bytes (now {data.batch_bytes}; raise optimizer.accumulation, now {accumulation}, to keep "
        f"the bytes of a step) or data.batch_patches (now {data.patch_slots}), or set "
        f"parallel.activation_checkpointing (now {settings.parallel.activation_checkpointing}) to selective or full"
    )
