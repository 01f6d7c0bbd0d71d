"""The byte LM's entropies stored beside text, by one process or by many."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bytelatent.command_line import ParsedSettings
from bytelatent.commands.options import EntropiesSettings
from bytelatent.data.entropies import EntropySettings, Summary, store_entropies
from bytelatent.device import choose_device, choose_dtype
from bytelatent.errors import Interrupted, UserError, need
from bytelatent.inference import FastEntropies
from bytelatent.model import ByteLM
from bytelatent.patching import PatchSettings
from bytelatent.progress import Progress
from bytelatent.report.text import amount_of_bytes
from bytelatent.terminal import print_line
from bytelatent.weights import fingerprint, load_byte_lm_and_context

BATCH_BYTES = 131_072  # fills a data-centre GPU
BATCH_BYTES_ELSEWHERE = 16_384
BATCH_BYTES_WITHOUT_WINDOW = 2048  # there the mask takes time by the square of it


@dataclass(frozen=True)
class Share:
    """This process among those that divide the files."""

    rank: int
    world_size: int
    local_rank: int = 0  # among those of this machine


def run(settings: EntropiesSettings) -> None:
    need("entropies", "pyarrow")
    print_line(line_about(store_beside(settings), settings.out))


def store_beside(given: EntropiesSettings) -> Summary:
    """Store the entropies of a byte LM, or its patch starts, beside the text.

    Raises:
        UserError: the model, the text, the folder or a value is wrong.
        Interrupted: Ctrl-C.
    """
    part = part_of(given.rank, given.world_size, os.environ)
    place = choose_device(_own_device(given.device, part))
    byte_lm, trained_context = load_byte_lm_and_context(given.model, dtype="float32")
    byte_lm = byte_lm.to(place).eval()
    context = trained_context if given.context is None else given.context
    batch_bytes = given.batch_bytes
    if batch_bytes is None:
        batch_bytes = max(context, batch_bytes_for(byte_lm, place))
    values: dict[str, Any] = given.model_dump(
        include={"text_key", "max_bad_rows", "max_row_bytes", "dtype", "reset_at_newline"}
    )
    values |= {"context": context, "batch_bytes": batch_bytes, "patching": _patching(given.starts, given.patching)}
    settings = EntropySettings.parse(values, "entropies")
    with Progress("entropies", bar=part.rank == 0) as progress:  # bars of several processes would overwrite each other
        try:
            return store_entropies(
                byte_lm,
                fingerprint(byte_lm),
                given.text,
                given.out,
                settings,
                part.rank,
                part.world_size,
                entropies_of=FastEntropies.where_possible(byte_lm, place, choose_dtype(settings.dtype, place)),
                progress=progress,
            )
        except KeyboardInterrupt:
            if not any(Path(given.out).expanduser().rglob("*.parquet")):
                raise Interrupted(f"no file of '{given.out}' is finished yet; the same command begins again") from None
            raise Interrupted(f"finished files are in '{given.out}'; the same command resumes") from None


def batch_bytes_for(byte_lm: ByteLM, device: torch.device) -> int:
    """As many ids as keep the device busy."""
    if device.type == "cuda":
        return BATCH_BYTES
    return BATCH_BYTES_WITHOUT_WINDOW if byte_lm.settings.window is None else BATCH_BYTES_ELSEWHERE


def line_about(summary: Summary, out: str) -> str:
    """The last line of the command."""
    if summary.num_shards == 0:
        return "nothing to do: there are more processes than files"
    if summary.num_skipped == summary.num_shards:
        return f"nothing left to do: {summary.num_shards} files stand in {out}"
    mean = "no text" if summary.mean_entropy is None else f"mean entropy {summary.mean_entropy:.4f} nats"
    speed = amount_of_bytes(summary.num_bytes / max(summary.seconds, 1e-9))
    return f"{summary.num_bytes:,} bytes in {summary.seconds:.1f} s ({speed}/s), {mean} -> {out}"


def part_of(rank: int | None, world_size: int | None, environment: Mapping[str, str]) -> Share:
    """The part that is this process's: as given, else as torchrun or SLURM say, else all.

    The tasks of a job step (`srun`) divide the files, and so do the jobs of an array. Outside a job step, as in a batch
    script, one process runs, however many tasks the job may have.

    Raises:
        UserError: only one of rank and world size is given, or they do not go together.
    """

    def number(name: str, otherwise: int) -> int:
        try:
            return int(environment.get(name) or otherwise)
        except ValueError:
            raise UserError(f"{name}: '{environment[name]}' is no number; give --rank and --world-size") from None

    local_rank = number("LOCAL_RANK", number("SLURM_LOCALID", 0))
    if rank is not None or world_size is not None:
        if rank is None or world_size is None:
            raise UserError(
                "--rank and --world-size belong together: --rank 0 --world-size 4 is the first of four parts"
            )
        part = Share(rank, world_size, local_rank)
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        part = Share(number("RANK", 0), number("WORLD_SIZE", 1), local_rank)
    else:
        is_step = environment.get("SLURM_STEP_ID") and environment.get("SLURM_PROCID")
        tasks = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1)) if is_step else 1
        task, jobs = number("SLURM_PROCID", 0) if is_step else 0, number("SLURM_ARRAY_TASK_COUNT", 1)
        first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
        job = (number("SLURM_ARRAY_TASK_ID", first) - first) // step if jobs > 1 else 0
        part = Share(job * tasks + task, jobs * tasks, local_rank)
    if not 0 <= part.rank < part.world_size:
        raise UserError(
            f"rank {part.rank} of {part.world_size}: ranks are numbered from 0; give --rank and --world-size"
        )
    return part


def _own_device(name: str, part: Share) -> str:
    """Each process of a machine takes a GPU of its own."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{part.local_rank % torch.cuda.device_count()}"
    return name


def _patching(starts: float | None, patching: str | None) -> PatchSettings | None:
    if starts is not None and patching is not None:
        raise UserError("--starts and --patching both name patching settings; give one of them")
    if starts is not None:
        return PatchSettings.parse({"mode": "entropy", "threshold": starts}, "--starts")
    if patching is None:
        return None
    given = ParsedSettings(PatchSettings)
    given.lay_over([part.strip() for part in patching.split(",")])
    return PatchSettings.parse(given.values, "--patching")
