"""The learning rate from step to step: warm-up, then from the peak down to the minimum at the end of the run.

What is kept is the share of the decay that is over. Each step takes an even part of the rest: one of the steps that are
left, or under `minutes` of those that fit into the time that is left. So the rate starts to fall from its peak when
warm-up ends and is at its minimum in the last step, and it does not leap when a step takes long, or when a run gets
another end: it goes on from where it is.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from bytelatent.training.optimizer import decayed_at, height
from bytelatent.training.settings import TrainSettings

RECENT = 20  # steps whose time says how many fit into the time that is left
OUTLIER = 4  # times the median step, or the last one: what took longer, as on a busy machine, is no sign of the end


@dataclass
class Schedule:
    """Where a run is between the peak and the minimum.

    Attributes:
        decayed: how much of the decay is over, 0 to 1.
        kind: the `optimizer.schedule` that `decayed` belongs to.
        recent: seconds of the last steps, by the first rank's clock.
    """

    decayed: float = 0.0
    kind: str = "cosine"
    recent: list[float] = field(default_factory=list)

    def begin_step(self, step: int, seconds: float, settings: TrainSettings) -> float:
        """Advance to the next step; how much of the decay is over in it.

        Args:
            step: steps done.
            seconds: spent in them.
        """
        optimizer = settings.optimizer
        if self.kind != optimizer.schedule:  # changed in a running run, whose rate stays where it is
            self.decayed = decayed_at(height(self.decayed, self.kind), optimizer.schedule)
            self.kind = optimizer.schedule
        # In steps, or in seconds: this step and those after it, all of the run, its decay, and one step.
        if settings.steps is not None:
            left, total, decay, one = settings.steps - step, settings.steps, optimizer.decay_steps, 1.0
        else:
            assert settings.minutes is not None
            total = 60 * settings.minutes
            left, decay, one = total - seconds, optimizer.decay_minutes, self._step_seconds()
            decay = None if decay is None else 60 * decay
        if optimizer.schedule == "cosine":
            decay = total
        elif decay is None:
            decay = optimizer.decay_share * total
        if step > optimizer.warmup_steps and left <= decay:
            self.decayed += (1 - self.decayed) * (one / left if one < left else 1.0)
        return self.decayed

    def end_step(self, seconds: float) -> None:
        """Take note of how long a step took."""
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
