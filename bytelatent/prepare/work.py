"""The folder of unfinished work, DIR/.prepare: the plan, and what the steps leave for each other."""

import json
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bytelatent.files import whole_file
from bytelatent.prepare.inputs import InputFile, Unit
from bytelatent.prepare.runs import TaskFiles

FORMAT = 1
FOLDER = ".prepare"


@dataclass(frozen=True)
class Plan:
    """Everything the steps need to know before the input is read."""

    request: dict[str, Any]
    files: list[InputFile]
    units: list[Unit]
    tasks: list[tuple[int, int]]  # runs of units
    bits: int  # of a key that name its bin
    run_bytes: int  # memory for a sorted run, with its index
    range_bytes: int  # memory for the documents of a range of bins, with their index
    memory: float
    format: int = FORMAT


class Work:
    """The files below DIR/.prepare."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.aside = self.folder / "out"  # the output files until all are whole

    @cached_property
    def plan(self) -> Plan:
        return self.saved_plan()

    def saved_plan(self) -> Plan:
        """
        Raises:
            OSError, ValueError, KeyError, TypeError: there is none that can be read.
        """
        values = json.loads((self.folder / "plan.json").read_text(encoding="utf-8"))
        files = [InputFile(**file) for file in values.pop("files")]
        units = [Unit(**unit) for unit in values.pop("units")]
        return Plan(files=files, units=units, tasks=[(a, b) for a, b in values.pop("tasks")], **values)

    def begin(self, plan: Plan) -> None:
        """Throw away what is there, and save a new plan."""
        self.clear()
        for folder in ("scatter", "gather", "out", "logs"):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / "plan.json") as aside:
            aside.touch(mode=0o600)  # its addresses may hold credentials, which the steps need
            aside.write_text(json.dumps(asdict(plan)), encoding="utf-8")

    def clear(self) -> None:
        """Throw away all that is unfinished, and what of it has its final name already."""
        for output in self.saved_outputs():
            (self.out / output).unlink(missing_ok=True)
        (self.folder / "plan.json").unlink(missing_ok=True)  # first: without it the rest counts for nothing
        for place in ("scatter", "gather", "out", "logs"):
            shutil.rmtree(self.folder / place, ignore_errors=True)
        for name in ("cut.json", "jobs.json"):
            (self.folder / name).unlink(missing_ok=True)

    def saved_outputs(self) -> list[str]:
        """The names of the output files, as far as they are known."""
        try:
            return [output["name"] for output in json.loads(self.cut_file.read_text(encoding="utf-8"))["outputs"]]
        except (OSError, ValueError, KeyError):
            return []

    def task_files(self, task: int) -> TaskFiles:
        return TaskFiles(self.folder / "scatter", task)

    @property
    def cut_file(self) -> Path:
        return self.folder / "cut.json"

    def range_marker(self, number: int) -> Path:
        return self.folder / "gather" / f"{number:05d}.json"
