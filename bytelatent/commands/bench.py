"""How fast this machine trains a model: `blt bench train`."""

import gc
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from rich import box
from rich.filesize import decimal
from rich.table import Table

from bytelatent.commands.bench_options import BenchTrainSettings
from bytelatent.device import choose_device, choose_dtype, free_memory, is_out_of_memory, peak_flops, peak_memory
from bytelatent.errors import UserError
from bytelatent.log import Console
from bytelatent.model import BLTSettings, ModelSettings, TokenLMSettings, preset
from bytelatent.model.flops import costs, training_flops
from bytelatent.terminal import print_json, print_line
from bytelatent.training.checks import check_cuda_graph, check_float8
from bytelatent.training.distributed.float8 import check_gain
from bytelatent.training.distributed.settings import ParallelSettings
from bytelatent.training.profiling import measure
from bytelatent.training.profiling.measure import DOCUMENT, PATCH_BYTES, SyntheticTraining, TrainingSetup
from bytelatent.training.settings import OptimizerSettings

LOGGER = logging.getLogger(__name__)
SIZES = {"cuda": [16_384, 65_536], "mps": [4096, 16_384], "cpu": [2048, 8192]}
# What an optimizer step moves for a weight in float32: AdamW reads it, its gradient and two moments and writes three
# of them; clipping reads the gradient for its norm, then reads and writes it.
BYTES_PER_WEIGHT = 7 * 4 + 3 * 4
HASH_TABLES = "n-gram hash tables"  # among the costs

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
    matrix_flops: float  # per second, measured
    copied_bytes: float  # per second, read and written
    stated_peak: float | None
    rows: list[Speed] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    too_large: list[str] = field(default_factory=list)  # a line for each that memory did not hold


def run(settings: BenchTrainSettings) -> None:
    """Measure gradients and steps of a preset, and print the result.

    Raises:
        UserError: there is no such preset or device, or it cannot have float8.
    """
    model, device = preset(settings.model), choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    float8 = "rowwise" if settings.float8 else None
    if float8 is not None and not isinstance(model, BLTSettings):
        raise UserError(f"float8 is for the global transformer, and '{settings.model}' has none; leave it out")
    check_float8(float8, device, dtype)
    num_patches = max(settings.bytes or SIZES[device.type]) / measure.PATCH_BYTES
    if float8 is not None:
        parallel = ParallelSettings(activation_checkpointing=settings.checkpointing)
        check_gain(model, float8, num_patches, parallel)
    check_cuda_graph(settings.cuda_graph, device)
    _check_memory(settings.model, model, device)
    how = {
        "float8": float8,
        "num_patches": num_patches,
        "checkpointing": settings.checkpointing,
        "captured": settings.cuda_graph,
    }
    setup = TrainingSetup(model, device, dtype, compiled=device.type == "cuda", **how)
    rates = measure.matrix_rate(device, dtype), measure.copy_rate(device), peak_flops(device, dtype)
    report = Benchmark(_title(settings.model, setup), *rates)
    for kind in ("dense", "rows") if _has_tables(model) else (None,):
        _free(setup)
        of_kind = replace(setup, optimizer=OptimizerSettings(hash_gradients=kind or "dense"))
        _measure(of_kind, kind, settings.bytes or SIZES[device.type], report)
    if settings.as_json:
        print_json(asdict(report))
    else:
        _show(report)


def _check_memory(name: str, model: ModelSettings, device: torch.device) -> None:
    """Check before allocating: a machine that overcommits memory kills the process.

    Raises:
        UserError: weights and gradients alone do not fit into the free memory.
    """
    if device.type != "cpu" or (free := free_memory()) is None:
        return
    # A weight and its gradient; with `rows` the hash tables' gradients are small.
    needed = sum(part.num_parameters * (4 if part.name == HASH_TABLES else 8) for part in costs(model))
    if needed > free:
        raise UserError(
            f"model: weights and gradients of '{name}' take {decimal(needed)} (float32), and {decimal(free)} "
            "of memory are free; take a smaller preset"
        )


def _measure(setup: TrainingSetup, kind: str | None, sizes: list[int], report: Benchmark) -> None:
    """Add to the report what one kind of hash gradients takes."""
    trainee = _where_it_fits(setup, partial(SyntheticTraining, setup))
    if trainee is None:
        state = f"weights, gradients and the optimizer's state{_with_hashes(kind)}"
        report.too_large.append(f"{state}: not enough memory; take a smaller preset")
        return
    largest = None
    for size in sizes:
        for work in ("gradients", "step"):
            what = f"{'a step' if work == 'step' else work} of {size:,} bytes{_with_hashes(kind)}"
            LOGGER.info(f"measuring: {what}")
            row = _where_it_fits(setup, partial(_speed, trainee, kind, size, work, report))
            trainee.model.zero_grad(set_to_none=True)
            if row is None:
                report.too_large.append(f"{what}: not enough memory; take fewer --bytes, or --checkpointing full")
                break
            report.rows.append(row)
            largest = size if work == "step" else largest
    if largest is not None:
        shares = _where_it_fits(setup, partial(_shares, trainee, kind, largest, report))
        report.splits.extend([Split(kind, largest, shares)] if shares else [])


def _speed(trainee: SyntheticTraining, kind: str | None, size: int, work: str, report: Benchmark) -> Speed:
    setup = trainee.setup
    stream, targets = measure.random_batch(size, setup.device, isinstance(setup.model, BLTSettings))
    if setup.compiled:
        trainee.forget_shapes()
    on_cuda, on_cpu = (setup.device.type == name for name in ("cuda", "cpu"))
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(setup.device)
    call = partial(trainee.step if work == "step" else trainee.forward_backward, stream, targets)
    seconds = measure.seconds_of(call, setup.device, warm=1 if on_cpu else 3, limit=2.0 if on_cpu else 20.0)
    patches = measure.num_patches(stream)
    flops = training_flops(setup.model, size / patches if patches else 1.0, min(size, DOCUMENT)) * size / seconds
    return Speed(
        kind,
        size,
        work,
        seconds,
        bytes_per_second=size / seconds,
        patches_per_second=patches / seconds if patches else None,
        of_measured_rate=flops / report.matrix_flops,
        of_stated_peak=flops / report.stated_peak if report.stated_peak else None,
        peak_memory=peak_memory(setup.device if on_cuda else None),
    )


def _shares(trainee: SyntheticTraining, kind: str | None, size: int, report: Benchmark) -> list[TimeShare]:
    """Where the time of a step goes, the most first; nothing where torch does not measure it."""
    setup = trainee.setup
    is_blt = isinstance(setup.model, BLTSettings)
    stream, targets = measure.random_batch(size, setup.device, is_blt)
    absent = {"hash tables"} if not _has_tables(setup.model) else set()
    absent |= {"patch attention"} if not is_blt else set()
    seconds = measure.by_kind(measure.kernels_of(partial(trainee.step, stream, targets), setup.device), absent)
    total = sum(seconds.values())
    if total == 0:
        return []
    parts = costs(setup.model, size / (measure.num_patches(stream) or size), min(size, DOCUMENT))
    attention = sum(part.of_attention for part in parts if not part.name.endswith("cross-attention"))
    products = sum(part.flops_per_byte - part.of_attention for part in parts)
    weights = sum(part.num_parameters for part in parts if kind != "rows" or part.name != HASH_TABLES)
    needed = {
        "products": 3 * products * size / report.matrix_flops,
        "attention": 3 * attention * size / report.matrix_flops,
        "optimizer and clipping": weights * BYTES_PER_WEIGHT / report.copied_bytes,
    }
    shares = [TimeShare(kernels, spent, spent / total, needed.get(kernels)) for kernels, spent in seconds.items()]
    return sorted(shares, key=lambda share: -share.seconds)


def _where_it_fits(setup: TrainingSetup, work: Callable[[], Found]) -> Found | None:
    """The result of the work; None where memory does not hold it, and then its memory is free again."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    _free(setup)
    return None


def _free(setup: TrainingSetup) -> None:
    """Free what was measured before: models are held by cycles, and by what was compiled."""
    if setup.compiled:
        torch._dynamo.reset()
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()


def _has_tables(settings: ModelSettings) -> bool:
    return isinstance(settings, BLTSettings) and settings.ngram_hash is not None


def _with_hashes(kind: str | None) -> str:
    return f", {kind} hash gradients" if kind else ""


def _title(name: str, setup: TrainingSetup) -> str:
    where = setup.device.type
    if where == "cuda":
        where = torch.cuda.get_device_name(setup.device)
    elif where == "cpu":
        where = f"cpu (threads: {torch.get_num_threads()})"
    patches = f", patches of {PATCH_BYTES:g}" if isinstance(setup.model, BLTSettings) else ""
    words = {
        f"{name} on {where}": True,
        "its bytes are tokens": isinstance(setup.model, TokenLMSettings),
        f"torch {torch.__version__}": True,
        f"products in {str(setup.dtype).removeprefix('torch.')}, weights in float32": True,
        "compiled block by block": setup.compiled,
        "forward and backward pass a CUDA graph": setup.captured,
        f"float8 {setup.float8}": setup.float8 is not None,
        f"activation checkpointing {setup.checkpointing}": setup.checkpointing != "none",
        f"documents of {DOCUMENT:,} random bytes{patches}": True,
    }
    return "; ".join(word for word, holds in words.items() if holds)


def _show(report: Benchmark) -> None:
    stated = f"; the maker states {report.stated_peak / 1e12:,.0f} (peak)" if report.stated_peak else ""
    print_line(report.title)
    print_line(f"measured: products {report.matrix_flops / 1e12:,.3g} TFLOP/s (rate){stated}")
    print_line(f"measured: copies {report.copied_bytes / 1e9:,.3g} GB/s, read and written")
    console = Console()
    for kind in dict.fromkeys(row.hash_gradients for row in report.rows):
        console.print(_speeds(kind, [row for row in report.rows if row.hash_gradients == kind]))
        for split in (split for split in report.splits if split.hash_gradients == kind):
            console.print(_times(split))
    for line in report.too_large:
        print_line(line)


def _speeds(kind: str | None, rows: list[Speed]) -> Table:
    cells = [
        {
            "bytes": f"{row.num_bytes:,}",
            "work": row.work,
            "ms": f"{row.seconds * 1e3:,.1f}",
            "bytes/s": f"{row.bytes_per_second:,.0f}",
            "patches/s": f"{row.patches_per_second:,.0f}" if row.patches_per_second else "",
            "of rate": f"{row.of_measured_rate:.1%}",
            "of peak": f"{row.of_stated_peak:.1%}" if row.of_stated_peak is not None else "",
            "GiB": f"{row.peak_memory / 2**30:.3g}",
        }
        for row in rows
    ]
    return _table(f"training{_with_hashes(kind)}", cells)


def _times(split: Split) -> Table:
    cells = [
        {
            "kernels": share.kind,
            "ms": f"{share.seconds * 1e3:,.1f}",
            "share": f"{share.share:.1%}",
            "ms at the measured rates": "-" if share.needed is None else f"{share.needed * 1e3:,.1f}",
        }
        for share in split.shares
    ]
    return _table(f"where a step of {split.num_bytes:,} bytes goes{_with_hashes(split.hash_gradients)}", cells)


def _table(title: str, rows: list[dict[str, str]]) -> Table:
    """A table of these cells, without columns that are empty."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    shown = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in shown:
        table.add_column(name, justify="left" if name in ("work", "kernels") else "right")
    for row in rows:
        table.add_row(*(row[name] for name in shown))
    return table
