"""How fast this machine trains a model: `blt bench train`."""

import gc
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from rich import box
from rich.table import Table

from bytelatent.commands.settings import BenchTrainSettings
from bytelatent.device import choose_device, choose_dtype, free_memory, is_out_of_memory, peak_flops, peak_memory
from bytelatent.errors import UserError
from bytelatent.log import Console
from bytelatent.model import BLTSettings, ModelSettings, preset
from bytelatent.model.flops import costs, training_flops
from bytelatent.terminal import print_json
from bytelatent.training.checks import check_cuda_graph, check_float8
from bytelatent.training.profiling.measure import (
    DOCUMENT,
    PATCH_BYTES,
    SyntheticTraining,
    TrainingSetup,
    by_kind,
    copy_rate,
    kernels_of,
    matrix_rate,
    num_patches,
    random_batch,
    seconds_of,
)
from bytelatent.training.settings import OptimizerSettings

LOGGER = logging.getLogger(__name__)
SIZES = {"cuda": [16_384, 65_536], "mps": [4096, 16_384], "cpu": [2048, 8192]}
# What an optimizer step moves for a weight in float32: AdamW reads it, its gradient and two moments and writes three
# of them; clipping reads the gradient for its norm, then reads and writes it.
BYTES_A_WEIGHT = 7 * 4 + 3 * 4
KEPT_A_WEIGHT = 2 * 4  # a weight and its gradient

Found = TypeVar("Found")


@dataclass(frozen=True)
class Speed:
    """A line of the table.

    Attributes:
        work: `gradients` are a forward and a backward pass; a `step` also clips and takes the optimizer's step.
        of_measured_rate, of_stated_peak: what `bytelatent.model.flops` counts of that of large products.
    """

    hash_gradients: str | None
    num_bytes: int
    work: str
    seconds: float
    bytes_per_second: float
    patches_per_second: float | None
    of_measured_rate: float
    of_stated_peak: float | None
    peak_memory: int


@dataclass(frozen=True)
class TimeShare:
    """Time of one kind of kernels in a step, and what the work needs at the measured rates, where it is counted."""

    kind: str
    seconds: float
    share: float
    needed: float | None


@dataclass(frozen=True)
class Split:
    """Where the time of a step goes."""

    hash_gradients: str | None
    num_bytes: int
    shares: list[TimeShare]


@dataclass(frozen=True)
class Benchmark:
    title: str
    matrix_flops: float  # a second, measured
    copied_bytes: float  # a second, read and written
    stated_peak: float | None
    rows: list[Speed]
    splits: list[Split]
    too_large: list[str]  # a line for each that memory did not hold

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def show(self, console: Console) -> None:
        stated = f"; the maker states {self.stated_peak / 1e12:,.0f} (peak)" if self.stated_peak else ""
        _say(console, self.title)
        _say(console, f"measured: products {self.matrix_flops / 1e12:,.3g} TFLOP/s (rate){stated}")
        _say(console, f"measured: copies {self.copied_bytes / 1e9:,.3g} GB/s, read and written")
        for kind in dict.fromkeys(row.hash_gradients for row in self.rows):
            hashed = f", {kind} hash gradients" if kind else ""
            console.print(_speeds(f"training{hashed}", [row for row in self.rows if row.hash_gradients == kind]))
            for split in self.splits:
                if split.hash_gradients == kind:
                    console.print(_times(f"where a step of {split.num_bytes:,} bytes goes{hashed}", split))
        for line in self.too_large:
            _say(console, line)


def run(settings: BenchTrainSettings) -> None:
    report = bench_train(settings)
    if settings.as_json:
        print_json(report.plain())
    else:
        report.show(Console())


def bench_train(settings: BenchTrainSettings) -> Benchmark:
    """Measure gradients and steps of a preset.

    Args:

    Raises:
        UserError: there is no such preset or device, or it cannot have float8.
    """
    model, device = preset(settings.model), choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    float8 = "rowwise" if settings.float8 else None
    if float8 is not None and not isinstance(model, BLTSettings):
        raise UserError(f"float8 is for the global transformer, and '{settings.model}' has none; leave it out")
    check_float8(float8, device, dtype)
    check_cuda_graph(settings.cuda_graph, device)
    _check_memory(settings.model, model, device)
    plan = TrainingSetup(
        model,
        device,
        dtype,
        compiled=device.type == "cuda",
        float8=float8,
        checkpointing=settings.checkpointing,
        captured=settings.cuda_graph,
    )
    title, peak = _title(settings.model, plan), peak_flops(device, dtype)
    report = Benchmark(title, matrix_rate(device, dtype), copy_rate(device), peak, [], [], [])
    for kind in ("dense", "rows") if _has_tables(model) else (None,):
        _let_go(plan)
        of_kind = replace(plan, optimizer=OptimizerSettings(hash_gradients=kind or "dense"))
        _measure(of_kind, kind, settings.bytes or SIZES[device.type], report)
    return report


def _check_memory(name: str, model: ModelSettings, device: torch.device) -> None:
    """A machine that gives out more memory than it has kills the process, so it is not asked.

    Raises:
        UserError: weights and gradients alone do not fit into what is free.
    """
    if device.type != "cpu" or (free := free_memory()) is None:
        return
    parts = costs(model)
    # With `rows` the hash tables' gradients are small.
    sparse = sum(part.num_parameters for part in parts if part.name == "n-gram hash tables")
    needed = KEPT_A_WEIGHT * sum(part.num_parameters for part in parts) - KEPT_A_WEIGHT // 2 * sparse
    if needed > free:
        raise UserError(
            f"model: weights and gradients of '{name}' take {needed / 1e9:,.1f} GB (float32), and {free / 1e9:,.1f} GB "
            "of memory are free; take a smaller preset"
        )


def _measure(plan: TrainingSetup, kind: str | None, sizes: list[int], report: Benchmark) -> None:
    """Add to the report what one kind of hash gradients takes."""
    hashed = f", {kind} hash gradients" if kind else ""
    trainee = _where_it_fits(plan, partial(SyntheticTraining, plan))
    if trainee is None:
        report.too_large.append(
            f"weights, gradients and the optimizer's state{hashed}: not enough memory; take a smaller preset"
        )
        return
    largest = None
    for size in sizes:
        for work in ("gradients", "step"):
            what = f"{'a step' if work == 'step' else work} of {size:,} bytes{hashed}"
            LOGGER.info(f"measuring: {what}")
            row = _where_it_fits(plan, partial(_row, trainee, kind, size, work, report))
            trainee.model.zero_grad(set_to_none=True)
            if row is None:
                report.too_large.append(f"{what}: not enough memory; take fewer --bytes, or --checkpointing full")
                break
            report.rows.append(row)
            largest = size if work == "step" else largest
    if largest is not None:
        report.splits.extend(_where_it_fits(plan, partial(_split, trainee, kind, largest, report)) or [])


def _row(trainee: SyntheticTraining, kind: str | None, size: int, work: str, report: Benchmark) -> Speed:
    plan = trainee.setup
    stream, targets = random_batch(size, plan.device, isinstance(plan.model, BLTSettings))
    if plan.compiled:
        trainee.forget_shapes()
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    call = partial(trainee.step if work == "step" else trainee.forward_backward, stream, targets)
    on_cpu = plan.device.type == "cpu"
    seconds = seconds_of(call, plan.device, warm=1 if on_cpu else 3, limit=2.0 if on_cpu else 20.0)
    patches = num_patches(stream)
    flops = training_flops(plan.model, size / patches if patches else 1.0, min(size, DOCUMENT)) * size / seconds
    return Speed(
        kind,
        size,
        work,
        seconds,
        size / seconds,
        patches / seconds if patches else None,
        flops / report.matrix_flops,
        flops / report.stated_peak if report.stated_peak else None,
        peak_memory(plan.device if plan.device.type == "cuda" else None),
    )


def _split(trainee: SyntheticTraining, kind: str | None, size: int, report: Benchmark) -> list[Split]:
    """Where the time of a step goes; nothing where torch cannot say."""
    plan = trainee.setup
    stream, targets = random_batch(size, plan.device, isinstance(plan.model, BLTSettings))
    absent = {"hash tables"} if not _has_tables(plan.model) else set()
    absent |= {"patch attention"} if not isinstance(plan.model, BLTSettings) else set()
    seconds = by_kind(kernels_of(partial(trainee.step, stream, targets), plan.device), absent)
    total = sum(seconds.values())
    if total == 0:
        return []
    parts = costs(plan.model, size / (num_patches(stream) or size), min(size, DOCUMENT))
    attention = sum(part.of_attention for part in parts if not part.name.endswith("cross-attention"))
    products = sum(part.flops_per_byte - part.of_attention for part in parts)
    weights = sum(part.num_parameters for part in parts if kind != "rows" or part.name != "n-gram hash tables")
    needed = {
        "products": 3 * products * size / report.matrix_flops,
        "attention": 3 * attention * size / report.matrix_flops,
        "optimizer and clipping": weights * BYTES_A_WEIGHT / report.copied_bytes,
    }
    shares = [TimeShare(kind, spent, spent / total, needed.get(kind)) for kind, spent in seconds.items()]
    return [Split(kind, size, sorted(shares, key=lambda share: -share.seconds))]


def _where_it_fits(plan: TrainingSetup, work: Callable[[], Found]) -> Found | None:
    """What the work gives; None where memory does not hold it, and then what it held is free again."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    _let_go(plan)
    return None


def _let_go(plan: TrainingSetup) -> None:
    """Free what was measured before: models are held by cycles, and by what was compiled."""
    if plan.compiled:
        torch._dynamo.reset()
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()


def _has_tables(settings: ModelSettings) -> bool:
    return isinstance(settings, BLTSettings) and settings.ngram_hash is not None


def _title(name: str, plan: TrainingSetup) -> str:
    where = plan.device.type
    if where == "cuda":
        where = torch.cuda.get_device_name(plan.device)
    elif where == "cpu":
        where = f"cpu (threads: {torch.get_num_threads()})"
    words = [
        f"{name} on {where}",
        f"torch {torch.__version__}",
        f"products in {str(plan.dtype).removeprefix('torch.')}, weights in float32",
        *(["compiled block by block"] if plan.compiled else []),
        *(["forward and backward pass a CUDA graph"] if plan.captured else []),
        *([f"float8 {plan.float8}"] if plan.float8 else []),
        *([f"activation checkpointing {plan.checkpointing}"] if plan.checkpointing != "none" else []),
        f"documents of {DOCUMENT:,} random bytes"
        + (f", patches of {PATCH_BYTES:g}" if isinstance(plan.model, BLTSettings) else ""),
    ]
    return "; ".join(words)


def _speeds(title: str, rows: list[Speed]) -> Table:
    columns: dict[str, Callable[[Speed], str]] = {
        "bytes": lambda row: f"{row.num_bytes:,}",
        "work": lambda row: row.work,
        "ms": lambda row: f"{row.seconds * 1e3:,.1f}",
        "bytes/s": lambda row: f"{row.bytes_per_second:,.0f}",
        "patches/s": lambda row: f"{row.patches_per_second:,.0f}" if row.patches_per_second else "",
        "of rate": lambda row: f"{row.of_measured_rate:.1%}",
        "of peak": lambda row: f"{row.of_stated_peak:.1%}" if row.of_stated_peak is not None else "",
        "GiB": lambda row: f"{row.peak_memory / 2**30:.3g}",
    }
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    shown = {name: cell for name, cell in columns.items() if any(cell(row) for row in rows)}
    for name in shown:
        table.add_column(name, justify="left" if name == "work" else "right")
    for row in rows:
        table.add_row(*(cell(row) for cell in shown.values()))
    return table


def _times(title: str, split: Split) -> Table:
    table = Table("kernels", title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("ms", "share", "ms at the measured rates"):
        table.add_column(name, justify="right")
    for share in split.shares:
        needed = "-" if share.needed is None else f"{share.needed * 1e3:,.1f}"
        table.add_row(share.kind, f"{share.seconds * 1e3:,.1f}", f"{share.share:.1%}", needed)
    return table


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
