"""Learning-rate schedules: a linear warm-up, then the decay of one of `SCHEDULES`, over a run in steps or in minutes.

To add a schedule, add its row to `SCHEDULES`, and in `settings` its name and the settings that only it takes.

What is stored is the share of the decay that is over. Each step takes an even part of the rest: one of the steps that
are left, or under `minutes` of those that fit into the time that is left. So the rate starts to fall from its peak when
warm-up ends and is at its minimum in the last step, and it does not leap when a step takes long, or when a run gets
another end: it continues from where it is.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from bytelatent.training.settings import OptimizerSettings

RECENT = 20  # steps whose time gives how many fit into the time that is left
OUTLIER = 4  # times the median step, or the last one: a longer step, as on a busy machine, is no sign of the end


@dataclass(frozen=True)
class Decay:
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


SCHEDULES: dict[str, Decay] = {
    "cosine": Decay(
        height=lambda decayed: (1 + math.cos(math.pi * decayed)) / 2,
        decayed_at=lambda height: math.acos(min(max(2 * height - 1, -1.0), 1.0)) / math.pi,
        decay=lambda _settings, total, _unit: total,
    ),
    "wsd": Decay(height=lambda decayed: 1 - decayed, decayed_at=lambda height: 1 - height, decay=_last_part),
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
