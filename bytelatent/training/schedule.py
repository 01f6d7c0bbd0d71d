"""The learning rate from step to step: warm-up, then from the peak down to the minimum at the end of the run.

`SCHEDULES` is the table of schedules. To add one, add its name to `ScheduleName`, its row to the table, and settings
that it takes to `ScheduleSettings`.

What is stored is the share of the decay that is over. Each step takes an even part of the rest: one of the steps that
are left, or under `minutes` of those that fit into the time that is left. So the rate starts to fall from its peak when
warm-up ends and is at its minimum in the last step, and it does not leap when a step takes long, or when a run gets
another end: it continues from where it is.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from bytelatent.config import Settings

ScheduleName = Literal["cosine", "wsd"]

RECENT = 20  # steps whose time says how many fit into the time that is left
OUTLIER = 4  # times the median step, or the last one: a longer step, as on a busy machine, is no sign of the end


class ScheduleSettings(Settings):
    """Linear warm-up, then a decay to `final_lr_ratio` of the peak.

    Attributes:
        lr: the peak.
        schedule: `cosine` decays from the end of warm-up to the end of the run; `wsd` (warmup-stable-decay) keeps the
            peak until the decay begins, and decays linearly.
        decay_share: with `wsd`, the share of the run, at its end, that decays;
        decay_steps, decay_minutes: its length instead, in the unit of the run's own.
    """

    lr: float = Field(default=4e-4, gt=0)
    schedule: ScheduleName = "cosine"
    warmup_steps: int = Field(default=2000, ge=0)
    decay_share: float = Field(default=0.2, gt=0, le=1)
    decay_steps: int | None = Field(default=None, ge=1)
    decay_minutes: float | None = Field(default=None, gt=0)
    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _of_its_schedule(self) -> Self:
        for other, form in SCHEDULES.items():
            for name in form.settings:
                is_set = getattr(self, name) != type(self).model_fields[name].default
                if is_set and name not in SCHEDULES[self.schedule].settings:
                    raise ValueError(f"{name} is for schedule={other}, and schedule={self.schedule} does not take it")
        return self


@dataclass(frozen=True)
class ScheduleForm:
    """How the rate of a schedule falls.

    Attributes:
        height: where the rate is between the peak, 1, and the minimum, 0, by the share of the decay that is over.
        decayed_at: its inverse.
        decay: how long the decay takes, by the settings, the length of the run, and 1 for a run in steps or 60 (a
            minute) for one in seconds.
        settings: fields of `ScheduleSettings` that only some schedules take, of those this one's.
    """

    height: Callable[[float, ScheduleSettings], float]
    decayed_at: Callable[[float, ScheduleSettings], float]
    decay: Callable[[ScheduleSettings, float, float], float]
    settings: tuple[str, ...] = ()


def _last_part(settings: ScheduleSettings, total: float, unit: float) -> float:
    """The decay of a schedule that keeps the peak for a while."""
    length = settings.decay_steps if unit == 1 else settings.decay_minutes
    return settings.decay_share * total if length is None else unit * length


SCHEDULES: dict[str, ScheduleForm] = {
    "cosine": ScheduleForm(
        height=lambda decayed, _: (1 + math.cos(math.pi * decayed)) / 2,
        decayed_at=lambda height, _: math.acos(min(max(2 * height - 1, -1.0), 1.0)) / math.pi,
        decay=lambda _settings, total, _unit: total,
    ),
    "wsd": ScheduleForm(
        height=lambda decayed, _: 1 - decayed,
        decayed_at=lambda height, _: 1 - height,
        decay=_last_part,
        settings=("decay_share", "decay_steps", "decay_minutes"),
    ),
}


def learning_rate(step: int, decayed: float, settings: ScheduleSettings) -> float:
    """Linear warm-up, then from the peak down to `final_lr_ratio` of it.

    Args:
        step: 0, 1, ...
        decayed: how much of the decay is over, 0 to 1.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    height = SCHEDULES[settings.schedule].height(min(max(decayed, 0.0), 1.0), settings)
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
        self, step: int, seconds: float, settings: ScheduleSettings, steps: int | None, minutes: float | None
    ) -> float:
        """Advance to the next step; how much of the decay is over in it.

        Args:
            step: steps done.
            seconds: spent in them.
            steps, minutes: the length of the run, one of them.
        """
        if self.kind != settings.schedule:  # changed in a running run, whose rate stays where it is
            height = SCHEDULES[self.kind].height(self.decayed, settings)
            self.decayed = SCHEDULES[settings.schedule].decayed_at(height, settings)
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
        return {"decayed": self.decayed, "kind": self.kind, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decayed, self.kind, self.recent = state["decayed"], state["kind"], list(state["recent"])
