"""What each rank does in tests of several: a few steps, on batches that are the same for any number of ranks."""

import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelatent import log
from bytelatent.data import Batch, Loader, Patcher
from bytelatent.device import autocast
from bytelatent.errors import Interrupted, UserError
from bytelatent.model.loss import cross_entropy
from bytelatent.training import TrainSettings, train
from bytelatent.training import trainer as loop
from bytelatent.training.checkpoint.manager import CheckpointManager, TrainState
from bytelatent.training.distributed import parallelize
from bytelatent.training.distributed.parallelize import (
    ParallelPlan,
    build_parallel_model,
    free_gathered_weights,
    initialize_weights,
    make_plan,
)
from bytelatent.training.distributed.ranks import open_ranks
from bytelatent.training.gradients import Gradients
from bytelatent.training.initial import identity_of, load_initial, open_initial
from bytelatent.training.optimizer import Optimizers, build_optimizer, catch_up, single_optimizers
from bytelatent.training.schedule import learning_rate
from bytelatent.training.settings import OptimizerSettings
from bytelatent.weights import Config, load_byte_lm
from tests.training.tiny_runs import BLT, byte_lm_run, settings

OF_LLAMAS = {"num_kv_heads": 2, "attention_bias": True, "qk_norm": True}
MODEL = {**BLT, "global_transformer": {**BLT["global_transformer"], "num_layers": 2, "num_heads": 4, **OF_LLAMAS}}
PLANS = {
    "shard": (2, {"data": "shard"}),
    "replicate": (2, {"data": "replicate", "tables": "gather"}),
    "tensor": (2, {"tensor": 2}),
    "shard x tensor": (4, {"data": "shard", "tensor": 2}),
    "replicate x tensor": (4, {"data": "replicate", "tensor": 2}),
    "hybrid": (4, {"data": "hybrid", "replicas": 2, "tables": "gather"}),
}
BATCHES = 4  # in a step, over all ranks
AT_ONCE = 13_000  # weights that are gathered together: a local model's, or one block of the global transformer


def values(text: Path, run: Path | str = "x", **more: Any) -> dict[str, Any]:
    """A BLT's run that the plans divide."""
    optimizer = {"lr": 3e-3, "warmup_steps": 0, "clip": 1e9}
    own = {"model": MODEL, "patching": {"mode": "space"}, "optimizer": optimizer}
    return byte_lm_run(Path(run), text, **{**own, **more})


@dataclass
class Taken:
    """What some steps gave, the same on each rank, and where this one's weights lie."""

    rows: list[dict[str, Any]]
    gradients: dict[str, torch.Tensor]  # of the first step
    weights: dict[str, torch.Tensor]
    initial: dict[str, torch.Tensor]
    held: dict[str, tuple[int, ...]]  # shapes of this rank's own parts
    gathered: dict[str, tuple[int, ...]]  # after a validation


class Batches:
    """In place of a loader: batches that are counted."""

    def __init__(self, asked: TrainSettings, patcher: Patcher | None, plan: ParallelPlan):
        self.share = BATCHES // plan.data_world_size
        self.batches = Loader(asked.data, 0, patcher)
        self.plan, self.taken = plan, 0

    def __next__(self) -> Batch:
        while True:
            batch, number = next(self.batches), self.taken
            self.taken += 1
            if number // self.share % self.plan.data_world_size == self.plan.data_rank:
                return batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def redistribute(self, states: list[dict[str, Any]]) -> str:
        return ""

    def pass_over(self, steps: int) -> None:
        for _ in range(BATCHES * steps):
            next(self.batches)


def take_steps(values: dict[str, Any], steps: int = 3, run: Path | None = None) -> Taken:
    """Train as the settings say, with `BATCHES` batches a step divided among the ranks.

    Args:
        run: go on from its checkpoint, where it has one, and leave one at the end.
    """
    asked = settings(values)
    with open_ranks("cpu", 1) as (ranks, device):
        plan = make_plan(asked.parallel, ranks, device)
        torch.manual_seed(0)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked.dtype]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallelize, "GROUP_WEIGHTS", AT_ONCE)
            scales = asked.optimizer.lr_scale
            model = build_parallel_model(
                asked.model, plan, device, dtype, compiled=False, is_frozen=lambda name: scales.of(name) == 0
            )
        if asked.init is None:
            initialize_weights(model, asked.model)
        else:
            load_initial(model, asked.init, identity_of(open_initial(asked)), ranks)
        initial = whole(model)
        byte_lm = load_byte_lm(asked.entropy_model) if asked.entropy_model is not None else None
        patcher = Patcher(asked.patching, byte_lm) if asked.patching is not None else None
        optimizer = {**asked.optimizer.plain(), "accumulation": BATCHES // plan.data_world_size}
        asked = asked.model_copy(update={"optimizer": type(asked.optimizer).parse(optimizer)})
        batches = Batches(asked, patcher, plan)
        optimizers = build_optimizer(model, asked.optimizer)
        state = TrainState(model, optimizers, batches)  # type: ignore[arg-type]
        checkpoints = None
        if run is not None:
            config = Config(model=asked.model, context=asked.data.context, patching=asked.patching)
            checkpoints = CheckpointManager(run, config, asked.checkpoint, plan, ranks.world_size > 1)
            if checkpoints.resume(state):
                batches.pass_over(state.step)

        def loss(batch: Batch) -> torch.Tensor:
            with autocast(device, dtype):
                return cross_entropy(model, batch)

        rows, gradients = [], {}
        while state.step < steps:
            rows.append(loop.Trainer(asked, plan, state, Gradients(loss, device)).train_step())
            if not gradients:
                named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
                gradients = {name: first_gradient(value, optimizers) for name, value in named}
        catch_up(optimizers)
        held = {name: tuple(_own(value).shape) for name, value in model.named_parameters()}
        valid = next(Loader(asked.data, 1, patcher))
        with torch.no_grad():
            loss(valid)
        free_gathered_weights(model)
        gathered = {name: tuple(_own(value).shape) for name, value in model.named_parameters()}
        if checkpoints is not None:
            checkpoints.save(state, is_last=ranks.world_size == 4, is_needed=True)
        return Taken(rows, gradients, whole(model), initial, held, gathered)


def first_gradient(weight: torch.nn.Parameter, optimizers: torch.optim.Optimizer | Optimizers) -> torch.Tensor:
    """From what the optimizer has after its first step."""
    [(one, state)] = [(one, one.state[weight]) for one in single_optimizers(optimizers) if weight in one.state]
    if "momentum_buffer" in state:
        return _whole(state["momentum_buffer"]) / (1 - one.defaults["momentum"])
    return _whole(state["exp_avg"]) / (1 - one.defaults["betas"][0])


def train_as(
    values: dict[str, Any], cut_off_after: int | None = None, signalled: tuple[int, int] | None = None
) -> list[str]:
    """Train as the command does; what was printed.

    Args:
        cut_off_after: end after so many steps, and the first checkpoint, without a word.
        signalled: a rank that is sent SIGTERM, and after how many steps.
    """
    with StringIO() as out, redirect_stdout(out), redirect_stderr(out), pytest.MonkeyPatch.context() as patch:
        log.configure()

        def rate(step: int, progress: float, optimizer: OptimizerSettings) -> float:
            if step == cut_off_after:
                for _ in range(600):  # a save in the background may still be under way
                    if any((Path(values["run"]) / "checkpoints").glob("step-*")):
                        break
                    time.sleep(0.1)
                raise CutOffError
            if (int(os.environ.get("RANK", "0")), step) == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            return learning_rate(step, progress, optimizer)

        patch.setattr(loop, "learning_rate", rate)
        log.configure()
        try:
            train(settings(values))
        except (UserError, Interrupted) as error:
            out.write(f"{type(error).__name__}: {error}\n")
        except CutOffError:
            pass
        except SystemExit as ended:
            out.write(f"exit code {ended.code}\n")
        return out.getvalue().splitlines()


class CutOffError(SystemExit):
    """Stands for the end of the process."""


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: _whole(value) for name, value in model.named_parameters()}


def _whole(value: Any) -> torch.Tensor:
    value = value.detach()
    return value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()


def _own(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value
