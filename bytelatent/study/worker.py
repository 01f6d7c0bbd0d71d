"""One run of a study, from training to its row: `python -m bytelatent.study.worker folder=FOLDER run=NAME`.

A process of its own on a GPU, a job of SLURM's (`config=FILE` holds the same), or, on a CPU, a call. With `part` it
makes what runs share.
"""

import gc
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from pydantic import Field

from bytelatent.command_line import from_command_line
from bytelatent.config import Settings
from bytelatent.device import choose_device, choose_dtype, device_name
from bytelatent.errors import UserError
from bytelatent.evaluation import Measured, ReadSettings, Texts, find_model, measure_texts
from bytelatent.files import Locked
from bytelatent.progress import Progress
from bytelatent.run_folder import read_metrics
from bytelatent.study.changes import inside
from bytelatent.study.cost import PlannedRun, RunCost, run_cost
from bytelatent.study.plan import is_chosen, load_plan
from bytelatent.study.results import MOST_POINTS, TRIALS, CurvePoint, GroupBits, HeldOut, StudyRow, write_row
from bytelatent.study.shared import Shared
from bytelatent.text.documents import must_have_read
from bytelatent.training import TrainSettings, train

LOGGER = logging.getLogger(__name__)

PLAN = "plan.yaml"  # the plan, in the study's folder
USAGE = "a part of a study: blt study PLAN.yaml starts it"
ALL_PARTS = "all"
LINGER = 120.0  # seconds in which a killed study's runs save and end, while this one waits for their folders
BITS, VALIDATION = "bits_per_byte", "validation_bits_per_byte"

Result = TypeVar("Result")


class StudyJob(Settings):
    """A piece of a study's work.

    Attributes:
        folder: of the study, which holds the plan.
        run: the name of a run or a trial.
        part: instead of a run, a part that runs share, or `all` of them;
        only, budgets: the families and budgets that these runs are of; empty for all.
        trials: of the trials.
        tuning_only: do not read the held-out text.
        discard_models: remove the model once the row is written.
    """

    folder: str
    run: str | None = None
    part: str | None = None
    only: list[str] = Field(default=[])
    budgets: list[float] = Field(default=[])
    trials: bool = False
    tuning_only: bool = False
    discard_models: bool = False

    @property
    def place(self) -> Path:
        """The folder of the runs, the rows, and logs."""
        return Path(self.folder) / TRIALS if self.trials else Path(self.folder)

    @property
    def is_for_the_cpu(self) -> bool:
        return self.part is not None and self.part.startswith("tokenizer ")

    @property
    def name(self) -> str:
        return self.run or (self.part or ALL_PARTS).replace(" ", "-")


def perform(job: StudyJob) -> None:
    """Do a piece of work, or continue it.

    Raises:
        UserError: it cannot be done.
        Interrupted, KeyboardInterrupt: as of training.
    """
    folder = Path(job.folder)
    plan = load_plan(folder / PLAN)
    shared = Shared(plan, folder)
    sizes = list(plan.drafts(folder, job.trials))
    if job.run is None:
        drafts = [d for candidates in sizes for d in candidates if is_chosen(d, job.only, job.budgets)]
        for part in shared.missing(drafts) if job.part == ALL_PARTS else [str(job.part)]:
            when_free(lambda part=part: shared.make(part, drafts))
        return
    own = next((candidates for candidates in sizes if candidates[0].name == job.run), None)
    if own is None:
        raise UserError(f"run: the plan in '{folder}' has no '{job.run}'")
    run = shared.planned(own, is_final=True)
    train_and_measure(run, shared, job)


def train_and_measure(run: PlannedRun, shared: Shared, job: StudyJob) -> StudyRow:
    """Train, measure on the held-out texts, and write the row."""
    settings = run.settings
    if job.discard_models:  # nobody continues the run: hash tables and their moments are many times the model
        settings = settings.model_copy(
            update={"checkpoint": settings.checkpoint.model_copy(update={"last": "weights"})}
        )
    place = when_free(lambda: train(settings))
    gc.collect()
    torch.cuda.empty_cache()  # what training held, for the measurement
    text = shared.plan.text
    tuning = evaluate(place, text.tuning, shared, settings)
    is_closed = job.tuning_only or job.trials
    held_out = None if is_closed else evaluate(place, text.held_out, shared, settings)
    row = row_of(run, settings, shared, tuning, held_out)
    write_row(job.place, row)
    if job.discard_models:
        shutil.rmtree(place, ignore_errors=True)
    return row


def when_free(call: Callable[[], Result]) -> Result:
    """Call it, once another process that a killed study left has let go of the folder."""
    until = time.monotonic() + LINGER
    while True:
        try:
            return call()
        except Locked as error:
            if time.monotonic() > until:
                raise
            LOGGER.info(f"{error}; waiting for it")
            time.sleep(2)


def evaluate(run: Path, paths: Sequence[str], shared: Shared, settings: TrainSettings) -> HeldOut:
    """Exact bits per byte of a run's final model, in the precision of its training; of all documents and by category.

    In float32 a GPU takes tens of times as long.
    """
    text, device = shared.plan.text, choose_device(settings.device)
    batch_ids = None if device.type == "cuda" else settings.data.batch_ids  # on a CPU attention costs its square
    how = ReadSettings(device, choose_dtype(settings.dtype, device), batch_ids=batch_ids)
    found = find_model(str(run), None, how)
    texts = Texts(
        list(paths),
        text.text_key,
        text.category,
        text.evaluated_bytes,
        max_bad_rows=text.max_bad_rows,
        max_row_bytes=text.max_row_bytes,
    )
    measured = Measured()
    with Progress(f"measuring {run.name}", text.evaluated_bytes) as progress:
        measure_texts(found.load(), texts, measured, on_batch=progress.advance)
    must_have_read(texts.bad_rows.unread)
    groups = {} if text.category is None else measured.by_group()
    return HeldOut(
        bits_per_byte=measured.bits_per_byte,
        bytes=sum(measured.num_bytes),
        by_category={
            name: GroupBits(bits_per_byte=group.bits_per_byte, bytes=sum(group.num_bytes))
            for name, group in sorted(groups.items())
        },
    )


def row_of(
    run: PlannedRun, settings: TrainSettings, shared: Shared, tuning: HeldOut, held_out: HeldOut | None
) -> StudyRow:
    """What a finished run did and cost, by its own metrics."""
    draft, rows = run.draft, read_metrics(Path(settings.run) / "metrics.jsonl")
    last = [row for row in rows if BITS in row][-1]
    bytes_read, units = last["bytes_seen"], last["patches_seen"]
    mean = max(bytes_read / units, 1.0) if units else 1.0
    cost = run_cost(settings.model, mean, run.measured.context_bytes, shared.entropy_model_shape(draft.entropy_model))
    shown = inside(settings, shared.folder)
    if draft.settings.calibration is not None:  # the study did it
        shown["calibration"] = draft.settings.calibration.plain()
    return StudyRow(
        name=draft.name,
        family=draft.family,
        label=draft.label,
        budget=draft.budget,
        seed=draft.seed,
        kind=settings.model.kind,
        settings=shown,
        parameters=cost.parameters,
        table_parameters=cost.table_parameters,
        table_bytes=cost.table_bytes,
        steps=last["step"],
        batch_bytes=bytes_read / last["step"],
        bytes_read=bytes_read,
        epochs=bytes_read / shared.text.train_bytes,
        mean_patch_bytes=mean,
        context_bytes=run.measured.context_bytes,
        training_flops_per_byte=cost.training_flops_per_byte,
        training_flops=bytes_read * cost.flops_per_byte,
        entropy_model_training_flops=shared.entropy_model_flops(draft.entropy_model),
        inference_flops_per_byte=cost.inference_flops_per_byte,
        seconds=last["seconds"],
        bytes_per_second=bytes_read * (1 - 1 / last["step"]) / last["seconds"] if last["seconds"] else None,
        held_out=held_out,
        tuning=tuning,
        curve=curve_of(rows, cost),
        device=device_name(choose_device(settings.device)),
        versions={"torch": torch.__version__, "bytelatent": sys.modules["bytelatent"].__version__},
        date=date.today().isoformat(),
    )


def curve_of(rows: Sequence[dict[str, Any]], cost: RunCost) -> list[CurvePoint]:
    """The curve of a run by its metrics: means of as many neighbours as it takes, and all points of validation."""
    trained = [row for row in rows if row.get(BITS) is not None]
    size = max(-(-len(trained) // MOST_POINTS), 1)
    seconds = {row["step"]: row["seconds"] for row in trained}
    points = []
    for at in range(0, len(trained), size):
        group = trained[at : at + size]
        mean = fmean(row[BITS] for row in group)
        points.append((group[-1]["bytes_seen"], group[-1]["seconds"], {BITS: mean}))
    for row in rows:
        if row.get(VALIDATION) is not None:
            before = [seconds[step] for step in seconds if step <= row["step"]]
            points.append((row["bytes_seen"], max(before, default=0.0), {VALIDATION: row[VALIDATION]}))
    points.sort(key=lambda point: point[0])
    return [CurvePoint(training_flops=read * cost.flops_per_byte, seconds=t, **bits) for read, t, bits in points]


def main(arguments: list[str]) -> None:
    perform(from_command_line(StudyJob, arguments, USAGE))


if __name__ == "__main__":
    from bytelatent import log, signals
    from bytelatent.errors import guarded

    log.configure()
    if "DUMP_DIR" not in os.environ:  # else it is a job, which hears warnings already
        signals.interrupt_when_warned()
    guarded(lambda: main(sys.argv[1:]))
