"""The choice of threads, on machines that are numbers: how long a piece of work takes with each number of threads."""

from collections.abc import Callable

import pytest
import torch

from bytelatent.threads import SHARE, TRIAL, Threads


@pytest.fixture(autouse=True)
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch is set to, in place of torch: the process keeps its threads."""
    now = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: now.__setitem__(0, count))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return now


def work(threads: Threads, seconds: Callable[[int], float], until: float) -> list[tuple[int, float]]:
    """Pieces of work for so many seconds: with how many threads each was done, and how long it took."""
    done, passed = [], 0.0
    while passed < until:
        took = seconds(torch.get_num_threads())
        done.append((torch.get_num_threads(), took))
        passed += took
        threads.took(took)
    return done


IDLE = {1: 0.4, 4: 0.2, 8: 0.15}
BUSY = {1: 0.6, 4: 3.0, 8: 17.0}
HALF_BUSY = {1: 0.5, 4: 0.2, 8: 2.0}
CPU = torch.device("cpu")


@pytest.mark.parametrize(("machine", "best"), [(IDLE, 8), (BUSY, 1), (HALF_BUSY, 4)])
def test_most_of_the_work_is_done_with_the_fastest_number(machine: dict[int, float], best: int) -> None:
    with Threads.of(CPU) as threads:
        done = work(threads, machine.__getitem__, 600)
    others = sum(took for count, took in done[20:] if count != best)
    assert others < 2.5 * SHARE * sum(took for _, took in done[20:])
    assert {count for count, _ in done} == set(machine)


def test_a_number_that_is_hopeless_is_tried_once_at_a_time() -> None:
    with Threads.of(CPU) as threads:
        counts = [count for count, _ in work(threads, BUSY.__getitem__, 200)]
    assert counts[: TRIAL + 2] == [1] * TRIAL + [4, 1]


def test_it_follows_the_machine() -> None:
    with Threads.of(CPU) as threads:
        work(threads, IDLE.__getitem__, 60)
        assert threads.count == 8
        slower = work(threads, BUSY.__getitem__, 600)
        assert [count for count, _ in slower[-5:]] == [1] * 5
        work(threads, IDLE.__getitem__, 600)
        assert threads.count == 8


def test_torch_has_its_threads_back(torch_threads: list[int]) -> None:
    with Threads.of(CPU) as threads:
        work(threads, BUSY.__getitem__, 20)
        assert torch_threads == [1]
    assert torch_threads == [8]


def test_an_error_gives_them_back_too(torch_threads: list[int]) -> None:
    def stopped() -> None:
        with Threads.of(CPU):
            assert torch_threads == [1]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert torch_threads == [8]


@pytest.mark.parametrize("why", ["a GPU", "the user says", "the same bits"])
def test_nothing_is_chosen(why: str, monkeypatch: pytest.MonkeyPatch, torch_threads: list[int]) -> None:
    if why == "the user says":
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
    with Threads.of(torch.device("cuda") if why == "a GPU" else CPU, why != "the same bits") as threads:
        done = work(threads, BUSY.__getitem__, 100)
        assert torch_threads == [8]
    assert {count for count, _ in done} == {8}


def test_two_cores_are_one_or_two_threads(torch_threads: list[int]) -> None:
    torch_threads[0] = 2
    assert list(Threads.of(CPU).counts) == [1, 2]
    torch_threads[0] = 1
    assert list(Threads.of(CPU).counts) == [1]
