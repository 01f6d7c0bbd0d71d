"""`blt study`: run what a plan asks for, here or on SLURM, and gather the rows.

Rows that are there are never computed again. First comes what runs share, then the runs: on GPUs each in a process of
its own, on a CPU one after the other in this one.
"""

import logging
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bytelatent.errors import Interrupted, UserError, nearest
from bytelatent.files import Locked, only_writer, whole_file
from bytelatent.progress import time_left
from bytelatent.study.basis import Basis
from bytelatent.study.cost import PlannedRun
from bytelatent.study.plan import Draft, StudyPlan, budget_name, is_chosen, load_plan
from bytelatent.study.processes import JobPool
from bytelatent.study.results import ROWS, TRIALS, StudyRow, read_row, write_row
from bytelatent.study.shared import MEASUREMENTS, Shared
from bytelatent.study.slurm_jobs import submit_job
from bytelatent.study.worker import ALL_PARTS, PLAN, StudyJob, perform

LOGGER = logging.getLogger(__name__)

LOGS = "logs"
RESUMES = "the same command resumes"


@dataclass(frozen=True)
class StudyOptions:
    """How a study is run.

    Attributes:
        only: names of families; empty for all.
        budgets: of the plan's; empty for all.
        trials: the plan's trials in place of its runs.
        prepare: make what runs share, and stop.
        tuning_only: leave the held-out text alone.
        discard_models: remove each model once its row is written.
        gpus: numbers of the GPUs to use; none for the CPU.
        slurm: settings of jobs, to submit them; None to run here.
    """

    folder: Path
    only: Sequence[str] = ()
    budgets: Sequence[float] = ()
    trials: bool = False
    prepare: bool = False
    tuning_only: bool = False
    discard_models: bool = False
    gpus: Sequence[str] = ()
    slurm: dict[str, str] | None = None

    @property
    def place(self) -> Path:
        """The folder of the runs, the rows, and logs."""
        return self.folder / TRIALS if self.trials else self.folder

    @property
    def is_closed(self) -> bool:
        """Whether the held-out text stays unread."""
        return self.tuning_only or self.trials


@dataclass
class StudyOutcome:
    """What a study has so far.

    Attributes:
        runs: all that are planned.
        rows: of those that are finished, by name.
        failures: by the name of a run, why it failed and where its log is.
        submitted: what is in SLURM's queue, a line each.
    """

    runs: list[PlannedRun]
    rows: dict[str, StudyRow]
    failures: dict[str, str]
    submitted: list[str]

    def raise_failures(self) -> None:
        """
        Raises:
            UserError: something failed; it is named.
        """
        if self.failures:
            listed = "; ".join(f"{name} ({why})" for name, why in self.failures.items())
            raise UserError(f"{len(self.failures)} failed: {listed}; {RESUMES}")


def planned_runs(path: Path, options: StudyOptions, writes: bool = False) -> tuple[Shared, list[PlannedRun]]:
    """All runs with their costs, nothing of which has begun.

    Args:
        writes: the study's folder is locked by the caller, and may be written.

    Raises:
        UserError: the plan, or a run of it, cannot be run.
    """
    plan = load_plan(path)
    sizes = _chosen(plan, options)
    entropy_models = {draft.entropy_model for draft in _all(sizes)} - {None}
    basis = Basis(plan, options.folder, sorted(map(str, entropy_models)))
    shared = Shared(plan, options.folder, writes)
    shared.text.check(held_out=not options.is_closed)
    runs = [shared.planned(candidates) for candidates in sizes]
    if writes:
        basis.keep()
    return shared, runs


def run_study(path: Path, options: StudyOptions) -> StudyOutcome:
    """Run what is not finished yet.

    Raises:
        UserError: the plan or its text is bad, something that runs share cannot be made, or rows are of other settings.
        Interrupted: Ctrl-C; what is there stays.
    """
    try:
        with only_writer(options.folder):
            return _run(path, options)
    except Locked as error:
        if error.path != options.folder:
            raise
        raise UserError(
            f"'{options.folder}' is in use by another blt study; wait for it, or name another --out"
        ) from None
    except KeyboardInterrupt:
        raise Interrupted(RESUMES) from None
    except Interrupted:
        raise Interrupted(RESUMES) from None


def _run(path: Path, options: StudyOptions) -> StudyOutcome:
    folder = options.folder
    shared, runs = planned_runs(path, options, writes=True)
    rows = _rows_of(runs, shared.plan, options)
    outcome = StudyOutcome(runs, rows, {}, [])
    todo = [run for run in runs if not _is_done(rows.get(run.name), options)]
    LOGGER.info(f"{folder}: {len(runs)} runs, {len(runs) - len(todo)} of them finished")
    if not todo:
        return outcome
    if again := [run.name for run in todo if run.name in rows and not Path(run.draft.settings.run).is_dir()]:
        LOGGER.warning(
            f"{len(again)} runs are trained again ({again[0]} ...): their models were discarded before the held-out "
            "text was read; --tuning-only shows what there is"
        )
    if not (folder / PLAN).exists() or not path.samefile(folder / PLAN):
        with whole_file(folder / PLAN) as aside:
            shutil.copyfile(path, aside)
    sizes = [[run.draft, *(other.draft for other in run.others)] for run in todo]
    if options.slurm is not None:
        parts = [ALL_PARTS] if shared.missing(_all(sizes)) else []
        jobs = [_job(options, part=part) for part in parts] or [_job(options, run=run.name) for run in todo]
        outcome.submitted = [submit_job(job, options.slurm) for job in jobs if parts or not options.prepare]
    elif options.gpus:
        outcome.failures = _on_gpus(shared, sizes, options)
    else:
        drafts = _all(sizes)
        for part in shared.missing(drafts):
            shared.make(part, drafts)
        final = [shared.planned(candidates, is_final=True) for candidates in sizes]  # nothing begins if one cannot
        outcome.failures = {} if options.prepare else _one_after_the_other(final, options)
    outcome.rows = _rows_of(runs, shared.plan, options)
    return outcome


def _on_gpus(shared: Shared, sizes: Sequence[Sequence[Draft]], options: StudyOptions) -> dict[str, str]:
    """Run jobs in processes, each run once what it needs is there; why those that failed did."""
    drafts = _all(sizes)
    parts = {part: _job(options, part=part) for part in shared.needs(drafts)}
    needs: dict[str, list[str]] = {}
    if options.prepare:
        runs = [_job(options, part=MEASUREMENTS)]
        needs[runs[0].name] = [job.name for job in parts.values()]
    else:
        runs = [_job(options, run=candidates[0].name) for candidates in sizes]
        for job, candidates in zip(runs, sizes, strict=True):
            needs[job.name] = [parts[part].name for part in shared.needs(candidates)]
    return JobPool(options.place / LOGS, options.gpus).run([*parts.values(), *runs], needs)


def _one_after_the_other(runs: Sequence[PlannedRun], options: StudyOptions) -> dict[str, str]:
    """Run them in this process; why those that failed did."""
    failures: dict[str, str] = {}
    began, spent, total = time.monotonic(), 0.0, sum(run.training_flops for run in runs)
    for number, run in enumerate(runs, start=1):
        left = f", {time_left((time.monotonic() - began) * (total - spent) / spent)} of all" if spent else ""
        about = f"{run.steps:,} steps, {run.training_flops:.3g} FLOPs"
        LOGGER.info(f"run {number} of {len(runs)}: {run.name}, {about}{left}")
        spent += run.training_flops
        try:
            perform(_job(options, run=run.name))
        except Interrupted:
            raise
        except UserError as error:
            failures[run.name] = f"{error}; log: {run.draft.settings.run}/train.log"
        except Exception as error:
            log = options.place / LOGS / f"{run.name}.log"
            with whole_file(log) as aside:
                aside.write_text(traceback.format_exc(), encoding="utf-8")
            failures[run.name] = f"{type(error).__name__}: {error}; log: {log}"
        if run.name in failures:
            LOGGER.warning(f"{run.name} failed: {failures[run.name]}")
    return failures


def _chosen(plan: StudyPlan, options: StudyOptions) -> list[list[Draft]]:
    """The runs of the chosen families and budgets, or trials; of each the sizes from which one is picked."""
    for name in options.only:
        if name not in plan.families:
            raise UserError(f"only: the plan has no family '{name}'{nearest(name, list(plan.families))}")
    for budget in options.budgets:
        if budget not in plan.budgets:
            known = ", ".join(map(budget_name, plan.budgets))
            raise UserError(f"budget: {budget_name(budget)} is not one of the plan's budgets: {known}")
    if options.trials and plan.trials is None:
        raise UserError("trials: the plan has none; write them under trials:")
    drafts = plan.drafts(options.folder, options.trials)
    sizes = [candidates for candidates in drafts if is_chosen(candidates[0], options.only, options.budgets)]
    if not sizes:
        raise UserError("nothing of the plan is left to run; choose other families or budgets")
    return sizes


def _all(sizes: Sequence[Sequence[Draft]]) -> list[Draft]:
    return [draft for candidates in sizes for draft in candidates]


def _job(options: StudyOptions, run: str | None = None, part: str | None = None) -> StudyJob:
    return StudyJob(
        folder=str(options.folder.absolute()),
        run=run,
        part=part,
        only=list(options.only),
        budgets=list(options.budgets),
        trials=options.trials,
        tuning_only=options.tuning_only,
        discard_models=options.discard_models,
    )


def _is_done(row: StudyRow | None, options: StudyOptions) -> bool:
    return row is not None and (options.is_closed or row.held_out is not None)


def _rows_of(runs: Sequence[PlannedRun], plan: StudyPlan, options: StudyOptions) -> dict[str, StudyRow]:
    """The rows of those runs that are finished; all rows in the folder get the labels of the plan.

    Raises:
        UserError: a file there holds no row, or one of other settings than the plan's.
    """
    found = {}
    for path in sorted((options.place / ROWS).glob("*.json")):
        row = read_row(path)
        label = (plan.family(row.family).label or row.family) if row.family in plan.families else row.label
        if label != row.label:
            row = row.model_copy(update={"label": label})
            write_row(options.place, row)
        found[row.name] = row
    for run in (run for run in runs if run.name in found):
        row = found[run.name]
        changed = min((size.draft.differences(row.settings) for size in (run, *run.others)), key=len)
        if changed:
            raise UserError(
                f"'{options.place / ROWS / run.name}.json' is of other settings than the plan's ({changed[0]}); put "
                "the plan back, give the family another name, or remove the row and the run's folder"
            )
    return {run.name: found[run.name] for run in runs if run.name in found}
