"""Tasks of lm-evaluation-harness: `blt eval --tasks`."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bytelatent.commands.options import EvaluateSettings
from bytelatent.errors import Interrupted, UserError
from bytelatent.files import growing_file, partial_path, write_whole_json
from bytelatent.report.text import aligned, number
from bytelatent.signals import sigterm_interrupts
from bytelatent.terminal import print_json, print_line

if TYPE_CHECKING:
    from bytelatent.evaluation.harness import HarnessModel

LOGGER = logging.getLogger(__name__)

BOOTSTRAPS = 1000  # of metrics whose standard error has no formula
ERROR = "_stderr"
NOISY = ("lm_eval", "datasets", "evaluate", "httpx", "huggingface_hub")


def run(settings: EvaluateSettings) -> None:
    result = evaluate_tasks(settings)
    if settings.as_json:
        print_json(_plain({key: value for key, value in result.items() if key != "samples"}))
    else:
        print_line(_table(result, settings.markdown))


def evaluate_tasks(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate a model on tasks.

    Returns:
        `model`; for each of `tasks` and `groups` its `shots`, number of questions, metrics and their standard errors;
        and `samples`: each question with its answers.

    Raises:
        UserError: a task or the model is unknown, a task's data cannot be reached, or a package is missing.
        Interrupted: Ctrl-C or SIGTERM; answers stay, if there is a file for them.
    """
    names = [name.strip() for name in (settings.tasks or "").split(",") if name.strip()]
    if not names:
        raise UserError("tasks: name some, with commas: --tasks hellaswag,arc_easy")
    if settings.text:
        raise UserError("tasks: they bring their own text; leave TEXT out, or --tasks")
    if len(settings.model) > 1:
        raise UserError("model: tasks take one model at a time; run the command for each")
    if settings.out is not None and settings.out.exists() and settings.out.stat().st_size:
        raise UserError(f"out: '{settings.out}' holds something already; name another file, or move it away")
    require_lm_eval()
    with _quiet_libraries(), sigterm_interrupts():
        from bytelatent.evaluation.harness import HarnessModel
        from bytelatent.evaluation.tasks import TaskFinder

        finder = TaskFinder(settings.include_path, settings.samples, settings.temperature, settings.run_programs)
        own = settings.model_dump(include={"entropy_model", "device", "dtype", "threshold"})
        model = HarnessModel(settings.model[0], **own, max_length=settings.context)  # no weights yet
        tasks = finder.load(names, settings.shots)
        with _stored_answers(settings, model):
            result = {"model": settings.model[0], **_evaluate(model, tasks, settings.limit)}
            if settings.out is not None:
                write_whole_json(settings.out, _plain(result), indent=1)
    return result


def require_lm_eval() -> None:
    """
    Raises:
        UserError: lm_eval is not installed.
    """
    try:
        import lm_eval  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("--tasks needs the package lm_eval; run: pip install 'bytelatent[eval]'") from None


def _evaluate(model: "HarnessModel", tasks: dict[str, Any], limit: int | None) -> dict[str, Any]:
    import lm_eval  # pyright: ignore[reportMissingImports]

    found = lm_eval.evaluate(model, tasks, limit=limit, bootstrap_iters=BOOTSTRAPS, confirm_run_unsafe_code=True)
    inner = {child for children in found.get("group_subtasks", {}).values() for child in children}

    def about(name: str, values: dict[str, Any]) -> dict[str, Any]:
        metrics = {key: value for key, value in values.items() if "," in key}
        return {
            "name": name,
            "in_group": name in inner,
            "shots": found["n-shot"].get(name),
            "questions": values.get("sample_len"),
            "metrics": {key: _number(value) for key, value in metrics.items() if ERROR not in key},
            "errors": {key.replace(ERROR, ""): _number(value) for key, value in metrics.items() if ERROR in key},
            "version": found["versions"].get(name),
        }

    groups = found.get("groups", {})
    rows = [about(name, values) for name, values in found["results"].items() if name not in groups]
    samples = {name: list(map(_of_sample, rows)) for name, rows in found["samples"].items()}
    return {"tasks": rows, "groups": [about(name, values) for name, values in groups.items()], "samples": samples}


def _of_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a question: which it is, its requests and their answers, and its metrics."""
    given = {key: sample[key] for key in ("doc_id", "target", "arguments", "resps", "filter")}
    return given | {name: sample[name] for name in sample["metrics"]}


@contextmanager
def _stored_answers(settings: EvaluateSettings, model: "HarnessModel") -> Iterator[None]:
    """Answers are kept beside --out until the results are there."""
    if settings.out is None:
        yield
        return
    from bytelatent.evaluation.harness import StoredAnswers

    path = settings.out.with_name(f"{settings.out.name}.rows.jsonl")
    part = partial_path(path)
    try:
        with growing_file(path) as file, part.open("rb") as lines:
            model.stored = StoredAnswers(lines, file, model.made_with(), str(part))
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"answers so far are in '{part}'; the same command resumes") from None


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without the notices and bars of lm_eval and datasets, which repeat what is shown here."""
    import datasets
    import lm_eval.api.task  # pyright: ignore[reportMissingImports]

    loggers = {logging.getLogger(name): logging.ERROR for name in NOISY}
    before = {logger: logger.level for logger in loggers}
    bar = lm_eval.api.task.tqdm
    for logger, level in loggers.items():
        logger.setLevel(level)
    lm_eval.api.task.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        for logger, level in before.items():
            logger.setLevel(level)


def _number(value: Any) -> float | None:
    """A metric as a plain number; lm_eval writes N/A where there is no standard error."""
    return float(value) if isinstance(value, int | float) or hasattr(value, "dtype") else None


def _plain(value: Any) -> Any:
    """Without what JSON cannot hold."""
    if hasattr(value, "tolist"):  # NumPy's
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def _table(result: dict[str, Any], markdown: bool) -> str:
    """A line for each metric, those of groups first."""
    rows = []
    for row in [*result["groups"], *result["tasks"]]:
        first = [row["name"], _text(row["shots"]), _text(row["questions"])]
        for key, value in row["metrics"].items():
            metric, _, filtered = key.partition(",")
            metric = metric if filtered in ("", "none") else f"{metric} ({filtered})"
            error = row["errors"].get(key)
            rows.append([first[0], metric, *first[1:], number(value, 4), "" if error is None else number(error, 4)])
            first = [""] * 3 if not markdown else first
    return aligned(["task", "metric", "shots", "questions", "value", "error"], rows, 2, markdown)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
