"""A process with Triton's interpreter, which is chosen before Triton is imported: it runs the cases of all kernels."""

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from typing import Any

_process: "subprocess.Popen[str] | None" = None


def interpreted(module: str, cases: list[tuple[str, dict]]) -> list[dict]:
    """What `run` of a module of cases gives for these."""
    process = _the_process()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([module, cases]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, f"the interpreter ended with {process.wait()}"
    found = json.loads(answer)
    assert isinstance(found, list), found
    return found


def _the_process() -> "subprocess.Popen[str]":
    global _process
    if _process is None or _process.poll() is not None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "tests.kernels.interpreter"]
        _process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        atexit.register(_process.communicate)  # it ends with its input
    return _process


def _answer_requests() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for line in sys.stdin:
        module, cases = json.loads(line)
        found: Any
        try:
            call = importlib.import_module(module).run
            gc.freeze()  # what is imported is no garbage
            found = call(cases)
        except Exception:
            found = traceback.format_exc()
        print(json.dumps(found), file=out, flush=True)


if __name__ == "__main__":
    _answer_requests()
