"""What `scale.py measure` does: steps of the trainer on random text, one line of a table for each configuration."""

import gc
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_trace import Communication, communication_of, print_kernels
from scale_plans import Configuration
from torch.cuda.nccl import version as nccl_version

from bytelatent.data import Batch
from bytelatent.device import autocast, choose_dtype, peak_flops, peak_memory
from bytelatent.errors import UserError
from bytelatent.model.flops import training_flops
from bytelatent.model.loss import cross_entropy
from bytelatent.training import TrainSettings
from bytelatent.training import trainer as loop
from bytelatent.training.checkpoint.manager import CheckpointManager, TrainState
from bytelatent.training.checks import check_float8, check_settings
from bytelatent.training.distributed.float8 import expected_patches
from bytelatent.training.distributed.parallelize import ParallelPlan, build_parallel_model, make_plan
from bytelatent.training.distributed.ranks import Ranks, open_ranks
from bytelatent.training.gradients import Gradients
from bytelatent.training.optimizer import build_optimizer
from bytelatent.training.profiling.measure import DOCUMENT, PROFILED_CALLS, num_patches, random_batch, wait_for
from bytelatent.weights import Config

STEPS_A_CHECKPOINT = 1000  # the trainer's default
PATIENCE = timedelta(minutes=2)  # a rank that does not answer for so long hangs in a collective that another one left


class Same:
    """In place of a loader: always the same batch."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}


class Training:
    """A model in training as the trainer trains it, with random weights."""

    def __init__(
        self,
        configuration: Configuration,
        ranks: Ranks,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool,
    ):
        self.settings = settings = configuration.settings
        self.device = device
        check_float8(settings.float8, device, dtype)
        check_settings(settings, ranks.world_size, device)
        self.plan = plan_of(configuration.plan, settings, ranks, device)
        patches = expected_patches(settings.data, settings.calibration and settings.calibration.patch_bytes)
        model = build_parallel_model(
            settings.model, self.plan, device, dtype, compiled, settings.float8, num_patches=patches
        )
        fill(model)
        stream, targets = random_batch(settings.data.batch_bytes, device, seed=self.plan.data_rank)
        self.num_patches = num_patches(stream) or 1
        batch = Batch(stream, targets, len(targets), len(targets), self.num_patches)
        optimizer = build_optimizer(model, settings.optimizer)
        self.state = TrainState(model, optimizer, Same(batch))  # pyright: ignore[reportArgumentType]

        def loss(batch: Batch) -> torch.Tensor:
            with autocast(device, dtype):
                return cross_entropy(model, batch)

        self.gradients = Gradients(loss, device)

    def step(self) -> None:
        loop.Trainer(self.settings, self.plan, self.state, self.gradients).train_step()

    def seconds(self, steps: int) -> float:
        """Of one step, the mean of so many."""
        wait_for(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        wait_for(self.device)
        return (time.perf_counter() - began) / steps

    def optimizer_seconds(self, steps: int) -> float:
        """Of the optimizer in a step, without clipping, the mean of so many."""
        self.plan.set_last_backward(self.state.model, True)
        self.gradients(next(self.state.loader), 1.0)
        self.plan.ranks.gather(None)
        wait_for(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            self.state.optimizer.step()
        wait_for(self.device)
        took = (time.perf_counter() - began) / steps
        self.state.optimizer.zero_grad(set_to_none=True)
        return took


def plan_of(name: str, settings: TrainSettings, ranks: Ranks, device: torch.device) -> ParallelPlan:
    """The trainer's plan; for one rank that is not `alone`, one of a mesh of this rank.

    Raises:
        UserError: the ranks cannot be divided so.
    """
    if name == "alone" and ranks.world_size > 1:
        raise UserError(f"alone is for one process; there are {ranks.world_size}")
    if name == "hybrid" and ranks.world_size < 4:
        raise UserError(f"hybrid is for four processes and more; there are {ranks.world_size}")
    if name == "alone" or ranks.world_size > 1 or settings.parallel.tensor > 1:
        return make_plan(settings.parallel, ranks, device)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (1, 1, 1), mesh_dim_names=("replicate", "shard", "tensor"))
    return ParallelPlan(settings.parallel, ranks, mesh, mesh["replicate", "shard"])


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Draw weights where they lie: for a clock they need not be those of one process."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        own: Any = parameter
        own = own.to_local() if hasattr(own, "to_local") else own
        own.fill_(1.0) if own.dim() == 1 else own.normal_(std=parameter.shape[-1] ** -0.5)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        utilisation: model FLOPs of a step against the bfloat16 peak that the maker states; None: not known.
        first: seconds of the first step, which compiles.
        optimizer: seconds of a step that are the optimizer's, measured alone.
    """

    gpus: int
    configuration: Configuration
    dtype: torch.dtype
    seconds: float
    utilisation: float | None
    memory: int
    communication: Communication | None
    first: float
    optimizer: float

    HEAD = (
        "| GPUs | model | plan | hash tables | products | bytes a GPU | ms a step | bytes/s a GPU | of the peak | GiB "
        "| communicating | of it exposed | nothing runs | first step, s | optimizer, ms |"
    )

    def line(self) -> str:
        of, spent = self.configuration, self.communication
        shares = ["-"] * 3
        if spent is not None and spent.span > 0:
            shares = [f"{seconds / spent.span:.1%}" for seconds in (spent.total, spent.exposed, spent.idle)]
        cells = [
            *first_cells(self.gpus, of, self.dtype),
            f"{self.seconds * 1e3:.1f}",
            f"{of.size / self.seconds:,.0f}",
            "-" if self.utilisation is None else f"{self.utilisation:.1%}",
            f"{self.memory / 2**30:.1f}",
            *shares,
            f"{self.first:.0f}",
            f"{self.optimizer * 1e3:.1f}",
        ]
        return f"| {' | '.join(cells)} |"


def first_cells(gpus: int, of: Configuration, dtype: torch.dtype) -> list[str]:
    """What a row of `Row.HEAD` says of a configuration before anything is measured."""
    assert of.model.ngram_hash is not None
    tables = f"{of.tables}, {of.model.ngram_hash.vocab_size:,} a table"
    return [str(gpus), of.name, of.words, tables, of.products(dtype), f"{of.size:,}"]


def failed_row(head: str, cells: list[str]) -> str:
    """A row that ends in an error: nothing is in the cells after it."""
    width = len(head.strip("| ").split(" | "))
    return f"| {' | '.join([*cells, *['-'] * (width - len(cells))])} |"


def underline(head: str) -> str:
    """The second line of a table."""
    return "| " + " | ".join("---" for _ in head.strip("| ").split(" | ")) + " |"


def measured(training: Training, configuration: Configuration, steps: int, ranks: Ranks, dtype: torch.dtype) -> Row:
    device = training.device
    first = training.seconds(1)
    training.seconds(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = max(ranks.gather(training.seconds(steps)))
    try:
        spent = communication_of(training.step, device)
    except (RuntimeError, ValueError) as error:  # the clock's answer stands without it
        print(f"{ranks.name}: no trace: {error}", file=sys.stderr, flush=True)
        spent = None
    every = [astuple(found) for found in ranks.gather(spent) if found is not None]
    if every:
        spent = Communication(*(sum(values) / len(every) for values in zip(*every, strict=True)))
    peak, batch = peak_flops(device, dtype), training.settings.data.batch_bytes
    flops = training_flops(configuration.model, batch / training.num_patches, min(batch, DOCUMENT))
    return Row(
        ranks.world_size,
        configuration,
        dtype,
        seconds,
        None if peak is None else flops * configuration.size / seconds / peak,
        max(ranks.gather(peak_memory(device if device.type == "cuda" else None))),
        spent,
        first,
        max(ranks.gather(training.optimizer_seconds(steps))),
    )


SAVE_HEAD = (
    "| save | the loop waits, ms | GB | complete after, s | ms a step before | while writing "
    f"| waited of {STEPS_A_CHECKPOINT:,} steps | and slowed down |"
)


def steps_while(going_on: Callable[[], bool], training: Training, ranks: Ranks) -> tuple[int, float]:
    """Steps while something goes on beside them on any rank: how many, and their seconds."""
    steps, began = 0, time.perf_counter()
    while sum(ranks.gather(going_on())):
        training.step()
        steps += 1
    wait_for(training.device)
    return steps, time.perf_counter() - began


def saved(training: Training, name: str, seconds: float, folder: Path, show: Callable[[str], None]) -> None:
    """Save in the background while steps go on; a line of a table for each time, told as soon as it is known.

    Twice: the first save's writer meets memory and files for the first time. Before it, as in a run, the memory for its
    copies is got beside some steps.

    Args:
        seconds: of a step without a save.
    """
    settings, ranks = training.settings, training.plan.ranks
    config = Config(model=settings.model, context=settings.data.context, patching=settings.patching)
    with CheckpointManager(folder, config, settings.checkpoint, training.plan, True) as checkpoints:
        checkpoints.prepare(training.state)
        steps, took = steps_while(lambda: not checkpoints.are_prepared, training, ranks)
        line = f"\n{name}: {steps} steps beside which the memory for copies was got: {took:.1f} s in place of "
        line += f"{steps * seconds:.1f} s"
        for number in (1, 2):
            wait_for(training.device)
            began = time.perf_counter()
            checkpoints.save(training.state)
            waited = max(ranks.gather(time.perf_counter() - began))
            steps, took = steps_while(lambda: checkpoints.is_writing, training, ranks)
            during = took / max(steps, 1)
            complete = time.perf_counter() - began
            checkpoints.wait()
            num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            ranks.gather(None)  # all have looked before it goes
            if ranks.is_first:
                shutil.rmtree(folder)
            of = STEPS_A_CHECKPOINT * seconds
            slowed = max(during - seconds, 0.0) * steps
            cells = [
                f"{name}, {number}",
                f"{waited * 1e3:,.0f}",
                f"{num_bytes / 1e9:.3g}",
                f"{complete:.1f}",
                f"{seconds * 1e3:.1f}",
                f"{during * 1e3:.1f} ({steps} steps)",
                f"{waited / of:.2%}",
                f"{(waited + slowed) / of:.2%}",
            ]
            show(f"| {' | '.join(cells)} |")
        show(line)


def measure(
    texts: Sequence[str],
    sizes: Sequence[int],
    steps: int,
    device_name: str,
    compiled: bool | None,
    folder: Path | None,
    profiled: bool = False,
) -> None:
    """Print a table, a line as soon as it is measured; then that of saves, which take longest, likewise."""
    with joined(device_name) as (ranks, aside, device):
        configurations = [
            Configuration.parse(text, size) for text in texts for size in (sizes if "@" not in text else sizes[:1])
        ]
        dtype = choose_dtype("bfloat16" if device.type == "cuda" else "float32", device)
        compile_blocks = device.type == "cuda" if compiled is None else compiled

        def show(line: str) -> None:
            if ranks.is_first:
                print(line, flush=True)

        def prepare_training(configuration: Configuration) -> Training:
            return Training(configuration, ranks, device, dtype, compile_blocks)

        def work(configuration: Configuration) -> None:
            training = prepare_training(configuration)
            row = measured(training, configuration, steps, ranks, dtype)
            show(row.line())
            if profiled and ranks.is_first:
                print_kernels(training.step, device)
            elif profiled:
                for _ in range(PROFILED_CALLS):
                    training.step()
            rows.append(row)

        def save(row: Row, folder: Path) -> None:
            training = prepare_training(row.configuration)
            training.seconds(2)  # it compiles anew
            saved(training, name_of(row.configuration), row.seconds, folder, show)

        rows: list[Row] = []
        to_save: list[Row] = []
        show(about(device, ranks))
        show(f"\n{Row.HEAD}\n{underline(Row.HEAD)}")
        for configuration in configurations:
            failed = attempt(lambda c=configuration: work(c), aside, device)
            if failed is not None:
                show(failed_row(Row.HEAD, [*first_cells(ranks.world_size, configuration, dtype), failed]))
            elif ranks.world_size > 1 or configuration.plan == "alone":
                to_save.append(rows[-1])
        if folder is None or not to_save:
            return
        show(f"\n{SAVE_HEAD}\n{underline(SAVE_HEAD)}")
        for row in to_save:
            failed = attempt(lambda row=row: save(row, folder), aside, device)
            if failed is not None:
                show(failed_row(SAVE_HEAD, [name_of(row.configuration), failed]))


def name_of(configuration: Configuration) -> str:
    """In the table of saves."""
    return f"{configuration.name}, {configuration.words}, {configuration.size:,} bytes"


@contextmanager
def joined(device_name: str) -> Any:
    """The ranks, the same with little patience, and the device; a rank alone has a process group, too, for FSDP."""
    with open_ranks(device_name, 5) as (ranks, device):
        if device.type == "cuda":  # the same on all ranks, so that they run out of memory together
            torch.cuda.set_per_process_memory_fraction(0.95)
        if ranks.world_size == 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
            aside = ranks
        else:
            aside = Ranks(
                ranks.rank, ranks.world_size, ranks.local_rank, dist.new_group(backend="gloo", timeout=PATIENCE)
            )
        try:
            yield ranks, aside, device
        finally:
            if ranks.world_size == 1:
                dist.destroy_process_group()


def attempt(work: Callable[[], None], ranks: Ranks, device: torch.device) -> str | None:
    """Why some work could not be done, where any rank met an error; None if it was done.

    A rank that met one alone leaves others in a collective for ever: then this process ends, and torchrun ends the job.
    """
    failed = None
    try:
        work()
    except Exception as error:
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error)
        failed = "out of memory" if memory else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not memory and not isinstance(error, UserError):
            traceback.print_exc()
    torch._dynamo.reset()  # the next one is compiled for itself
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        answers = ranks.gather(failed)
    except RuntimeError as error:
        print(f"{ranks.name}: {failed or 'done'}; the others do not answer ({error})", file=sys.stderr, flush=True)
        os._exit(1)
    return next((answer for answer in answers if answer is not None), None)


def about(device: torch.device, ranks: Ranks) -> str:
    words = [f"torch {torch.__version__}", f"ranks: {ranks.world_size}"]
    if device.type == "cuda":
        nccl = ".".join(map(str, nccl_version()))
        multicast = os.environ.get("NCCL_NVLS_ENABLE", "not set")
        words = [torch.cuda.get_device_name(device), *words, f"NCCL {nccl} (NCCL_NVLS_ENABLE {multicast})"]
    return "; ".join(words)
