"""Progress on a clock that the tests move."""

import io
import re
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from bytelatent import log
from bytelatent.progress import EVERY, Progress, time_left


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def seconds(passed: float) -> None:
        now[0] += passed

    return seconds


def test_lines_come_now_and_then_with_the_time_left(wait: Callable[[float], None], logged: Callable[[], str]) -> None:
    with Progress("reading", 1000) as progress:
        for _ in range(10):
            wait(0.6 * EVERY)
            progress.advance(50)
    assert logged().splitlines() == [
        f"reading  {share:3} %  {done} of 1,000 bytes  {left} left".replace(" %", "%")
        for share, done, left in (
            (10, 100, "1:48"),
            (20, 200, "1:36"),
            (30, 300, "1:24"),
            (40, 400, "1:12"),
            (50, 500, "1:00"),
        )
    ]


def test_a_terminal_has_a_bar(wait: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=shown, force_terminal=True, width=200, color_system=None))
    with Progress("reading", 1000) as progress:
        wait(5)
        progress.advance(250)
        progress._bars.refresh()  # pyright: ignore[reportOptionalMemberAccess]
    assert "━" in (text := shown.getvalue())
    assert re.search(r"reading .* 250 of 1,000 bytes  0:15 left", text)


def test_work_ends_when_its_time_is_up_and_logs_it(wait: Callable[[float], None], logged: Callable[[], str]) -> None:
    done = []
    with Progress("reading", 100, limit=30) as progress:
        for item in progress.within(range(100)):
            done.append(item)
            wait(8)
            progress.advance(1)
    assert done == [0, 1, 2, 3]
    assert progress.is_cut
    assert logged().splitlines()[-1] == "reading: time is up after 4 of 100 bytes; the rest is left out"


def test_something_is_done_in_no_time_at_all(wait: Callable[[float], None]) -> None:
    with Progress("reading", limit=-1) as progress:
        assert list(progress.within("abc")) == ["a"]


def test_work_that_is_done_in_time_logs_nothing(wait: Callable[[float], None], logged: Callable[[], str]) -> None:
    with Progress("reading", 3, limit=30) as progress:
        assert list(progress.within("abc")) == ["a", "b", "c"]
    assert logged().splitlines() == []
    assert not progress.is_cut


def test_the_time_left_is_that_of_the_limit_where_work_would_take_longer(
    wait: Callable[[float], None], logged: Callable[[], str]
) -> None:
    with Progress("reading", 1000, limit=40) as progress:
        wait(EVERY)
        progress.advance(1)
    assert logged().splitlines() == ["reading   25%  1 of 1,000 bytes  0:30 left"]


def test_processes_end_together(wait: Callable[[float], None]) -> None:
    asked = []

    def agreed(over: bool) -> bool:
        asked.append(over)
        return len(asked) == 2

    with Progress("reading", limit=1) as progress:
        items = []
        for item in progress.within("abcd", agreed):
            items.append(item)
            wait(2)
    assert items == ["a", "b"]
    assert asked == [True, True]


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00 left"), (65, "1:05 left"), (59.6, "1:00 left"), (7207, "2:00:07 left")]
)
def test_time_left(seconds: float, text: str) -> None:
    assert time_left(seconds) == text
