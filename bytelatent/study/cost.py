"""What equal means: the training FLOPs of a run are everything that runs for a byte that it reads.

- Three times the forward pass of the model: all matrices, attention and the output layer included.
- Once the forward pass of the frozen entropy model that finds patches, also where its entropies are stored.
- Nothing for hash tables and embeddings, which are looked up: they are counted as memory.

What training the entropy model costs is stated beside. A patch, a token and a document's piece are as large as they are
in the batches that a model reads, by measurement; `docs/study/equal.md` has the formulas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pydantic import Field

from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.model import ModelSettings
from bytelatent.model.flops import TABLES, costs, flops_per_byte
from bytelatent.study.plan import Draft, StudyPlan, budget_name
from bytelatent.training import TrainSettings

ENTROPY_MODEL = "entropy model"  # a part of the cost
LOOKED_UP = {TABLES, "embedding", "byte embedding"}  # parts that compute nothing
TRAINING = 3  # forward passes that a forward and a backward pass cost
BYTES_PER_WEIGHT = 4  # float32, as weights are trained


class MeasuredText(Settings):
    """What batches of training text hold for a family.

    Attributes:
        unit_bytes: mean bytes of a patch, or of a token of a token LM; 1 of a flat byte LM.
        batch_bytes: mean bytes of text that a batch predicts.
        context_bytes: the context over which attention costs as much as over the pieces of documents in batches: one
            more than twice the mean position, in bytes.
        patch_bytes: the patch or token that `data.patch_bytes` expects, where the plan leaves it out.
        threshold: that calibration chose, in nats.
        text_bytes: that were measured.
        is_expected: the tokenizer or entropy model is not there yet, and something stood in for it.
    """

    unit_bytes: float = Field(ge=1)
    batch_bytes: float = Field(gt=0)
    context_bytes: float = Field(ge=1)
    patch_bytes: float | None = None
    threshold: float | None = None
    text_bytes: int = Field(ge=1)
    is_expected: bool = False


@dataclass(frozen=True)
class RunCost:
    """Parameters by part, hash tables apart, and FLOPs per byte."""

    parameters: dict[str, int]
    table_parameters: int
    training_flops_per_byte: dict[str, float]  # by part
    inference_flops_per_byte: float

    @property
    def table_bytes(self) -> int:
        return BYTES_PER_WEIGHT * self.table_parameters

    @property
    def flops_per_byte(self) -> float:
        """Of training, all parts together."""
        return sum(self.training_flops_per_byte.values())

    @property
    def non_embedding_parameters(self) -> int:
        return sum(count for part, count in self.parameters.items() if part not in LOOKED_UP)


def run_cost(
    model: ModelSettings, unit_bytes: float, context_bytes: float, entropy_model: ModelSettings | None = None
) -> RunCost:
    """What a model costs.

    Args:
        unit_bytes: mean bytes per patch, or per token of a token LM.
        context_bytes: over which attention is averaged.
        entropy_model: that finds its patches.
    """
    context = round(context_bytes)
    parts = costs(model, unit_bytes, context)
    training = {part.name: TRAINING * part.flops_per_byte for part in parts if part.flops_per_byte}
    inference = sum(part.flops_per_byte for part in parts)
    if entropy_model is not None:
        training[ENTROPY_MODEL] = flops_per_byte(entropy_model, context=context)
        inference += training[ENTROPY_MODEL]
    parameters = {part.name: part.num_parameters for part in parts}
    return RunCost(parameters, parameters.pop(TABLES, 0), training, inference)


@dataclass(frozen=True)
class PlannedRun:
    """A run of which everything is known before it begins."""

    draft: Draft
    measured: MeasuredText
    cost: RunCost
    train_bytes: int  # of the training text
    warmup_share: float
    others: Sequence["PlannedRun"] = field(default=(), repr=False)  # sizes that were not picked

    @property
    def name(self) -> str:
        return self.draft.name

    @property
    def bytes_per_step(self) -> float:
        return self.measured.batch_bytes * self.draft.settings.optimizer.accumulation

    @property
    def flops_per_step(self) -> float:
        return self.bytes_per_step * self.cost.flops_per_byte

    @cached_property
    def steps(self) -> int:
        """As many as come nearest to the budget."""
        return round(self.draft.budget / self.flops_per_step)

    @property
    def num_bytes(self) -> float:
        return self.steps * self.bytes_per_step

    @property
    def training_flops(self) -> float:
        return self.steps * self.flops_per_step

    @property
    def epochs(self) -> float:
        return self.num_bytes / self.train_bytes

    @property
    def settings(self) -> TrainSettings:
        """All settings of the training."""
        draft, measured = self.draft, self.measured
        values = draft.settings.plain()
        values["steps"] = self.steps
        if "optimizer.warmup_steps" not in draft.given:
            values["optimizer"]["warmup_steps"] = round(self.warmup_share * self.steps)
        if measured.patch_bytes is not None:
            values["data"]["patch_bytes"] = measured.patch_bytes
        if measured.threshold is not None:
            values["patching"]["threshold"], values["calibration"] = measured.threshold, None
        return TrainSettings.parse(values, draft.where)

    def check(self, max_epochs: float) -> None:
        """
        Raises:
            UserError: the budget is too small for a step, or needs more text than the run may read.
        """
        draft, budget = self.draft, budget_name(self.draft.budget)
        if self.steps < 1:
            raise UserError(
                f"{draft.where}: the budget {budget} is less than half a step of '{self.name}', which costs "
                f"{self.flops_per_step:.3g} FLOPs; give a larger budget, or a smaller data.batch_bytes"
            )
        if self.epochs > max_epochs:
            raise UserError(
                f"{draft.where}: at the budget {budget} '{self.name}' reads {self.num_bytes:,.0f} bytes, "
                f"{self.epochs:.2f} times the training text, and max_epochs is {max_epochs:g}; give a larger model "
                "there, more text, or more max_epochs"
            )


def picked(plan: StudyPlan, sizes: list[PlannedRun]) -> PlannedRun:
    """The size that a run gets: the only one, or that whose bytes per parameter are nearest to what is wanted.

    Raises:
        UserError: none can be run.
    """
    wanted = sizes[0].draft.bytes_per_parameter
    if len(sizes) == 1 or wanted is None:
        sizes[0].check(plan.max_epochs)
        return sizes[0]
    possible = [size for size in sizes if size.steps >= 1 and size.epochs <= plan.max_epochs]
    if not possible:
        min(sizes, key=lambda size: size.epochs).check(plan.max_epochs)
    best = min(
        possible,
        key=lambda size: abs(math.log(size.num_bytes / size.cost.non_embedding_parameters / wanted)),
    )
    others = [size for size in sizes if size is not best]
    return PlannedRun(best.draft, best.measured, best.cost, best.train_bytes, best.warmup_share, others)
