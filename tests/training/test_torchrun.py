"""What torchrun sees: processes that are stopped, and processes that die."""

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bytelatent.files import find_corruption
from bytelatent.training import read_metrics
from tests.processes import Command
from tests.training.crew import Crew
from tests.training.plans import train_as, values
from tests.training.tiny_runs import assert_equal_runs, checkpoints, environment

# Trains as `python -m bytelatent.train` does; one rank meets its end before step 4.
DIES = """
import os, signal, sys
from bytelatent.commands import train
from bytelatent.training import trainer as loop

inner = loop.learning_rate
def rate(step, *more):
    if os.environ["RANK"] == "1" and step == 3:
        if sys.argv[1] == "kill once" and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
            return inner(step, *more)
        if sys.argv[1].startswith("kill"):
            print("rank 1 kills itself", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("a bug")
    return inner(step, *more)
loop.learning_rate = rate
train.command(sys.argv[2:])
"""


def torchrun(*arguments: str, **settings: Any) -> Command:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return Command([*launcher, *arguments, *given], environment())


def test_a_signal_to_the_launcher_ends_the_run_in_good_order(tmp_path: Path, text: Path) -> None:
    run = tmp_path / "run"
    process = torchrun("-m", "bytelatent.train", **values(text, run, steps=5000, checkpoint={"every": 100_000}))
    until = time.monotonic() + 90
    while len(read_metrics(run / "metrics.jsonl")) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert "stopped: after step" in errors
    assert process.returncode == 1  # of torchrun, which says nothing of its processes (docs/train.md)
    [folder] = checkpoints(run)
    assert find_corruption(run / "checkpoints" / folder) is None
    assert f"stopped: after step {int(folder.removeprefix('step-'))}; the same command resumes" in errors


@pytest.mark.parametrize("how", ["kill", "raise"])
def test_a_rank_that_dies_ends_the_job(tmp_path: Path, text: Path, how: str) -> None:
    (tmp_path / "dies.py").write_text(DIES)
    run = tmp_path / "run"
    checkpoint = {"every": 2, "asynchronous": False}
    process = torchrun(str(tmp_path / "dies.py"), how, **values(text, run, steps=10**6, checkpoint=checkpoint))
    _, errors = process.communicate(timeout=90)  # most of it is the imports
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("rank ") and " failed after step 3: " in line]
    if how == "raise":
        assert any(line.startswith("rank 1 on ") and line.endswith("ZeroDivisionError: a bug") for line in lines)
    else:
        assert any(line.startswith("rank 0 on ") for line in lines)
        assert "(local_rank: 1)" in errors
        assert "Signal 9" in errors
    assert checkpoints(run) == ["step-00000002"]


def test_torchrun_begins_again_after_a_death(crew: Crew, tmp_path: Path, text: Path) -> None:
    """Bit for bit as the run that nothing happened to."""
    (tmp_path / "dies.py").write_text(DIES)

    def given(run: str) -> dict[str, Any]:
        return values(text, tmp_path / run, steps=5, checkpoint={"every": 2, "asynchronous": False})

    crew.run((2, train_as, given("whole")))
    program = ("--max-restarts", "1", str(tmp_path / "dies.py"), "kill once")
    process = torchrun(*program, **given("killed"))
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert said.splitlines().count(str(tmp_path / "killed")) == 1  # the first rank, as it is done
    # Not by torchrun's own line: of two processes that end in one second it names the first, whom it ended itself.
    assert errors.splitlines().count("rank 1 kills itself") == 1
    assert "exitcode: -" in errors
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")


def test_tensor_parallelism_warns_of_nothing(tmp_path: Path, text: Path) -> None:
    """Not when weights that two dimensions of the ranks divide are put together, nor at norms of these."""
    given = values(text, tmp_path / "run", steps=2, statistics_every=2, parallel={"tensor": 2})
    process = torchrun("-m", "bytelatent.train", **given)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    assert [line for line in errors.splitlines() if re.match(r"\[rank\d\]", line) or "Warning" in line] == []
