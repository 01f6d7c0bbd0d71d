"""The training loop: the same for byte LMs, token LMs and BLTs, for one process and for many."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

from bytelatent.data import Batch, Loader, PrefetchLoader, held_out_batches
from bytelatent.device import Threads, autocast, choose_dtype, peak_flops
from bytelatent.errors import Interrupted, UserError
from bytelatent.model.loss import bits_per_byte, cross_entropy
from bytelatent.model.settings import NAMES
from bytelatent.signals import StopSignals
from bytelatent.training.checkpoint.manager import CheckpointManager, TrainState
from bytelatent.training.checks import check_machine, check_settings, hints_about_batches, how_to_save_memory
from bytelatent.training.distributed.float8 import expected_patches
from bytelatent.training.distributed.parallelize import (
    ParallelPlan,
    build_parallel_model,
    initialize_weights,
    make_plan,
)
from bytelatent.training.distributed.ranks import Watchdog, open_ranks
from bytelatent.training.faults import (
    RolledBack,
    deterministic,
    memory_named,
    must_be_finite,
    reason_to_skip,
    who_failed,
)
from bytelatent.training.gradients import CapturedGradients, Gradients, clip
from bytelatent.training.initial import load_initial
from bytelatent.training.metrics import Metrics, Totals, open_trackers, speed
from bytelatent.training.optimizer import build_optimizer
from bytelatent.training.profiling.steps import Profiler, layer_statistics
from bytelatent.training.run_setup import Run, lock_folder, open_run, write_settings
from bytelatent.training.schedule import learning_rate
from bytelatent.training.settings import TrainSettings
from bytelatent.training.validation import held_out_loss

LOGGER = logging.getLogger(__name__)

MOST_ROLLBACKS = 3  # to the same checkpoint
VALIDATION_SHARE = 0.1  # of the minutes: the most that validation may take beside them, half of it in the last one


def train(settings: TrainSettings) -> Path:
    """Train a model, or resume training from the run's newest checkpoint.

    Under torchrun each process calls this, and they train one model together.

    Returns:
        The run's folder.

    Raises:
        UserError: the settings, the data or a checkpoint are bad, or the loss is not finite.
        Interrupted: Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2; a checkpoint is written.
        KeyboardInterrupt: a second of these; nothing is written.
    """
    folder = Path(settings.run)
    with open_ranks(settings.device, settings.faults.watchdog_minutes) as (ranks, device), ExitStack() as resources:
        if settings.determinism:
            resources.enter_context(deterministic())
        dtype = choose_dtype(settings.dtype, device)

        def check() -> None:
            check_settings(settings, ranks.world_size, device)
            check_machine(settings, device, dtype)

        ranks.on_all(check)
        plan = make_plan(settings.parallel, ranks, device)
        ranks.on_first(lambda: lock_folder(folder, settings.data, resources))
        run = open_run(folder, settings, ranks, device, dtype)
        Trainer.setup(folder, run, plan, device, dtype, resources).run()
    return folder


class Trainer:
    """Trains a model: `run` takes steps, logs, validates and saves until the run is over."""

    folder: Path
    opened: Run
    device: torch.device
    loss: Callable[[Batch], torch.Tensor]  # summed nats
    checkpoints: CheckpointManager
    metrics: Metrics
    profiler: Profiler | None  # on the first rank
    stop_signals: StopSignals
    watchdog: Watchdog
    threads: Threads
    peak: float | None  # FLOP/s of the device

    def __init__(
        self, settings: TrainSettings, plan: ParallelPlan, state: TrainState, gradients: Gradients | CapturedGradients
    ):
        self.settings, self.plan, self.state, self.gradients = settings, plan, state, gradients
        self.logged = Totals.of(state)  # as the last row of metrics was written
        self.step_began = time.perf_counter()
        self.first_step = 1  # since the process started
        self.statistics: dict[str, Any] | None = None  # of layers, in the last step
        self.rollbacks = 0  # to the last checkpoint
        self.validated = 0.0  # seconds
        self.stops = False  # a rank was asked to stop

    @classmethod
    def setup(
        cls, folder: Path, run: Run, plan: ParallelPlan, device: torch.device, dtype: torch.dtype, resources: ExitStack
    ) -> "Trainer":
        """Build the model and all around it; `resources` closes what is opened."""
        settings, ranks = run.settings, plan.ranks
        torch.manual_seed(settings.seed)
        compiled = device.type == "cuda" if settings.compile == "auto" else settings.compile
        scales = settings.optimizer.lr_scale
        num_patches = expected_patches(settings.data, settings.calibration and settings.calibration.patch_bytes)
        how = device, dtype, compiled, settings.float8, lambda name: scales.of(name) == 0, num_patches
        model = build_parallel_model(settings.model, plan, *how)

        def loss(batch: Batch) -> torch.Tensor:
            with autocast(device, dtype):
                return cross_entropy(model, batch)

        share = plan.data_rank, plan.data_world_size
        loader = Loader(settings.data, settings.seed, run.patcher, *share, run.vocabulary, run.chat_template)
        loader = PrefetchLoader(loader, device) if prefetches(device) else loader
        state = TrainState(model, build_optimizer(model, settings.optimizer), loader)
        gradients = Gradients(loss, device)
        if settings.cuda_graph:
            gradients = CapturedGradients(model.parameters(), loss, device, settings.optimizer.accumulation > 1)
        self = cls(settings, plan, state, gradients)
        self.folder, self.opened, self.device, self.loss = folder, run, device, loss
        self.peak = peak_flops(device, dtype)
        trackers = open_trackers(settings.track, settings.wandb, folder, settings.shown()) if ranks.is_first else []

        enter = resources.enter_context
        self.stop_signals = enter(StopSignals(ranks.is_first))
        enter(loader)
        asynchronous = settings.checkpoint.asynchronous
        if asynchronous == "auto":
            asynchronous = device.type == "cuda" or ranks.world_size > 1
        self.checkpoints = enter(
            CheckpointManager(folder, run.config, settings.checkpoint, plan, asynchronous, self.stop_signals)
        )
        self.watchdog = enter(Watchdog(settings.faults.watchdog_minutes, ranks))
        self.threads = enter(Threads.of(device, settings.minutes is not None and ranks.world_size == 1))
        # Last, so that it is first to see an error: torchrun soon ends the other ranks.
        enter(who_failed(ranks, lambda: state.step, self.stop_signals))
        self.metrics = enter(Metrics(trackers, NAMES[settings.model.kind]))
        self.profiler = enter(Profiler(folder, settings.profile, device)) if ranks.is_first else None
        return self

    def run(self) -> None:
        """Train from the newest checkpoint, if there is one, to the end of the run.

        Raises:
            Interrupted: a rank was asked to stop; a checkpoint is written.
        """
        self._begin()
        state, is_over = self.state, self.done >= 1
        if self.settings.init is not None and state.step == 0:
            self.validate()
        while self.done < 1:
            try:
                row = self._guarded_step()
            except RolledBack as reason:
                self._roll_back(str(reason))
                continue
            self._end_step()
            self.log(row)
            self.validate()
            self.save()
            if self.stops and self.done < 1:
                raise self.plan.ranks.common_error(Interrupted(f"after step {state.step}; the same command resumes"))
        if not is_over and state.step <= self.settings.optimizer.warmup_steps:
            warmup = f"optimizer.warmup_steps={self.settings.optimizer.warmup_steps}"
            LOGGER.info(
                f"the run ended in warm-up, after {state.step} steps of {warmup}: the learning rate never fell; train "
                "longer, or with a shorter warm-up"
            )

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over `accumulation` batches of each rank; its metrics, over all of them.

        Raises:
            RolledBack: the loss is not finite or spikes, and `faults.on_nan` is `rollback`.
            UserError: the same, and it is `stop`.
        """
        state, settings, plan = self.state, self.settings, self.plan
        began = time.perf_counter()
        decayed = state.schedule.begin_step(
            state.step, state.seconds, settings.optimizer, settings.steps, settings.minutes
        )
        rate = learning_rate(state.step, decayed, settings.optimizer)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        batches = [self._next_batch() for _ in range(settings.optimizer.accumulation)]
        state.waited += time.perf_counter() - began
        counts = [(b.num_targets, b.target_bytes, b.num_bytes, b.num_patches) for b in batches]
        sums = plan.sum([sum(count) for count in zip(*counts, strict=True)])
        num_targets, target_bytes, num_bytes, num_patches = map(int, sums)
        num_targets = max(num_targets, 1)  # in conversations there may be a batch in which nothing counts
        parts = []
        for number, batch in enumerate(batches, start=1):
            plan.set_last_backward(state.model, number == len(batches))
            # Gradients are averaged over ranks, and should be those of the mean over the targets of all of them.
            parts.append(self.gradients(batch, num_targets / plan.data_world_size))
        clipped = clip(state.model.parameters(), settings.optimizer.clip, len(batches))
        # The only wait for the device, after which the optimizer runs while the next step is prepared.
        nats, norm = plan.sum([sum(float(part) for part in parts)])[0], float(clipped)
        self.statistics = None
        skipped = reason_to_skip(nats / num_targets, norm, state, settings.faults, settings.optimizer.lr, plan.ranks)
        if skipped is None:
            is_due = settings.statistics_every is not None and (state.step + 1) % settings.statistics_every == 0
            with layer_statistics(state.model, self.loss, batches[0]) if is_due else nullcontext() as self.statistics:
                state.optimizer.step()
        elif plan.ranks.is_first:
            LOGGER.warning(f"{skipped}: its update is left out")
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.bytes_seen += num_bytes
        state.patches_seen += num_patches
        if state.all_patches is not None:
            state.all_patches += num_patches
        row = {
            "step": state.step,
            "bytes_seen": state.bytes_seen,
            "bits_per_byte": bits_per_byte(nats, target_bytes) if math.isfinite(nats) else None,
            "lr": rate,
            "gradient_norm": norm if math.isfinite(norm) else None,
            "mean_patch_bytes": num_bytes / num_patches if num_patches else None,
        }
        return row if skipped is None else {**row, "skipped": skipped}

    def log(self, row: dict[str, Any]) -> None:
        """Write the metrics of a step, if they are due, and those of layers."""
        state, settings = self.state, self.settings
        if state.step % settings.log_every == 0 or self.done >= 1:
            now = Totals.of(state)
            rates = speed(self.logged, now, settings.model, settings.data.context, self.peak, self.plan.ranks)
            self.logged = now
            totals = {"seconds": round(state.seconds, 3), "patches_seen": state.all_patches or None}
            self.metrics.write(row | totals | rates | {"threads": self.threads.count}, self.done)
        if self.statistics is not None:
            head = {"step": state.step, "bytes_seen": state.bytes_seen, "kind": "statistics"}
            self.metrics.write(head | self.statistics, self.done)

    def validate(self) -> None:
        """Measure on held-out text, if it is due, and write the result."""
        state, settings = self.state, self.settings
        if not settings.data.valid or (state.step % settings.validation.every != 0 and self.done < 1):
            return
        self.watchdog.progress(f"validation after step {state.step}")
        limit = None
        if settings.minutes is not None:
            share = VALIDATION_SHARE if self.done >= 1 else VALIDATION_SHARE / 2
            limit = share * (state.seconds if state.step else 60 * settings.minutes) - self.validated
        began = time.perf_counter()
        self.metrics.write(self.evaluate(limit), self.done)
        self.step_began = time.perf_counter()
        self.validated += self.step_began - began

    def evaluate(self, limit: float | None = None) -> dict[str, Any]:
        """Bits per byte on the validation text; after `limit` seconds the rest of it is left out."""
        state, opened, max_bytes = self.state, self.opened, self.settings.validation.max_bytes
        how = opened.patcher, max_bytes, opened.vocabulary, opened.chat_template
        batches = held_out_batches(self.settings.data, *how)
        nats, num_bytes = held_out_loss(state.model, self.loss, batches, self.plan, self.device, max_bytes, limit)
        return {
            "step": state.step,
            "bytes_seen": state.bytes_seen,
            "validation_bits_per_byte": bits_per_byte(nats, num_bytes),
            "validation_bytes": num_bytes,
        }

    def save(self) -> None:
        """Write a checkpoint, if it is due."""
        self.checkpoints.check()
        is_last = self.done >= 1
        if self.state.step % self.settings.checkpoint.every == 0 or is_last or self.stops:
            self.watchdog.progress(f"a checkpoint after step {self.state.step}")
            self.checkpoints.save(self.state, is_last=is_last, is_needed=is_last or self.stops)
            self.rollbacks, self.step_began = 0, time.perf_counter()

    @property
    def done(self) -> float:
        """How much of the run is over, from 0 to 1."""
        if self.settings.minutes is not None:
            return self.state.seconds / (60 * self.settings.minutes)
        assert self.settings.steps is not None
        return self.state.step / self.settings.steps

    def _begin(self) -> None:
        """Load the newest checkpoint or the initial weights, or draw these, and try a step before anything changes."""
        state, ranks, settings = self.state, self.plan.ranks, self.settings
        resumes = self.checkpoints.resume(state)
        if not resumes and settings.init is not None:
            assert self.opened.initial is not None, "the run has begun, and has no checkpoint"
            load_initial(state.model, settings.init, self.opened.initial, ranks)
        elif not resumes:
            initialize_weights(state.model, settings.model)
        if self.checkpoints.holds_weights_only and self.done < 1:
            raise ranks.common_error(
                UserError(
                    f"checkpoint.last: '{self.folder}' ended after step {state.step} with its weights only, so it "
                    "cannot be continued; train another run=FOLDER"
                )
            )
        must_be_finite(state, self.folder, ranks)
        self._log_start()
        self.metrics.resume_after(state.step if resumes else -1)
        if self.done < 1:
            self._try_step()
            ranks.on_first(lambda: write_settings(self.folder, self.opened))
        self.first_step, self.logged, self.step_began = state.step + 1, Totals.of(state), time.perf_counter()

    def _log_start(self) -> None:
        """Log what changed since the run's last start, or that nothing is left to do."""
        state, steps, minutes = self.state, self.settings.steps, self.settings.minutes
        if self.done < 1:
            for line in self.opened.changes:
                LOGGER.info(line)
            if state.schedule.decayed > 1 - 1e-9:
                LOGGER.info("the learning rate was at its minimum at the end of the run so far, and stays there")
        elif minutes is not None:
            LOGGER.info(f"nothing is left to do: the run's {minutes:g} minutes are over; more minutes continue it")
        elif state.step == steps:
            LOGGER.info(f"nothing is left to do: all {state.step} steps are done; more steps continue the run")
        else:
            LOGGER.info(f"nothing is left to do: {state.step} steps are done, and steps={steps} asks for fewer")

    def _try_step(self) -> None:
        """Compute a gradient and drop it: what does not compile or fit into memory fails here."""
        state = self.state
        with memory_named(self.plan.ranks, how_to_save_memory(self.settings)):
            state.peeked.append(next(state.loader))
            self.gradients(state.peeked[0], 1.0)
            state.optimizer.zero_grad(set_to_none=True)
        for line in hints_about_batches(self.settings.data, state.peeked[0]):
            LOGGER.info(line)

    def _guarded_step(self) -> dict[str, Any]:
        """A step under the watchdog's eye, traced if it is to be, with an error that names too little memory."""
        number = self.state.step + 1
        self.watchdog.progress(f"step {number}")
        if self.profiler is not None:
            self.profiler.before(number)
        with memory_named(self.plan.ranks, how_to_save_memory(self.settings)):
            return self.train_step()

    def _next_batch(self) -> Batch:
        return self.state.peeked.pop() if self.state.peeked else next(self.state.loader)

    def _end_step(self) -> None:
        """Take the time of a step, and learn whether the run is to stop."""
        state, ranks = self.state, self.plan.ranks
        # From step to step: what the device still computes of one counts in the next.
        now = time.perf_counter()
        took, self.step_began = now - self.step_began, now
        before = state.seconds
        if state.step == self.first_step:  # it compiles and warms up: its time is not that of the next steps
            state.waited, state.patches_seen = 0.0, 0
            self.logged = Totals.of(state)
            self.checkpoints.prepare(state)
        else:
            state.seconds += took
            self.threads.took(took)
        # All ranks decide alike: the clock of the first one counts, and a signal to any.
        stops, state.seconds = ranks.sum([self.stop_signals(), state.seconds * ranks.is_first])
        self.stops = bool(stops)
        if state.seconds > before:
            state.schedule.end_step(state.seconds - before)

    def _roll_back(self, why: str) -> None:
        """Load the weights and the optimizer's state of the last checkpoint; the text read since is not read again."""
        state, ranks = self.state, self.plan.ranks
        self.rollbacks += 1
        state.optimizer.zero_grad(set_to_none=True)
        if self.rollbacks > MOST_ROLLBACKS:
            raise ranks.common_error(
                UserError(f"{why}, after {MOST_ROLLBACKS} rollbacks to one checkpoint; take a lower optimizer.lr")
            )
        if not self.checkpoints.resume(state, position=False):
            raise ranks.common_error(
                UserError(f"{why}, and there is no checkpoint yet to roll back to; take a lower optimizer.lr")
            )
        if ranks.is_first:
            LOGGER.warning(f"{why}: back to step {state.step}, on with the text that comes next")
        self.metrics.resume_after(state.step)
        self.logged, self.step_began = Totals.of(state), time.perf_counter()


def prefetches(device: torch.device) -> bool:
    """Whether batches are made while others are trained on: on a CPU both would want the same cores."""
    return device.type == "cuda"
