"""What programs may do: each ends as it should, and leaves nothing behind."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from bytelatent.evaluation.programs import ProgramLimits, check_isolation, pass_at_k, run_program, run_programs

LIMITS = ProgramLimits(seconds=30.0, memory=2**28, files=2**20)  # however busy the machine is
QUICK = ProgramLimits(seconds=1.0, memory=2**28, files=2**20)
ENDED = "the process ended before the program"
CASES = {  # a program and why it has not passed
    "x = 1\nassert x": "",
    "assert 1 == 2": "AssertionError:",
    "def f(:": "SyntaxError",
    "import sys; sys.exit(0)": "SystemExit: 0",
    "import os; os._exit(0)": ENDED,
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "x = 'a' * 2**30": "MemoryError",
    "open('big', 'wb').write(b'0' * 2**21)": "OSError",
    "open('own', 'w').write('x'); assert open('own').read() == 'x'": "",
    "import os; assert not os.listdir('.') and set(os.environ) <= {'PATH', 'LC_CTYPE'}": "",
    "import sys; assert not sys.stdin.read() and __name__ == '__main__'": "",
    "import torch": "ModuleNotFoundError",
}
ENDLESS = [
    "while True: pass",
    "import subprocess; subprocess.run(['sleep', '77.7'])",
    "import os\nos.setsid(); os.execvp('sleep', ['sleep', '77.7'])",
    "import os, time\nif not os.fork():\n    os.setsid(); os.execvp('sleep', ['sleep', '77.7'])\ntime.sleep(77)",
]
MANY = "import os, time\nfor _ in range(100):\n    if not os.fork():\n        break\ntime.sleep(77.7)"
ISOLATED = {  # the same where the system has namespaces
    "import socket; socket.create_connection(('127.0.0.1', 1))": "OSError: [Errno 101]",
    "open({other!r}, 'w').write('x')": "OSError: [Errno 30]",
    "import os\nassert os.getpid() == 1": "",
    "import os\nif not os.fork():\n    os.setsid(); os.execvp('sleep', ['sleep', '77.7'])": "",
}


def running(command: str) -> bool:
    """Whether a process with these arguments runs."""
    wanted = command.encode().replace(b" ", b"\0")
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if wanted in path.read_bytes():
                return True
        except OSError:  # it has just ended
            continue
    return False


def test_how_programs_end(tmp_path: Path) -> None:
    cases = dict(CASES)
    if check_isolation():
        cases |= {source.format(other=str(tmp_path / "other")): why for source, why in ISOLATED.items()}
    for (source, why), outcome in zip(cases.items(), run_programs(list(cases), LIMITS), strict=True):
        assert outcome.why.startswith(why), (source, outcome)
        assert outcome.passed == (why == ""), (source, outcome)
    assert [outcome.why for outcome in run_programs(ENDLESS, QUICK)] == ["timed out"] * 4
    assert not list(tmp_path.iterdir())
    assert not running("sleep 77.7")


def test_without_namespaces() -> None:
    """Limits hold, and the process group ends with the program."""
    sources = ["x = 'a' * 2**30", "pass"]
    assert [outcome.why for outcome in run_programs(sources, replace(LIMITS, isolate=False))] == ["MemoryError:", ""]
    endless = [source.replace("77.7", "77.8") for source in ENDLESS[1:]]
    outcomes = run_programs(endless, replace(QUICK, isolate=False))
    assert [outcome.why for outcome in outcomes] == ["timed out"] * 3
    orphan = "import os\nif not os.fork():\n    os.setsid(); os.execvp('sleep', ['sleep', '77.8'])"
    assert run_program(orphan, replace(LIMITS, isolate=False)).passed
    assert not running("sleep 77.8")


@pytest.mark.parametrize("isolate", [True, False])
def test_many_processes(isolate: bool) -> None:
    assert run_program(MANY, replace(LIMITS, isolate=isolate)).why == "it began more than 64 processes"


def test_a_program_cannot_pass_by_writing_to_the_pipe() -> None:
    source = """
import os
for descriptor in range(3, 20):
    try:
        os.write(descriptor, b'{"why": "", "isolated": true, "password": "a guess"}')
    except OSError:
        pass
os._exit(0)
"""
    assert run_program(source, LIMITS).why == ENDED


@pytest.mark.parametrize(("num_samples", "num_passed", "k"), [(1, 0, 1), (1, 1, 1), (7, 3, 2), (7, 6, 5), (6, 0, 3)])
def test_pass_at_k(num_samples: int, num_passed: int, k: int) -> None:
    """The share of all choices of k samples that hold one that passes."""
    choices = list(itertools.combinations([number < num_passed for number in range(num_samples)], k))
    assert pass_at_k(num_samples, num_passed, k) == pytest.approx(sum(map(any, choices)) / len(choices))
