"""The optimizer, and its learning rate from step to step.

AdamW trains all weights; or Muon the matrices of the blocks and AdamW the rest. Hash tables whose gradients are sparse
have an optimizer of their own, `SparseRowsAdamW`.

The learning rate warms up, then falls from its peak to the minimum at the end of the run. `SCHEDULES` is the table of
schedules. To add one, add its row there, and in `settings` its name and the settings that only it takes.

What is stored is the share of the decay that is over. Each step takes an even part of the rest: one of the steps that
are left, or under `minutes` of those that fit into the time that is left. So the rate starts to fall from its peak when
warm-up ends and is at its minimum in the last step, and it does not leap when a step takes long, or when a run gets
another end: it continues from where it is.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from bytelatent.kernels.hash_embed import coalesced, row_adamw
from bytelatent.model import Block, CrossAttention
from bytelatent.training.distributed.plan import local_part
from bytelatent.training.settings import LearningRateScale, OptimizerSettings

# Shapes: R rows of a table, U rows of it in a step's gradient, D width

RECENT = 20  # steps whose time gives how many fit into the time that is left
OUTLIER = 4  # times the median step, or the last one: a longer step, as on a busy machine, is no sign of the end


class AdamW(torch.optim.AdamW):
    """torch's, on what this rank holds of each weight: by way of DTensor the host takes longer than the GPU."""

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> bool:
        is_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local_part, tensors)
        return is_complex


class SparseRowsAdamW(torch.optim.Optimizer):
    """AdamW that updates only the rows of a table that the gradient holds, which is a sparse tensor of rows.

    Each row is trained as `torch.optim.AdamW` would train it alone in the steps that read it, as if there were no
    others. AdamW over the whole table differs in the steps that do not read a row: there it lets the row's moments
    fade, moves the row by the rest of them, and decays the row's weights. And its bias correction counts all steps, so
    that a row that comes late starts slowly.

    The moments are as large as the table.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            for table_RD in group["params"]:
                if table_RD.grad is None:
                    continue
                assert table_RD.grad.is_sparse, "the gradient is dense"
                state = self.state[table_RD]
                if not state:
                    # In floats, which count exactly to 2^24, as a state that is loaded is made the table's dtype.
                    state["seen"] = table_RD.new_zeros(table_RD.shape[0])
                    state["exp_avg"] = torch.zeros_like(table_RD)
                    state["exp_avg_sq"] = torch.zeros_like(table_RD)
                gradient = coalesced(table_RD.grad)
                rows_U = gradient.indices()[0]
                count_U = state["seen"][rows_U] + 1
                state["seen"][rows_U] = count_U
                row_adamw(
                    table_RD,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    rows_U,
                    gradient.values(),
                    count_U,
                    lr=group["lr"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )


class Optimizers:
    """Several optimizers, each of its own weights, used as one."""

    def __init__(self, optimizers: dict[str, torch.optim.Optimizer]):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def each(optimizer: torch.optim.Optimizer | Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers that it is made of."""
    return list(optimizer.optimizers.values()) if isinstance(optimizer, Optimizers) else [optimizer]


def build_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer | Optimizers:
    """The optimizer of all weights; only matrices decay, norms and embeddings do not.

    With `hash_gradients: rows` it makes the gradients of the model's hash tables sparse.

    Each parameter group has its `lr_scale`, the factor of its learning rate.
    """
    tables = {part.weight: part for part in model.modules() if isinstance(part, nn.EmbeddingBag)}
    for part in tables.values():
        part.sparse = settings.hash_gradients == "rows"
    embeddings = {part.weight for part in model.modules() if isinstance(part, nn.Embedding)} | tables.keys()
    blocks = [part for part in model.modules() if isinstance(part, Block | CrossAttention)]
    of_blocks = {parameter for block in blocks for parameter in block.parameters()}

    groups: dict[str, dict[tuple[float, float], list[nn.Parameter]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() >= 2 and parameter not in embeddings
        if parameter in tables and settings.hash_gradients == "rows":
            kind = "rows"
        elif settings.name == "muon" and is_matrix and parameter in of_blocks:
            kind = "muon"
        else:
            kind = "adamw"
        decay = settings.weight_decay if is_matrix else 0.0
        groups[kind][decay, _scale(name, settings.lr_scale)].append(parameter)

    optimizers = {kind: _optimizer(kind, groups[kind], settings) for kind in sorted(groups)}
    return Optimizers(optimizers) if len(optimizers) > 1 else optimizers["adamw"]


def _optimizer(
    kind: str, groups: dict[tuple[float, float], list[nn.Parameter]], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    given = [
        {"params": parameters, "weight_decay": decay, "lr": settings.lr * scale, "lr_scale": scale}
        for (decay, scale), parameters in groups.items()
    ]
    if kind == "muon":  # its steps are scaled to the size of AdamW's, so that both share a learning rate
        return torch.optim.Muon(given, adjust_lr_fn="match_rms_adamw")
    betas = (settings.beta1, settings.beta2)
    return SparseRowsAdamW(given, betas=betas) if kind == "rows" else AdamW(given, betas=betas, fused=True)


def _scale(name: str, scales: LearningRateScale) -> float:
    """What the learning rate of a weight is multiplied with, by the part of the model that its name begins with."""
    of_parts = {
        "embedding.": scales.byte_embedding,
        "encoder.embedding.": scales.byte_embedding,
        "encoder.ngram_hash.": scales.hash_tables,
        "encoder.": scales.encoder,
        "global_transformer.": scales.global_transformer,
        "decoder.": scales.decoder,
    }
    return next((scale for part, scale in of_parts.items() if name.startswith(part)), 1.0)


@dataclass(frozen=True)
class ScheduleForm:
    """How the rate of a schedule falls.

    Attributes:
        height: where the rate is between the peak, 1, and the minimum, 0, by the share of the decay that is over.
        decayed_at: its inverse.
        decay: how long the decay takes, by the settings, the length of the run, and 1 for a run in steps or 60 (a
            minute) for one in seconds.
    """

    height: Callable[[float], float]
    decayed_at: Callable[[float], float]
    decay: Callable[[OptimizerSettings, float, float], float]


def _last_part(settings: OptimizerSettings, total: float, unit: float) -> float:
    """The decay of a schedule that keeps the peak for a while."""
    length = settings.decay_steps if unit == 1 else settings.decay_minutes
    return settings.decay_share * total if length is None else unit * length


SCHEDULES: dict[str, ScheduleForm] = {
    "cosine": ScheduleForm(
        height=lambda decayed: (1 + math.cos(math.pi * decayed)) / 2,
        decayed_at=lambda height: math.acos(min(max(2 * height - 1, -1.0), 1.0)) / math.pi,
        decay=lambda _settings, total, _unit: total,
    ),
    "wsd": ScheduleForm(height=lambda decayed: 1 - decayed, decayed_at=lambda height: 1 - height, decay=_last_part),
}


def learning_rate(step: int, decayed: float, settings: OptimizerSettings) -> float:
    """Linear warm-up, then from the peak down to `final_lr_ratio` of it.

    Args:
        step: 0, 1, ...
        decayed: how much of the decay is over, 0 to 1.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    height = SCHEDULES[settings.schedule].height(min(max(decayed, 0.0), 1.0))
    return settings.lr * (settings.final_lr_ratio + (1 - settings.final_lr_ratio) * height)


@dataclass
class Schedule:
    """Where a run is between the peak and the minimum.

    Attributes:
        decayed: how much of the decay is over, 0 to 1.
        kind: the schedule that `decayed` belongs to.
        recent: seconds of the last steps, by the first rank's clock.
    """

    decayed: float = 0.0
    kind: str = "cosine"
    recent: list[float] = field(default_factory=list)

    def begin_step(
        self, step: int, seconds: float, settings: OptimizerSettings, steps: int | None, minutes: float | None
    ) -> float:
        """Advance to the next step; how much of the decay is over in it.

        Args:
            step: steps done.
            seconds: spent in them.
            steps, minutes: the length of the run, one of them.
        """
        if self.kind != settings.schedule:  # changed in a running run, whose rate stays where it is
            height = SCHEDULES[self.kind].height(self.decayed)
            self.decayed = SCHEDULES[settings.schedule].decayed_at(height)
            self.kind = settings.schedule
        # In steps, or in seconds: all of the run, this step and those after it, one step, and the unit of the settings.
        if steps is not None:
            total, left, one, unit = steps, steps - step, 1.0, 1.0
        else:
            assert minutes is not None
            total = 60 * minutes
            left, one, unit = total - seconds, self._step_seconds(), 60.0
        if step > settings.warmup_steps and left <= SCHEDULES[settings.schedule].decay(settings, total, unit):
            self.decayed += (1 - self.decayed) * (one / left if one < left else 1.0)
        return self.decayed

    def end_step(self, seconds: float) -> None:
        """Record how long a step took."""
        self.recent = [*self.recent[1 - RECENT :], seconds]

    def _step_seconds(self) -> float:
        """How long a step takes; 0 as long as none was timed."""
        if not self.recent:
            return 0.0
        usual = min(statistics.median(self.recent), self.recent[-1])
        return min(statistics.fmean(self.recent), OUTLIER * usual)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decayed, self.kind, self.recent = state["decayed"], state["kind"], list(state["recent"])
