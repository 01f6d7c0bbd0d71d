"""The learning rate under a clock that the tests set: from its peak, without leaps, to its minimum."""

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from bytelatent.errors import UserError
from bytelatent.training import read_metrics, train
from bytelatent.training import trainer as loop
from bytelatent.training.schedule import SCHEDULES, Schedule, learning_rate
from bytelatent.training.settings import OF_ONE_SCHEDULE, OptimizerSettings, ScheduleName, TrainSettings
from tests.training.crew import Crew
from tests.training.plans import values as values_of_many
from tests.training.tiny_runs import assert_equal_runs, byte_lm_run, losses, settings

PEAK, MINIMUM, WARMUP = 4e-3, 4e-4, 10


def run_by(optimizer: dict[str, Any] | None = None, **end: Any) -> TrainSettings:
    """Settings of a run that ends by `steps` or `minutes`."""
    optimizer = {"lr": PEAK, "final_lr_ratio": MINIMUM / PEAK, "warmup_steps": WARMUP, **(optimizer or {})}
    return settings({**byte_lm_run(Path("x"), Path("x")), "optimizer": optimizer, "steps": None, **end})


def rates(
    asked: TrainSettings,
    durations: Iterable[float],
    schedule: Schedule | None = None,
    step: int = 0,
    seconds: float = 0.0,
    stop_after: int | None = None,
) -> list[float]:
    """The rate of each step until the run ends, or so many were made; the first step of a start is not timed.

    Args:
        durations: of the steps, in seconds.
        schedule, step, seconds: what a checkpoint says.
    """
    schedule = schedule or Schedule()
    found: list[float] = []
    for duration in durations:
        over = step >= asked.steps if asked.steps is not None else seconds >= 60 * (asked.minutes or 0)
        if over or len(found) == stop_after:
            break
        decayed = schedule.begin_step(step, seconds, asked.optimizer, asked.steps, asked.minutes)
        found.append(learning_rate(step, decayed, asked.optimizer))
        if len(found) > 1:
            seconds += duration
            schedule.end_step(duration)
        step += 1
    return found


def steepest(decay_steps: float) -> float:
    """The most that a cosine falls in one of so many steps."""
    return (PEAK - MINIMUM) * math.pi / 2 / decay_steps


@pytest.mark.parametrize("duration", [3.6, 0.61, 0.013], ids=["slow", "middling", "fast"])
def test_by_the_clock_it_falls_from_its_peak_to_its_minimum(duration: float) -> None:
    found = rates(run_by(minutes=1), itertools.repeat(duration))
    assert found[:WARMUP] == pytest.approx([PEAK * (n + 1) / WARMUP for n in range(WARMUP)])
    falling = found[WARMUP:]
    assert falling[0] == PEAK
    assert falling[-1] == pytest.approx(MINIMUM, rel=1e-3)
    assert all(earlier > later for earlier, later in pairwise(falling))
    assert max(a - b for a, b in pairwise(falling)) <= steepest(len(falling) - 2)
    middle = falling[len(falling) // 2]  # of the time after warm-up, not of the run
    assert middle == pytest.approx((PEAK + MINIMUM) / 2, abs=steepest(len(falling) - 2))


def test_a_warm_up_that_takes_most_of_the_time_ends_at_the_peak() -> None:
    durations = [*[5.8] * WARMUP, *[0.05] * 1000]
    falling = rates(run_by(minutes=1), durations)[WARMUP:]
    assert falling[0] == PEAK
    assert max(a - b for a, b in pairwise(falling)) < 0.1 * PEAK
    assert falling[-1] == pytest.approx(MINIMUM, rel=0.02)


def jittery(draw: random.Random) -> Iterator[float]:
    while True:
        yield 0.05 * draw.lognormvariate(0, 0.6)


def with_a_pause(_: random.Random) -> Iterator[float]:
    return itertools.chain([0.05] * 400, [15.0], itertools.repeat(0.05))


def ever_slower(_: random.Random) -> Iterator[float]:
    return (0.01 * 1.005**n for n in itertools.count())


def slow_for_a_while(_: random.Random) -> Iterator[float]:
    return itertools.chain([0.05] * 300, [0.6] * 40, itertools.repeat(0.05))


def some_longer(_: random.Random) -> Iterator[float]:
    return itertools.cycle([0.03, 0.03, 0.03, 0.2])


@pytest.mark.parametrize("clock", [jittery, with_a_pause, ever_slower, slow_for_a_while, some_longer])
def test_a_clock_that_jitters_makes_no_leaps(clock: Any) -> None:
    found = rates(run_by(minutes=1), clock(random.Random(0)))
    falling = found[WARMUP:]
    assert len(falling) > 300
    assert falling[0] == PEAK
    assert all(earlier >= later for earlier, later in pairwise(falling))
    assert max(a - b for a, b in pairwise(falling)) < 0.04 * PEAK
    assert falling[-1] == pytest.approx(MINIMUM, rel=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("end", "longer"), [({"steps": 80}, {"steps": 200}), ({"minutes": 1}, {"minutes": 3})])
def test_a_finished_run_that_is_extended_stays_at_its_minimum(
    schedule: str, end: dict[str, Any], longer: dict[str, Any]
) -> None:
    state = Schedule()
    first = rates(run_by({"schedule": schedule}, **end), itertools.repeat(0.7), state)
    seconds = 0.7 * (len(first) - 1)
    more = rates(run_by({"schedule": schedule}, **longer), itertools.repeat(0.7), state, len(first), seconds)
    assert first[-1] == pytest.approx(MINIMUM)
    assert len(more) > 50
    assert more == pytest.approx([MINIMUM] * len(more))


@pytest.mark.parametrize("longer", [{"steps": 500}, {"minutes": 5}, {"steps": 45}])
@pytest.mark.parametrize("end", [{"steps": 80}, {"minutes": 1}])
def test_another_end_in_the_middle_goes_on_from_the_rate_that_is(end: dict[str, Any], longer: dict[str, Any]) -> None:
    state = Schedule()
    first = rates(run_by(**end), itertools.repeat(0.75), state, stop_after=40)
    assert MINIMUM < first[-1] < 0.7 * PEAK
    more = rates(run_by(**longer), itertools.repeat(0.75), state, len(first), 0.75 * (len(first) - 1))
    falling = [first[-1], *more]
    assert all(earlier >= later for earlier, later in pairwise(falling))
    assert max(a - b for a, b in pairwise(falling)) <= steepest(len(more))
    assert more[-1] == pytest.approx(MINIMUM, rel=1e-3)


@pytest.mark.parametrize(
    ("decay", "end", "num_decay"),
    [
        ({}, {"steps": 100}, 20),
        ({"decay_share": 0.5}, {"steps": 100}, 50),
        ({"decay_steps": 30}, {"steps": 100}, 30),
        ({"decay_share": 0.5}, {"minutes": 1}, 60),
        ({"decay_minutes": 0.25}, {"minutes": 1}, 30),
    ],
)
def test_wsd_keeps_its_peak_and_then_falls_evenly(decay: dict[str, Any], end: dict[str, Any], num_decay: int) -> None:
    found = rates(run_by({"schedule": "wsd", **decay}, **end), itertools.repeat(0.5))
    stable, falling = found[WARMUP:-num_decay], found[-num_decay:]
    assert len(stable) > 10
    assert stable == [PEAK] * len(stable)
    even = [PEAK - (PEAK - MINIMUM) * (n + 1) / num_decay for n in range(num_decay)]
    assert falling == pytest.approx(even)


def test_a_decay_begins_in_a_running_run() -> None:
    """Steps without an end in sight, and then a decay of the next 25."""
    state = Schedule()
    stable = rates(run_by({"schedule": "wsd"}, steps=1_000_000), itertools.repeat(0.5), state, stop_after=60)
    assert stable[WARMUP:] == [PEAK] * 50
    ends = run_by({"schedule": "wsd", "decay_steps": 25}, steps=85)
    falling = rates(ends, itertools.repeat(0.5), state, 60, 30.0)
    assert falling == pytest.approx([PEAK - (PEAK - MINIMUM) * (n + 1) / 25 for n in range(25)])


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(SCHEDULES, 2)))
def test_another_schedule_in_a_running_run_goes_on_from_the_rate_that_is(before: str, after: str) -> None:
    state = Schedule()
    first = rates(run_by({"schedule": before}, steps=100), itertools.repeat(0.5), state, stop_after=90)
    assert MINIMUM < first[-1] < PEAK
    more = rates(run_by({"schedule": after}, steps=130), itertools.repeat(0.5), state, 90, 45.0)
    falling = [first[-1], *more]
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    alone = rates(run_by({"schedule": after}, steps=WARMUP + 40), itertools.repeat(0.5))[WARMUP:]
    steepest_alone = max(a - b for a, b in pairwise(alone))
    assert max(a - b for a, b in pairwise(falling)) < max(0.1 * PEAK, 1.1 * steepest_alone)
    assert more[-1] == pytest.approx(MINIMUM)


@pytest.mark.parametrize(
    ("optimizer", "end", "line"),
    [
        (
            {"decay_steps": 5},
            {"steps": 9},
            "optimizer: decay_steps is for schedule=wsd, and schedule=cosine does not take",
        ),
        ({"decay_share": 0.5}, {"steps": 9}, "optimizer: decay_share is for schedule=wsd"),
        ({"schedule": "wsd", "decay_steps": 5}, {"minutes": 9}, "optimizer.decay_steps goes with steps, and this run"),
        ({"schedule": "wsd", "decay_minutes": 5}, {"steps": 9}, "optimizer.decay_minutes goes with minutes, and this"),
    ],
)
def test_a_decay_that_does_not_fit_the_run_is_refused(
    optimizer: dict[str, Any], end: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        run_by(optimizer, **end)
    assert str(caught.value).startswith(line)


def set_clock(patch: pytest.MonkeyPatch, step_seconds: float) -> None:
    """A clock that only steps advance."""
    clock, inner = SimpleNamespace(now=0.0), loop.Trainer.train_step

    def step(*arguments: Any) -> dict[str, Any]:
        row = inner(*arguments)
        clock.now += step_seconds
        return row

    patch.setattr(loop.Trainer, "train_step", step)
    patch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))


def logged(run: Path) -> list[float]:
    return [row["lr"] for row in read_metrics(run / "metrics.jsonl") if "lr" in row]


def test_a_run_by_the_clock_goes_on_where_it_was(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extended when it was over; the first step of each start is not timed."""

    def values(minutes: float) -> dict[str, Any]:
        return {**byte_lm_run(tmp_path / "run", text), "steps": None, "minutes": minutes}

    set_clock(monkeypatch, 1.5)
    run = train(settings(values(0.5)))
    first = logged(run)
    assert first[3] == pytest.approx(max(first)) == 3e-3
    assert first[-1] == pytest.approx(3e-4)
    assert len(first) == 21
    train(settings(values(1.0)))
    assert logged(run)[:21] == first
    assert logged(run)[21:] == pytest.approx([3e-4] * 21)


def test_a_run_by_the_clock_is_cut_off_and_falls_on(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**byte_lm_run(tmp_path / "run", text), "steps": None, "minutes": 0.5}
    with monkeypatch.context() as patch:
        set_clock(patch, 1.5)
        inner = loop.Trainer.train_step

        def step(trainer: loop.Trainer) -> dict[str, Any]:
            if trainer.state.step == 12:
                raise ZeroDivisionError
            return inner(trainer)

        patch.setattr(loop.Trainer, "train_step", step)
        with pytest.raises(ZeroDivisionError):
            train(settings(values))
    set_clock(monkeypatch, 1.5)
    falling = logged(train(settings(values)))[3:]
    assert falling[0] == 3e-3
    assert all(earlier >= later for earlier, later in pairwise(falling))
    assert max(a - b for a, b in pairwise(falling)) < 2.7e-3 * math.pi / 2 / (len(falling) - 2)
    assert falling[-1] == pytest.approx(3e-4)


def test_wsd_in_a_running_run_is_bit_exact_after_a_restart(tmp_path: Path, text: Path) -> None:
    """Ended by settings that change while it runs; cut in two once more within the decay."""

    def values(run: str, steps: int, decay_steps: int) -> TrainSettings:
        asked = {"lr": 3e-3, "warmup_steps": 3, "schedule": "wsd", "decay_steps": decay_steps}
        return settings(byte_lm_run(tmp_path / run, text, steps, optimizer=asked))

    for run in ("whole", "cut"):
        train(values(run, 10, 1))
    # The last of the ten steps was a decay of its own, from which the rate does not rise again.
    assert logged(tmp_path / "whole")[3:9] == [3e-3] * 6
    whole = train(values("whole", 20, 8))
    assert len(losses(whole)) == 20
    assert logged(whole)[9:] == pytest.approx([3e-4] * 11)
    cut = train(values("cut", 20, 8))
    assert_equal_runs(cut, whole)


def test_the_clock_of_the_first_rank_is_that_of_all(crew: Crew, tmp_path: Path, text: Path) -> None:
    values = {**values_of_many(text, tmp_path / "run", checkpoint={"every": 100_000}), "steps": None, "minutes": 0.5}
    [ranks] = crew.run((2, rates_under_own_clocks, values))
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 31
    assert ranks[0] == sorted(ranks[0], reverse=True)
    assert ranks[0][-1] < 0.2 * ranks[0][0]


def rates_under_own_clocks(values: dict[str, Any]) -> list[float]:
    """The rates of a rank whose clock runs at its own speed."""
    import os

    found: list[float] = []

    def rate(*arguments: Any) -> float:
        found.append(learning_rate(*arguments))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        set_clock(patch, 1.0 + 3 * int(os.environ["RANK"]))
        patch.setattr(loop, "learning_rate", rate)
        train(settings(values))
    return found


class SettingsRead:
    """Settings that remember which of them are read."""

    def __init__(self, settings: OptimizerSettings):
        self.settings, self.names = settings, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self.settings, name)


def test_the_table_of_schedules_is_complete() -> None:
    """Each schedule has its name, its form and its line in the docs of the settings."""
    assert set(SCHEDULES) == set(get_args(ScheduleName))
    assert OF_ONE_SCHEDULE.keys() <= SCHEDULES.keys()
    for name, form in SCHEDULES.items():
        assert f"`{name}`" in (OptimizerSettings.__doc__ or "")
        given = OptimizerSettings(schedule=name)
        assert (form.height(0.0), form.height(1.0)) == pytest.approx((1.0, 0.0))
        assert 0 < form.decay(given, 100.0, 1.0) <= 100
        read = set()
        for unit in (1.0, 60.0):
            seen: Any = SettingsRead(given)
            form.decay(seen, 100.0, unit)
            read |= seen.names
        assert read == set(OF_ONE_SCHEDULE.get(name, ())), "settings that others do not take are in OF_ONE_SCHEDULE"
        for decayed in (0.0, 0.3, 1.0):
            assert form.decayed_at(form.height(decayed)) == pytest.approx(decayed)
