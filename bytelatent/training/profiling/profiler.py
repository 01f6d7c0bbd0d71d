"""Traces of training steps by torch's profiler, and snapshots of the memory."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from bytelatent.config import Settings
from bytelatent.errors import UserError
from bytelatent.files import whole_folder

MOST_EVENTS = 200_000  # allocations and frees that a snapshot goes back
ROWS = 60  # of the table of operations


class ProfileSettings(Settings):
    """A trace of some steps, taken at a step or when the file `profile` appears in the run's folder.

    Attributes:
        from_step: the first step traced; None: only when asked by the file.
        memory: allocations, too, and on CUDA a snapshot of the memory.
    """

    from_step: int | None = Field(default=None, ge=1)
    steps: int = Field(default=3, ge=1)
    memory: bool = False


class Profiler:
    """Traces some steps from a given one on, or those that follow when the file `RUN/profile` appears.

    Each trace is a folder `RUN/profiles/step-N`, whole or not there at all: `trace.json.gz`, `operations.txt`, and with
    `memory` on CUDA `memory.pickle`. What goes wrong with it is said, and training goes on.

    Args:
        run: the run's folder.
        say: shows a line to the user.
    """

    def __init__(self, run: Path, settings: ProfileSettings, device: torch.device, say: Callable[[str], None]):
        self._asked, self._folder = run / "profile", run / "profiles"
        self._settings, self._device, self._say = settings, device, say
        self._snapshot = settings.memory and device.type == "cuda"
        self._trace: torch.profiler.profile | None = None
        self._first = self._last = 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._trace is not None:  # the run is over, or broke off: most of all then it is wanted
            self._write()

    def before(self, step: int) -> None:
        """Say before each step which one it is, counted from 1: here traces begin and end."""
        if self._trace is not None and step > self._last:
            self._write()
        if self._trace is None and (step == self._settings.from_step or self._asked.is_file()):
            self._first, self._last = step, step + self._settings.steps - 1
            try:
                self._begin()
            except RuntimeError as error:  # another profiler runs
                self._fail(error)

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        if self._snapshot:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        trace = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=self._settings.memory)
        trace.start()
        self._trace = trace

    def _write(self) -> None:
        trace, self._trace = self._trace, None
        assert trace is not None
        folder = self._folder / f"step-{self._first:08d}"
        try:
            trace.stop()
            with whole_folder(folder) as aside:
                trace.export_chrome_trace(str(aside / "trace.json.gz"))
                (aside / "operations.txt").write_text(_operations(trace, self._device), encoding="utf-8")
                if self._snapshot:
                    torch.cuda.memory._dump_snapshot(str(aside / "memory.pickle"))
            self._say(f"a trace from step {self._first} on is in '{folder}'")
        except (UserError, OSError, RuntimeError) as error:
            self._fail(error)
        else:
            self._end()

    def _fail(self, error: Exception) -> None:
        self._say(f"no trace of step {self._first}: {' '.join(str(error).split())}")
        self._end()

    def _end(self) -> None:
        if self._snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)
        with suppress(OSError):
            self._asked.unlink()


def _operations(trace: Any, device: torch.device) -> str:
    """The operations that took the most time, in a table."""
    where = "cuda" if device.type == "cuda" else "cpu"
    return trace.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=ROWS)
