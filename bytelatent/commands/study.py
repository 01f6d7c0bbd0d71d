"""`blt study`: run a plan, and show what came out."""

import logging
from pathlib import Path

import torch

from bytelatent.commands.study_options import StudySettings
from bytelatent.errors import UserError
from bytelatent.study import read_rows
from bytelatent.study.page import write_study
from bytelatent.study.processes import gpu_names
from bytelatent.study.run import StudyOptions, StudyOutcome, planned_runs, run_study
from bytelatent.study.tables import plan_table, plan_values, results_table, trials_table
from bytelatent.terminal import print_json, print_line

LOGGER = logging.getLogger(__name__)


def run(settings: StudySettings) -> None:
    options = StudyOptions(
        folder=settings.out or Path("runs") / settings.plan.stem,
        only=settings.only,
        budgets=settings.budget,
        trials=settings.trials,
        prepare=settings.prepare,
        tuning_only=settings.tuning_only,
        discard_models=settings.discard_models,
        gpus=_gpus(settings),
        slurm=_slurm(settings),
    )
    if settings.dry_run:
        _, runs = planned_runs(settings.plan, options)
        print_json(plan_values(runs)) if settings.as_json else print_line(plan_table(runs))
        return
    outcome = run_study(settings.plan, options)
    for line in outcome.submitted:
        print_line(line)
    if outcome.submitted:
        print_line("the same command continues once these are done, and gathers")
    _show(outcome, options, settings.as_json)
    outcome.raise_failures()


def _show(outcome: StudyOutcome, options: StudyOptions, as_json: bool) -> None:
    rows = list(outcome.rows.values())
    if as_json:
        print_json([row.plain() for row in rows])
    elif rows and options.trials:
        names = {run.name: run.draft.variation for run in outcome.runs}
        print_line(trials_table([(names[row.name], row) for row in rows]))
    elif rows:
        print_line(results_table(rows))
    if any(row.held_out is not None for row in rows):
        LOGGER.info(f"the page: {write_study(read_rows([options.folder]), options.folder)[0]}")


def _gpus(settings: StudySettings) -> list[str]:
    there = torch.cuda.device_count()
    if settings.gpus is not None and settings.gpus > there:
        raise UserError(f"gpus: this machine has {there}, not {settings.gpus}; give fewer, or leave it out for all")
    return gpu_names(there if settings.gpus is None else settings.gpus)


def _slurm(settings: StudySettings) -> dict[str, str] | None:
    if not settings.slurm:
        if settings.settings:
            raise UserError(f"'{settings.settings[0]}' is a setting of a job, and there are jobs with --slurm only")
        return None
    found = {}
    for given in settings.settings:
        key, equals, value = given.partition("=")
        if not key or not equals:
            raise UserError(f"'{given}' is no setting of a job; write key=value, as in partition=gpu")
        found[key] = value
    return found
