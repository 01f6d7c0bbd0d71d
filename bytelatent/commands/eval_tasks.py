"""Tasks of lm-evaluation-harness: `blt eval --tasks`."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from bytelatent.commands.eval_characters import check_figure, check_out, draw_scores, noises_with, rows_of
from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.errors import Interrupted, UserError
from bytelatent.evaluation.examples import PAPER
from bytelatent.evaluation.noise import NOISES, Noise, with_noise
from bytelatent.files import growing_file, partial_path, write_whole_json
from bytelatent.report.text import UNKNOWN, aligned, number
from bytelatent.signals import sigterm_interrupts
from bytelatent.terminal import print_json, print_line

LOGGER = logging.getLogger(__name__)

BOOTSTRAPS = 1000  # of metrics whose standard error has no formula
ERROR = "_stderr"
MAIN_METRICS = ("acc_norm,none", "acc,none")  # of which the first that a task has is drawn and compared
PACKAGES = ("lm_eval", "datasets", "evaluate", "jinja2", "sacrebleu", "rouge_score", "sklearn", "sqlitedict")
PACKAGES += ("pytablewriter", "dill", "word2number", "more_itertools")
NOISY = ("lm_eval", "datasets", "evaluate", "httpx", "huggingface_hub")


def run(settings: EvaluateSettings) -> None:
    check_figure(settings)
    result = evaluate_tasks(settings)
    if settings.as_json:
        print_json(_plain({key: value for key, value in result.items() if key != "samples"}))
    else:
        print_line(_table(result, settings.markdown))
    if settings.figure is not None:
        shown = [row for row in [*result["groups"], *result["tasks"]] if not row["in_group"]]
        about = [{"model": result["model"], "task": row["name"], "score": "score"} for row in shown]
        scores = [{**row, **own, "value": _main(row)} for row, own in zip(shown, about, strict=True)]
        draw_scores(settings.figure, scores, "score", scale=1)


def evaluate_tasks(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate a model on tasks.

    Returns:
        `model`; for each of `tasks` and `groups`, without noise and with each noise, its `shots`, number of questions,
        metrics and their standard errors; and `samples`: each question with its answers.

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
    check_out(settings.out)
    require_lm_eval()
    with _quiet_libraries(), sigterm_interrupts():
        from bytelatent.evaluation.harness import HarnessModel
        from bytelatent.evaluation.tasks import TaskFinder

        finder = TaskFinder(settings.include_path, settings.samples, settings.temperature, settings.run_programs)
        own = settings.model_dump(include={"entropy_model", "device", "dtype", "threshold", "batch_size", "seed"})
        make: Any = HarnessModel  # lm_eval's decorator hides its arguments
        model = make(settings.model[0], **own, max_length=settings.context)  # no weights yet
        noises, tasks = noises_with(settings), finder.load(names, settings.shots)
        with _stored_answers(settings, model):
            found = [_evaluate(model, tasks, settings, noise) for noise in noises]
            rows = {key: [row for part in found for row in part[key]] for key in ("tasks", "groups")}
            samples = {name: own for part in found for name, own in part["samples"].items()}
            result = {"model": settings.model[0], **rows, "samples": samples}
            if settings.out is not None:
                write_whole_json(settings.out, _plain(result), indent=1)
    return result


def require_lm_eval() -> None:
    """
    Raises:
        UserError: lm_eval, or what it needs, is not installed.
    """
    for name in PACKAGES:
        if find_spec(name) is None:
            raise UserError(f"--tasks needs the package {name}; run: pip install 'bytelatent[eval]'")


def _evaluate(model: Any, tasks: dict[str, Any], settings: EvaluateSettings, noise: Noise | None) -> dict[str, Any]:
    import lm_eval  # pyright: ignore[reportMissingImports]

    from bytelatent.evaluation.tasks import FEWSHOT_SEED

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples with each noise
    found: Any = lm_eval.evaluate(
        model if noise is None else with_noise(model, noise, settings.noise_on),
        tasks,
        limit=settings.limit,
        bootstrap_iters=BOOTSTRAPS,
        confirm_run_unsafe_code=True,
    )
    inner = {child for children in found.get("group_subtasks", {}).values() for child in children}

    def about(name: str, values: dict[str, Any]) -> dict[str, Any]:
        metrics = {key: value for key, value in values.items() if "," in key}
        return {
            "name": name,
            "noise": noise and noise.name,
            "rate": 0.0 if noise is None else noise.rate,
            "in_group": name in inner,
            "shots": found["n-shot"].get(name),
            "questions": values.get("sample_len"),
            "metrics": {key: _number(value) for key, value in metrics.items() if ERROR not in key},
            "errors": {key.replace(ERROR, ""): _number(value) for key, value in metrics.items() if ERROR in key},
            "version": found["versions"].get(name),
        }

    groups = found.get("groups", {})
    rows = [about(name, values) for name, values in found["results"].items() if name not in groups]
    after = "" if noise is None else f" {noise}"
    samples = {f"{name}{after}": list(map(_of_sample, rows)) for name, rows in found["samples"].items()}
    return {"tasks": rows, "groups": [about(name, values) for name, values in groups.items()], "samples": samples}


def _of_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a question: which it is, its requests and their answers, and its metrics."""
    given = {key: sample[key] for key in ("doc_id", "target", "arguments", "resps", "filter")}
    return given | {name: sample[name] for name in sample["metrics"]}


@contextmanager
def _stored_answers(settings: EvaluateSettings, model: Any) -> Iterator[None]:
    """Answers are kept beside --out until the results are there."""
    if settings.out is None:
        yield
        return
    from bytelatent.evaluation.harness import StoredAnswers

    path = rows_of(settings.out)
    part = partial_path(path)
    if part.is_file():  # before its last line, if it has no end, is cut off
        with part.open("rb") as lines:
            StoredAnswers.read(lines, str(part))
    try:
        with growing_file(path) as file, part.open("rb") as lines:
            model.stored = StoredAnswers(lines, file, model.made_with(), str(part))
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"answers so far are in '{part}'; the same command resumes") from None


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without the notices and bars of lm_eval and datasets, which repeat what is shown here."""
    import datasets  # pyright: ignore[reportMissingImports]
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


def _main(row: dict[str, Any]) -> float | None:
    """The metric of a task that is drawn and compared."""
    metrics = row["metrics"]
    return next((metrics[key] for key in (*MAIN_METRICS, *metrics) if key in metrics), None)


def _paper(row: dict[str, Any]) -> tuple[float, ...]:
    """The paper's numbers of Llama 3 and BLT for a task without noise, or with noise at the paper's rate."""
    noise, usual = row["noise"], row["noise"] is not None and NOISES[row["noise"]].rate == row["rate"]
    return PAPER.get(row["name"] if noise is None else f"{row['name']} {noise}", ()) if usual or noise is None else ()


def _means(rows: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """The mean over all noises, at the paper's rates, of each task that had them all."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        value = _main(row)
        if row["noise"] is not None and row["rate"] == NOISES[row["noise"]].rate and value is not None:
            scores.setdefault(row["name"], []).append(value)
    return [(name, sum(found) / len(found)) for name, found in scores.items() if len(found) == len(NOISES)]


def _table(result: dict[str, Any], markdown: bool) -> str:
    """A line for each metric, those of groups first, beside the paper's where there are any."""
    rows, every = [], [*result["groups"], *result["tasks"]]
    noisy, compared = any(row["noise"] for row in every), any(map(_paper, every))

    def references(values: tuple[float, ...]) -> list[str]:
        return [f"{value / 100:.3f}" for value in values or ()] or [UNKNOWN] * 2

    for row in every:
        noise = f"{row['noise']}:{row['rate']:g}" if row["noise"] else UNKNOWN
        first = [row["name"], *[noise] * noisy, _text(row["shots"]), _text(row["questions"])]
        main = next((key for key in MAIN_METRICS if key in row["metrics"]), "")
        for key, value in row["metrics"].items():
            metric, _, filtered = key.partition(",")
            metric = metric if filtered in ("", "none") else f"{metric} ({filtered})"
            error = row["errors"].get(key)
            line = [first[0], metric, *first[1:], number(value, 4), "" if error is None else number(error, 4)]
            rows.append(line + references(_paper(row) if key == main else ()) * compared)
            first = [""] * len(first) if not markdown else first
    for name, value in _means(every):
        line = [name, "mean", "all noises", "", "", number(value, 4), ""]
        rows.append(line + references(PAPER.get(f"{name} noise", ())) * compared)
    header = ["task", "metric", *["noise"] * noisy, "shots", "questions", "value", "error"]
    return aligned([*header, *["Llama 3 8B", "BLT 8B"] * compared], rows, 2 + noisy, markdown)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
