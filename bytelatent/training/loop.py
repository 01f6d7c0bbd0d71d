"""The training loop: the same for the byte LM and for BLT."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bytelatent.data import Batch, DataSettings, Loader, Patcher, batches_once, surprise
from bytelatent.device import autocast, choose_device, choose_dtype
from bytelatent.errors import Interrupted, UserError
from bytelatent.files import only_writer
from bytelatent.model import build, compile_regions
from bytelatent.model.loss import bits_per_byte
from bytelatent.text import find_files
from bytelatent.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from bytelatent.training.clipping import clip
from bytelatent.training.metrics import Metrics
from bytelatent.training.optimizer import build_optimizer, learning_rate
from bytelatent.training.profiling import Profiler
from bytelatent.training.run import Run, open_run
from bytelatent.training.settings import TrainSettings
from bytelatent.training.statistics import Statistics
from bytelatent.training.trackers import must_be_installed, open_trackers


def train(settings: TrainSettings, console: Console | None = None) -> Path:
    """Train a model, or go on training it where the run's newest checkpoint stands.

    Returns:
        The run's folder.

    Raises:
        UserError: the settings, the data or a checkpoint will not do, or the loss is not finite.
        Interrupted: Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2; a checkpoint is written.
    """
    console = console or Console()
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    must_be_installed(settings.track)
    _must_hold_text(settings.data)
    with only_writer(settings.run):
        return _train(open_run(settings, device, dtype, console), device, dtype, console)


def _train(run: Run, device: torch.device, dtype: torch.dtype, console: Console) -> Path:
    settings = run.settings
    torch.manual_seed(settings.seed)
    model = build(settings.model).to(device)

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    loader = Loader(settings.data, settings.seed, run.patcher, say=say)
    state = TrainState(model, build_optimizer(model, settings.optimizer), loader)
    for line in load_checkpoint(run.folder, state):
        say(line)
    if device.type == "cuda" if settings.compile == "auto" else settings.compile:
        compile_regions(model)

    def loss(batch: Batch) -> torch.Tensor:
        with autocast(device, dtype):
            return surprise(model, batch)

    statistics = Statistics(model, settings.statistics_every, loss)
    trackers = open_trackers(settings, run.folder, say)
    with (
        loader,
        _stop_signals() as stopped,
        Metrics(trackers, state.step, _title(settings), console) as metrics,
        Profiler(run.folder, settings.profile, device, say) as profiler,
    ):
        first, before, logged = state.step + 1, state.seconds, (state.bytes_seen, state.seconds)
        while (done := _done(state, settings)) < 1:
            profiler.before(state.step + 1)
            row = _step(state, settings, loss, device, statistics)
            if state.step == first:  # it compiles and warms up: its time says nothing about the next steps'
                state.seconds = before
                logged = (state.bytes_seen, state.seconds)
            done = _done(state, settings)
            if state.step % settings.log_every == 0 or done >= 1:
                row["bytes_per_second"] = _rate(logged, (state.bytes_seen, state.seconds))
                logged = (state.bytes_seen, state.seconds)
                metrics.write(row, done)
            if (seen := statistics.take(state.step, state.bytes_seen)) is not None:
                metrics.write(seen, done)
            if settings.data.valid and (state.step % settings.validation.every == 0 or done >= 1):
                metrics.write(_validate(state, settings, run.patcher, loss, device), done)
            if state.step % settings.checkpoint.every == 0 or done >= 1 or stopped():
                save_checkpoint(run.folder, state, run.config, settings.checkpoint.keep)
            if stopped() and done < 1:
                raise Interrupted(f"after step {state.step}; the same command goes on from there")
    return run.folder


def _step(
    state: TrainState,
    settings: TrainSettings,
    loss: Callable[[Batch], torch.Tensor],
    device: torch.device,
    statistics: Statistics,
) -> dict[str, Any]:
    """One optimizer step over `accumulation` batches; its metrics."""
    began = time.perf_counter()
    rate = learning_rate(state.step, _after_warmup(state, settings), settings.optimizer)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    batches = [next(state.loader) for _ in range(settings.optimizer.accumulation)]
    num_targets = sum(batch.num_targets for batch in batches)
    nats = 0.0
    for batch in batches:
        part = loss(batch.to(device))
        (part / num_targets).backward()
        nats += float(part.detach())
    norm = clip(state.model.parameters(), settings.optimizer.clip)
    if not (torch.isfinite(norm) and torch.isfinite(torch.tensor(nats))):
        raise UserError(
            f"the loss is not finite at step {state.step + 1} (loss {nats / num_targets:g}, gradient norm {norm:g}); "
            f"earlier checkpoints are whole: take a lower optimizer.lr (now {settings.optimizer.lr:g}) or "
            "optimizer.clip, or dtype=float32, and another run=FOLDER"
        )
    with statistics.around_update(state.step + 1, batches[0]):
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    num_bytes = sum(batch.num_bytes for batch in batches)
    num_patches = sum(batch.num_patches for batch in batches)
    state.step += 1
    state.bytes_seen += num_bytes
    state.seconds += time.perf_counter() - began
    return {
        "step": state.step,
        "bytes_seen": state.bytes_seen,
        "bits_per_byte": bits_per_byte(nats, num_bytes),
        "lr": rate,
        "gradient_norm": float(norm),
        "mean_patch_bytes": num_bytes / num_patches if num_patches else None,
    }


def _title(settings: TrainSettings) -> str:
    return "byte LM" if settings.model.kind == "byte_lm" else "BLT"


def _done(state: TrainState, settings: TrainSettings) -> float:
    """How much of the run is over, from 0 to 1."""
    if settings.minutes is not None:
        return state.seconds / (60 * settings.minutes)
    assert settings.steps is not None
    return state.step / settings.steps


def _rate(then: tuple[int, float], now: tuple[int, float]) -> int | None:
    """Bytes a second between two (bytes, seconds); None where no time has passed."""
    return round((now[0] - then[0]) / (now[1] - then[1])) if now[1] > then[1] else None


def _after_warmup(state: TrainState, settings: TrainSettings) -> float:
    """How much of the cosine is over as a step begins: in steps from 0, the first after warm-up, to 1, the last."""
    if settings.steps is None:
        return _done(state, settings)
    warmup = settings.optimizer.warmup_steps
    return max(state.step - warmup, 0) / max(settings.steps - 1 - warmup, 1)


def _must_hold_text(data: DataSettings) -> None:
    """Complain about sources before the first step, not at the first validation."""
    for source in [*data.train, *data.valid]:
        find_files(source.path)
    if data.valid and next(batches_once(data.valid, data.context, data.batch_bytes), None) is None:
        raise UserError(f"data.valid: there is no text in {', '.join(repr(source.path) for source in data.valid)}")


def _validate(
    state: TrainState,
    settings: TrainSettings,
    patcher: Patcher | None,
    loss: Callable[[Batch], torch.Tensor],
    device: torch.device,
) -> dict[str, Any]:
    """Bits per byte on the validation text."""
    data = settings.data
    nats, num_bytes = 0.0, 0
    state.model.eval()
    with torch.no_grad():
        for batch in batches_once(data.valid, data.context, data.batch_bytes, patcher, settings.validation.max_bytes):
            nats += float(loss(batch.to(device)))
            num_bytes += batch.num_bytes
    state.model.train()
    return {
        "step": state.step,
        "bytes_seen": state.bytes_seen,
        "validation_bits_per_byte": bits_per_byte(nats, num_bytes),
        "validation_bytes": num_bytes,
    }


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C, SIGTERM or SIGUSR into a wish to stop after the step; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # a cluster sends the last two before it takes a job's nodes
    previous = {number: signal.signal(number, ask) for number in signal.Signals if number.name in names}
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
