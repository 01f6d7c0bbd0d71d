"""The training loop: the same for the byte LM and for BLT, for one process and for many."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from bytelatent.credentials import masked
from bytelatent.data import Batch, DataSettings, Loader, PrefetchLoader
from bytelatent.data.packing import ID_BYTES
from bytelatent.device import Threads, autocast, choose_dtype, free_memory, peak_flops
from bytelatent.errors import Interrupted, UserError
from bytelatent.files import only_writer
from bytelatent.log import Console
from bytelatent.model.loss import bits_per_byte, cross_entropy
from bytelatent.training.checkpoint.manager import CheckpointManager, TrainState, check_takes_checkpoints
from bytelatent.training.clipping import clip
from bytelatent.training.distributed.plan import (
    ParallelPlan,
    build_parallel_model,
    check_parallel,
    initialize_weights,
    make_plan,
)
from bytelatent.training.distributed.ranks import Ranks, open_ranks
from bytelatent.training.faults import (
    RolledBack,
    Watchdog,
    act_on,
    deterministic,
    memory_named,
    must_be_finite,
    trouble_with,
    who_failed,
)
from bytelatent.training.float8 import check_float8
from bytelatent.training.gradients import CapturedGradients, Gradients, check_cuda_graph
from bytelatent.training.metrics import Metrics
from bytelatent.training.optimizer import build_optimizer, check_optimizer, learning_rate
from bytelatent.training.profiling.layer_statistics import LayerStatistics
from bytelatent.training.profiling.profiler import Profiler
from bytelatent.training.run_setup import Run, open_run
from bytelatent.training.settings import TrainSettings
from bytelatent.training.speed import Totals, speed
from bytelatent.training.stopping import StopSignals
from bytelatent.training.trackers import must_be_installed, open_trackers
from bytelatent.training.validation import must_hold_text, validate

MOST_ROLLBACKS = 3  # to the same checkpoint
VALIDATION_SHARE = 0.1  # of the minutes: the most that validation may take beside them, half of it in the last one


def train(settings: TrainSettings, console: Console | None = None) -> Path:
    """Train a model, or go on training it where the run's newest checkpoint stands.

    Under torchrun each process calls this, and they train one model together.

    Returns:
        The run's folder.

    Raises:
        UserError: the settings, the data or a checkpoint will not do, or the loss is not finite.
        Interrupted: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2; a checkpoint is written.
        KeyboardInterrupt: a second of these; nothing is written.
    """
    console = console or Console()
    with (
        open_ranks(settings.device, settings.faults.watchdog_minutes) as (ranks, device),
        deterministic(settings.determinism),
    ):
        dtype = choose_dtype(settings.dtype, device)

        def check() -> None:
            check_float8(settings.float8, device, dtype)
            check_cuda_graph(settings.cuda_graph, device, ranks.world_size)
            check_parallel(settings.parallel, settings.model, ranks.world_size)
            check_optimizer(settings.optimizer, ranks.world_size)
            must_be_installed(settings.track)
            check_shuffle_buffer(settings.data)

        ranks.on_all(check)
        plan = make_plan(settings.parallel, settings.model, ranks, device)
        with ExitStack() as held:

            def hold() -> None:
                held.enter_context(only_writer(settings.run))
                must_hold_text(settings.data)
                check_takes_checkpoints(Path(settings.run))

            ranks.on_first(hold)
            run = open_run(settings, ranks, device, dtype, console)
            return _train(run, plan, device, dtype, console if ranks.is_first else Console(quiet=True))


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


def _train(run: Run, plan: ParallelPlan, device: torch.device, dtype: torch.dtype, console: Console) -> Path:
    settings, ranks = run.settings, plan.ranks
    torch.manual_seed(settings.seed)
    compiled = device.type == "cuda" if settings.compile == "auto" else settings.compile
    model = build_parallel_model(settings.model, plan, device, dtype, compiled, settings.float8)

    def say(line: str) -> None:
        console.print(masked(line), highlight=False, markup=False, soft_wrap=True)

    batches = Loader(settings.data, settings.seed, run.patcher, plan.data_rank, plan.data_world_size)
    loader = PrefetchLoader(batches, device) if reads_ahead(device) else batches
    state = TrainState(model, build_optimizer(model, settings.optimizer), loader)
    in_background = settings.checkpoint.asynchronous
    if in_background == "auto":
        in_background = device.type == "cuda" or ranks.world_size > 1

    def loss(batch: Batch) -> torch.Tensor:
        with autocast(device, dtype):
            return cross_entropy(model, batch)

    gradients: Callable[[Batch, float], torch.Tensor] = Gradients(loss, device)
    if settings.cuda_graph:
        adds = settings.optimizer.accumulation > 1
        gradients = CapturedGradients(model.parameters(), loss, device, adds)
    statistics = LayerStatistics(model, settings.statistics_every, loss)
    trackers = open_trackers(settings, run.folder, say) if ranks.is_first else []
    with (
        StopSignals(ranks) as stopped,
        loader,
        CheckpointManager(run.folder, run.config, settings.checkpoint, plan, in_background, stopped) as checkpoints,
        Watchdog(settings.faults.watchdog_minutes, ranks) as watchdog,
        Threads.of(device, settings.minutes is not None and ranks.world_size == 1) as threads,
        who_failed(ranks, lambda: state.step, stopped),  # at once: torchrun soon ends the ranks that are left
    ):
        if not checkpoints.load(state):
            initialize_weights(model, settings.model)
        must_be_finite(state, settings, ranks)
        done = _done(state, settings)
        if done < 1:
            for line in run.changes:
                say(line)
            if state.schedule.decayed > 1 - 1e-9:
                say("the learning rate was at its minimum at the end of the run so far, and stays there")
        else:
            say(_over(state, settings))
        peak, rollbacks, validated = peak_flops(device, dtype), 0, 0.0
        with (
            Metrics(trackers, state.step, _title(settings), console) as metrics,
            Profiler(run.folder, settings.profile, device) if ranks.is_first else nullcontext() as profiler,
        ):
            first, logged = state.step + 1, Totals.of(state)
            if done < 1:
                with memory_named(settings, ranks):
                    _try_out(state, gradients)
                for line in _about_batches(settings.data, state.peeked[0]):
                    say(line)
                run.write_settings(ranks)
            since = time.perf_counter()
            while done < 1:
                watchdog.progress(f"step {state.step + 1}")
                before = state.seconds
                if profiler is not None:
                    profiler.before(state.step + 1)
                try:
                    with memory_named(settings, ranks):
                        row = _step(state, settings, gradients, plan, statistics)
                except RolledBack as back:
                    rollbacks += 1
                    _go_back(state, checkpoints, str(back), rollbacks, ranks)
                    say(f"{back}: back to step {state.step}, on with the text that comes next")
                    metrics.forget(state.step)
                    logged, since = Totals.of(state), time.perf_counter()
                    continue
                # From step to step: what the device still computes of one is paid for in the next.
                now = time.perf_counter()
                took, since = now - since, now
                state.seconds += took
                if "skipped" in row:
                    say(f"{row['skipped']}: its update is left out")
                if state.step == first:  # it compiles and warms up: its time says nothing about the next steps'
                    state.seconds, state.waited, state.patches_seen = before, 0.0, 0
                    logged = Totals.of(state)
                    checkpoints.prepare(state)
                else:
                    threads.took(took)
                # What all ranks should decide alike: the clock of the first one counts, and a signal to any.
                stop, state.seconds = ranks.sum([stopped(), state.seconds * ranks.is_first])
                if state.seconds > before:
                    state.schedule.end_step(state.seconds - before)
                done = _done(state, settings)
                if state.step % settings.log_every == 0 or done >= 1:
                    row |= speed(logged, Totals.of(state), settings, peak, ranks) | {"threads": threads.count}
                    logged = Totals.of(state)
                    metrics.write(row, done)
                if (seen := statistics.take(state.step, state.bytes_seen)) is not None:
                    metrics.write(seen, done)
                if settings.data.valid and (state.step % settings.validation.every == 0 or done >= 1):
                    watchdog.progress(f"validation after step {state.step}")
                    began, limit = time.perf_counter(), _validation_limit(state, settings, validated, done)
                    row = validate(state, settings, run.patcher, loss, device, plan, limit)
                    metrics.write(row, done)
                    since = time.perf_counter()
                    validated += since - began
                checkpoints.check()
                if state.step % settings.checkpoint.every == 0 or done >= 1 or stop:
                    watchdog.progress(f"a checkpoint after step {state.step}")
                    checkpoints.save(state, is_last=done >= 1, is_needed=done >= 1 or bool(stop))
                    rollbacks, since = 0, time.perf_counter()
                if stop and done < 1:
                    raise ranks.common_error(
                        Interrupted(f"after step {state.step}; the same command goes on from there")
                    )
                if done >= 1 and state.step <= settings.optimizer.warmup_steps:
                    say(_ended_in_warmup(state, settings))
    return run.folder


def reads_ahead(device: torch.device) -> bool:
    """Whether batches are made while others are trained on: on a CPU both would want the same cores."""
    return device.type == "cuda"


def _try_out(state: TrainState, gradients: Callable[[Batch, float], torch.Tensor]) -> None:
    """Compute a gradient and drop it: what does not compile or fit into memory shows before anything is changed."""
    state.peeked.append(next(state.loader))
    gradients(state.peeked[0], 1.0)
    state.optimizer.zero_grad(set_to_none=True)


def _about_batches(data: DataSettings, first: Batch) -> list[str]:
    """A line about each setting that makes batches others than the next one says."""
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


def _go_back(state: TrainState, checkpoints: CheckpointManager, why: str, times: int, ranks: Ranks) -> None:
    """Bring weights and the optimizer back to the last checkpoint; the text read since is passed over."""
    state.optimizer.zero_grad(set_to_none=True)
    if times > MOST_ROLLBACKS:
        raise ranks.common_error(
            UserError(f"{why}, after {MOST_ROLLBACKS} rollbacks to one checkpoint; take a lower optimizer.lr")
        )
    if not checkpoints.load(state, position=False):
        raise ranks.common_error(
            UserError(f"{why}, and there is no checkpoint yet to roll back to; take a lower optimizer.lr")
        )


def _step(
    state: TrainState,
    settings: TrainSettings,
    gradients: Callable[[Batch, float], torch.Tensor],
    plan: ParallelPlan,
    statistics: LayerStatistics | None = None,
) -> dict[str, Any]:
    """One optimizer step over `accumulation` batches of each rank; its metrics, over all of them."""
    began = time.perf_counter()
    decayed = state.schedule.begin_step(state.step, state.seconds, settings)
    rate = learning_rate(state.step, decayed, settings.optimizer)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    batches = [_next(state) for _ in range(settings.optimizer.accumulation)]
    state.waited += time.perf_counter() - began
    num_targets, num_bytes, num_patches = (int(number) for number in plan.sum(_counts(batches)))
    parts = []
    for number, batch in enumerate(batches, start=1):
        plan.set_last_backward(state.model, number == len(batches))
        # Gradients are averaged over ranks, and should be those of the mean over the targets of all of them.
        parts.append(gradients(batch, num_targets / plan.data_world_size))
    clipped = clip(state.model.parameters(), settings.optimizer.clip)
    # The only wait for the device, after which the optimizer runs while the next step is prepared.
    nats, norm = plan.sum([sum(float(part) for part in parts)])[0], float(clipped)
    mean = nats / num_targets
    trouble = trouble_with(state.step + 1, mean, norm, state.recent, settings.faults.spike)
    if act_on(trouble, mean, state, settings, plan.ranks):
        with statistics.around_update(state.step + 1, batches[0]) if statistics is not None else nullcontext():
            state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.bytes_seen += num_bytes
    state.patches_seen += num_patches
    row = {
        "step": state.step,
        "bytes_seen": state.bytes_seen,
        "bits_per_byte": bits_per_byte(nats, num_bytes) if math.isfinite(nats) else None,
        "lr": rate,
        "gradient_norm": norm if math.isfinite(norm) else None,
        "mean_patch_bytes": num_bytes / num_patches if num_patches else None,
    }
    return row if trouble is None else {**row, "skipped": trouble}


def _next(state: TrainState) -> Batch:
    return state.peeked.pop() if state.peeked else next(state.loader)


def _counts(batches: list[Batch]) -> list[int]:
    """Targets, bytes and patches of some batches."""
    return [sum(counts) for counts in zip(*((b.num_targets, b.num_bytes, b.num_patches) for b in batches), strict=True)]


def _title(settings: TrainSettings) -> str:
    return "byte LM" if settings.model.kind == "byte_lm" else "BLT"


def _done(state: TrainState, settings: TrainSettings) -> float:
    """How much of the run is over, from 0 to 1."""
    if settings.minutes is not None:
        return state.seconds / (60 * settings.minutes)
    assert settings.steps is not None
    return state.step / settings.steps


def _validation_limit(state: TrainState, settings: TrainSettings, validated: float, done: float) -> float | None:
    """Seconds that the next validation may take under `minutes`; earlier ones took `validated`."""
    if settings.minutes is None:
        return None
    return (VALIDATION_SHARE if done >= 1 else VALIDATION_SHARE / 2) * state.seconds - validated


def _over(state: TrainState, settings: TrainSettings) -> str:
    """A line about a run that was over before this start."""
    if settings.minutes is not None:
        return f"nothing is left to do: the run's {settings.minutes:g} minutes are over; more minutes go on with it"
    if state.step == settings.steps:
        return f"nothing is left to do: all {state.step} steps are done; more steps go on with the run"
    return f"nothing is left to do: {state.step} steps are done, and steps={settings.steps} asks for fewer"


def _ended_in_warmup(state: TrainState, settings: TrainSettings) -> str:
    """A line about a run whose learning rate has not come to its peak."""
    return (
        f"the run ended in warm-up, after {state.step} steps of optimizer.warmup_steps="
        f"{settings.optimizer.warmup_steps}: the learning rate never fell; train longer, or with a shorter warm-up"
    )
