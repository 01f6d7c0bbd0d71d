"""What each rank does in tests of several: a few steps, on batches that are the same for any number of ranks."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from bytelatent.data import Batch, Loader, Patcher, surprise
from bytelatent.device import autocast
from bytelatent.training import loop
from bytelatent.training.checkpoint import TrainState
from bytelatent.training.optimizer import build_optimizer
from bytelatent.training.parallel import build_spread, draw_weights, make_plan
from bytelatent.training.ranks import open_ranks
from tests.training.tiny_runs import settings

BATCHES = 4  # in a step, over all ranks


@dataclass
class Taken:
    """What some steps gave, the same on each rank, and where this one's weights lie."""

    rows: list[dict[str, Any]]
    gradients: dict[str, torch.Tensor]  # of the first step
    weights: dict[str, torch.Tensor]
    initial: dict[str, torch.Tensor]
    held: dict[str, tuple[int, ...]]  # shapes of this rank's own parts
    gathered: dict[str, tuple[int, ...]]  # after a validation


def take_steps(values: dict[str, Any], steps: int = 3) -> Taken:
    """Train as the settings say, with `BATCHES` batches a step divided among the ranks."""
    rule = settings(values)
    with open_ranks("cpu", 1) as (ranks, device):
        plan = make_plan(rule.parallel, rule.model, ranks, device)
        torch.manual_seed(0)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[rule.dtype]
        model = build_spread(rule.model, plan, device, dtype, compiled=False)
        draw_weights(model, rule.model, plan)
        initial = whole(model)
        patcher = Patcher(rule.patching) if rule.patching is not None else None
        share = BATCHES // plan.data_world
        optimizer = {**rule.optimizer.plain(), "accumulation": share}
        rule = rule.model_copy(update={"optimizer": type(rule.optimizer).parse(optimizer)})
        batches = islice(Loader(rule.data, 0, patcher), BATCHES * steps)
        own = (batch for number, batch in enumerate(batches) if number // share % plan.data_world == plan.data_rank)
        adam = build_optimizer(model, rule.optimizer)
        state = TrainState(model, adam, own)  # type: ignore[arg-type]

        def loss(batch: Batch) -> torch.Tensor:
            with autocast(device, dtype):
                return surprise(model, batch)

        rows, gradients = [], {}
        for _ in range(steps):
            rows.append(loop._step(state, rule, loss, device, plan))
            if not gradients:
                scale = 1 / (1 - rule.optimizer.beta1)
                named = list(model.named_parameters())
                gradients = {name: _whole(adam.state[value]["exp_avg"]) * scale for name, value in named}
        held = {name: tuple(_own(value).shape) for name, value in model.named_parameters()}
        valid = next(Loader(rule.data, 1, patcher))
        with torch.no_grad():
            loss(valid)
        plan.let_go(model)
        gathered = {name: tuple(_own(value).shape) for name, value in model.named_parameters()}
        return Taken(rows, gradients, whole(model), initial, held, gathered)


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: _whole(value) for name, value in model.named_parameters()}


def _whole(value: Any) -> torch.Tensor:
    value = value.detach()
    return value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()


def _own(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value
