import pytest

from bytelatent.prepare import executors, plan, scatter, shuffle


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything so small that a little text has many blocks, units, tasks, runs, bins and ranges."""
    monkeypatch.setattr(plan, "UNIT_BYTES", 4000)
    monkeypatch.setattr(plan, "TASK_BYTES", 9000)
    monkeypatch.setattr(scatter, "READ_BYTES", 700)
    monkeypatch.setattr(shuffle, "SLICE_BYTES", 300)
    monkeypatch.setattr(executors, "MAX_RUN_BYTES", 8000)
    monkeypatch.setattr(executors, "MAX_RANGE_BYTES", 5000)


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory as of a program that only prepares: the tests' own process may have grown to gigabytes before."""
    measured = executors.memory_of_this_process
    monkeypatch.setattr(executors, "memory_of_this_process", lambda: min(measured(), 300_000_000))
