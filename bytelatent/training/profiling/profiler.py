"""Traces of training steps by torch's profiler, and snapshots of the memory."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch
from pydantic import Field

from bytelatent.config import Settings
from bytelatent.errors import UserError, in_one_line
from bytelatent.files import whole_folder

log = logging.getLogger(__name__)

MAX_EVENTS = 200_000  # the last allocations and frees that a memory snapshot holds
TABLE_ROWS = 60


class ProfileSettings(Settings):
    """A trace of some steps, taken at a step or when the file `profile` appears in the run's folder.

    Attributes:
        from_step: the first step to trace; None: only when the file appears.
        steps: to trace.
        memory: trace allocations, too, and on CUDA write a snapshot of the memory.
    """

    from_step: int | None = Field(default=None, ge=1)
    steps: int = Field(default=3, ge=1)
    memory: bool = False


class Profiler:
    """Traces some steps from a given one on, or those that follow when the file `RUN/profile` appears.

    A trace is a folder `RUN/profiles/step-N` that appears whole or not at all, with `trace.json.gz`, `operations.txt`,
    and with `memory` on CUDA `memory.pickle`. If tracing fails, it logs a warning and training continues.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path, settings: ProfileSettings, device: torch.device):
        self._request, self._folder = run / "profile", run / "profiles"
        self._settings, self._device = settings, device
        self._snapshot = settings.memory and device.type == "cuda"
        self._trace: torch.profiler.profile | None = None
        self._first = self._last = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._trace is not None:  # the run is over or failed, which a trace may explain
            self._write(self._trace)

    def before(self, step: int) -> None:
        """Call before each step, counted from 1: here traces begin and end."""
        if self._trace is not None and step > self._last:
            self._write(self._trace)
        if self._trace is None and (step == self._settings.from_step or self._request.is_file()):
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
            torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
        trace = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=self._settings.memory)
        trace.start()
        self._trace = trace

    def _write(self, trace: torch.profiler.profile) -> None:
        self._trace = None
        folder = self._folder / f"step-{self._first:08d}"
        try:
            trace.stop()
            with whole_folder(folder) as aside:
                trace.export_chrome_trace(str(aside / "trace.json.gz"))
                (aside / "operations.txt").write_text(_operations(trace, self._device), encoding="utf-8")
                if self._snapshot:
                    torch.cuda.memory._dump_snapshot(str(aside / "memory.pickle"))
            log.info(f"a trace from step {self._first} on is in '{folder}'")
        except (UserError, OSError, RuntimeError) as error:
            self._fail(error)
        else:
            self._end()

    def _fail(self, error: Exception) -> None:
        log.warning(f"no trace of step {self._first}: {in_one_line(error)}")
        self._end()

    def _end(self) -> None:
        if self._snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)
        with suppress(OSError):
            self._request.unlink()


def _operations(trace: torch.profiler.profile, device: torch.device) -> str:
    """A table of the operations that took the most time."""
    where = "cuda" if device.type == "cuda" else "cpu"
    return trace.key_averages().table(sort_by=f"self_{where}_time_total", row_limit=TABLE_ROWS)
