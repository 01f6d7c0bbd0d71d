"""Tasks about the characters of words: `blt eval --tasks cute,g2p`."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch

from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.rows import line_of, must_be_free, rows_at
from bytelatent.device import choose_device
from bytelatent.errors import UserError
from bytelatent.evaluation import FoundModel, ReadSettings, Texts, TransformersModel, bootstrap, find_models
from bytelatent.evaluation.cute import CUTE, NUM_EXAMPLES, Words, cute_task
from bytelatent.evaluation.examples import (
    PAPER,
    STOP,
    Counts,
    ExampleTask,
    Generate,
    continue_tokens_with,
    continue_with,
)
from bytelatent.evaluation.noise import Noise, noises_of
from bytelatent.evaluation.phonemes import NAME as G2P
from bytelatent.evaluation.phonemes import g2p_task, pronunciations
from bytelatent.evaluation.text import FEWEST
from bytelatent.files import partial_path, write_whole_json
from bytelatent.inference.step import engine_for
from bytelatent.progress import Progress
from bytelatent.report import figure_format, write_noise_figure
from bytelatent.report.text import UNKNOWN, aligned
from bytelatent.signals import sigterm_interrupts
from bytelatent.terminal import print_json, print_line
from bytelatent.text.documents import must_have_read
from bytelatent.text.formats import kind_of
from bytelatent.text.streams import TextReader, readable

LOGGER = logging.getLogger(__name__)

Results = list[dict[str, Any]]

BATCH_SIZE = 16
MAX_WORD_BYTES = 10_000_000  # of text that words are taken from
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EXACT = "exact_match"
MEANING = "cute_sem"  # the task that needs pairs of words
FAMILIES = {"cute": tuple(CUTE), G2P: (G2P,)} | {name: (name,) for name in CUTE}
# Settings that a resumed evaluation must share with the one that was interrupted; its rows hold the rest.
FIXED = {"tasks", "limit", "shots", "seed", "noise", "noise_on", "noise_rates", "model", "entropy_model", "dtype"}
FIXED |= {"threshold"}


def run(settings: EvaluateSettings) -> None:
    own, others = split_tasks(settings.tasks or "")
    if others:
        raise UserError(f"tasks: '{own[0]}' and '{others[0]}' need separate commands; run one for each")
    check_figure(settings)
    with sigterm_interrupts():
        results = evaluate_examples(settings, own)
    if settings.as_json:
        print_json(_stored(results))
    else:
        print_line(table_of(results, settings.markdown))
    if settings.figure is not None:
        draw_scores(settings.figure, results)


def split_tasks(tasks: str) -> tuple[list[str], list[str]]:
    """The names in `--tasks`: of tasks of examples, and all others."""
    names = list(dict.fromkeys(name for part in tasks.split(",") if (name := part.strip())))
    return [name for name in names if name in FAMILIES], [name for name in names if name not in FAMILIES]


def noises_with(settings: EvaluateSettings) -> list[Noise | None]:
    """Without noise first, and then each noise."""
    noises = noises_of(settings.noise, settings.noise_rates, settings.seed)
    return [None, *(noise for noise in noises if noise.rate > 0)]


def check_figure(settings: EvaluateSettings) -> None:
    """
    Raises:
        UserError: there is to be a figure, and it has nothing to show or cannot be written.
    """
    if (path := settings.figure) is None:
        return
    figure_format(path)
    if not noises_with(settings)[1:]:
        rates = "its rates are all 0; name others" if settings.noise else "name one"
        raise UserError(f"figure: it shows scores with noise; {rates}: --noise drop --noise-rates 0.05,0.1")
    if find_spec("matplotlib") is None:
        raise UserError("figure: the package 'matplotlib' is missing; pip install matplotlib")
    with _writable("figure", path):
        if path.is_dir():
            raise UserError(f"figure: '{path}' is a folder; name a file")


def check_out(out: Path | None) -> None:
    """
    Raises:
        UserError: there are results already, or rows of an evaluation that was finished; or it cannot be written.
    """
    if out is not None:
        with _writable("out", out):
            for path in (out, answers_path(out)):
                if path.exists():
                    raise UserError(f"out: '{path}' holds something already; name another file, or move it away")


@contextmanager
def _writable(name: str, path: Path) -> Iterator[None]:
    """Refuse a file that cannot be written, before the work whose result it is to hold."""
    try:
        yield
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{name}: '{path}' cannot be written: {error.strerror or error}") from None


def answers_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.rows.jsonl")


def draw_scores(path: Path, results: Results, score: str = "exact match (%)", scale: float = 100) -> None:
    """Draw scores against the rate of each noise: exact match, for CUTE its mean, or what `score` names."""
    means = means_of_cute(results)
    curves: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    clean: dict[tuple[str, str], tuple[float, float]] = {}
    for result in [*means, *(one for one in results if not means or one["task"] not in CUTE)]:
        key, point = (result["model"], result["task"]), (result["rate"], scale * result["value"])
        if result["score"] not in (EXACT, score):
            continue
        if result["noise"] is None:
            clean[key] = point
        else:
            curves.setdefault((*key, result["noise"]), [clean[key]]).append(point)
    varies = [at == 2 or len({key[at] for key in curves}) > 1 for at in range(3)]
    names = [" ".join(part for part, is_shown in zip(key, varies, strict=True) if is_shown) for key in curves]
    write_noise_figure(path, dict(zip(names, curves.values(), strict=True)), score)


@dataclass(frozen=True)
class TaskRun:
    """A task that a model does, with noise or without."""

    model: str
    noise: Noise | None
    task: ExampleTask

    def rows(self) -> Results:
        """What is asked, each with the key by which it is resumed."""
        about = {"model": self.model, "noise": None if self.noise is None else str(self.noise), "task": self.task.name}
        return [{**about, "prompt": each.prompt, "answers": list(each.answers)} for each in self.task.examples]

    def scores(self, texts: list[str], settings: EvaluateSettings) -> Results:
        """A result for each score of the task."""
        noise, found = self.noise, []
        about = {"model": self.model, "noise": noise and noise.name, "rate": 0.0 if noise is None else noise.rate}
        for name, score in self.task.scores.items():
            pairs = zip(texts, self.task.examples, strict=True)
            counts = [score(text, example.answers) for text, example in pairs]
            value, interval = _ratio(counts, settings)
            found.append({**about, "task": self.task.name, "score": name, "value": value, "interval": interval})
            found[-1]["num_examples"] = len(texts)
        return found


def evaluate_examples(settings: EvaluateSettings, names: list[str]) -> Results:
    """The scores of models on tasks of examples; a model is loaded when it is first needed.

    Raises:
        UserError: words, a package or a model are missing, or --out cannot be written.
        Interrupted: Ctrl-C; names the file from which the same command resumes.
    """
    check_out(settings.out)
    noises = noises_with(settings)
    tasks = _tasks(settings, names)
    how = ReadSettings(
        choose_device(settings.device),
        DTYPES[settings.dtype],
        tokenizer=settings.tokenizer,
        threshold=settings.threshold,
    )
    every_model = find_models(settings.model, settings.entropy_model, how)
    found = dict(zip(settings.model, every_model, strict=True))
    models = {model: cache(partial(_generator, settings, one)) for model, one in found.items()}
    runs = [
        TaskRun(model, noise, task if noise is None else _with_noise(task, noise, settings))
        for model in models
        for noise in noises
        for task in tasks
    ]
    rows = [run.rows() for run in runs]
    every = [row for of_run in rows for row in of_run]
    results: Results = []
    with (
        _answers(settings, every, [one.state for one in found.values()]) as (known, add),
        Progress("answering", len(every), unit="examples") as progress,
    ):
        progress.advance(len(known))
        at = 0
        for run, of_run in zip(runs, rows, strict=True):
            texts = known[at : at + len(of_run)]
            at += len(of_run)
            if missing := of_run[len(texts) :]:
                generate = models[run.model]()
                new = generate([row["prompt"] for row in missing], STOP, run.task.max_new_bytes)
                for row, text in zip(missing, new, strict=True):
                    add(row, text)
                    texts.append(text)
                    progress.advance(1)
            results += run.scores(texts, settings)
        if settings.out is not None:
            write_whole_json(settings.out, _stored(results), indent=1)
    return results


def _stored(results: Results) -> dict[str, Results]:
    return {"results": results, "means": means_of_cute(results)}


def table_of(results: Results, markdown: bool = False) -> str:
    """A line for each score, and one for the mean of CUTE, in percent, beside the paper's: that of a mean of all."""
    several = len({result["model"] for result in results}) > 1
    noisy = any(result["noise"] for result in results)
    header = ["model"] * several + ["noise"] * noisy + ["task", "score", "%", "95 % interval", "examples"]
    lines = []
    for result in [*results, *means_of_cute(results)]:
        noise = f"{result['noise']}:{result['rate']:g}" if result["noise"] else UNKNOWN
        is_part = result.get("num_tasks", len(CUTE)) < len(CUTE)
        is_paper = result["noise"] is None and result["score"] == EXACT and result["task"] in PAPER and not is_part
        task = f"{result['task']} ({result['num_tasks']} of {len(CUTE)} tasks)" if is_part else result["task"]
        interval = [100 * value for value in result["interval"] or ()]
        lines.append([result["model"]] * several + [noise] * noisy)
        lines[-1] += [task, result["score"].replace("_", " "), f"{100 * result['value']:.1f}"]
        lines[-1] += ["{:.1f} to {:.1f}".format(*interval) if interval else UNKNOWN, f"{result['num_examples']:,}"]
        lines[-1] += [f"{value:.1f}" for value in PAPER[result["task"]]] if is_paper else [UNKNOWN, UNKNOWN]
    return aligned([*header, "Llama 3 8B", "BLT 8B"], lines, 2 + several + noisy, markdown)


def means_of_cute(results: Results) -> Results:
    """The mean over the tasks of CUTE of each model and noise that did several."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        if result["task"] in CUTE:
            groups.setdefault((result["model"], result["noise"], result["rate"]), []).append(result)
    found = []
    for of_group in groups.values():
        if len(of_group) > 1:
            value, count = fmean(result["value"] for result in of_group), sum(r["num_examples"] for r in of_group)
            found.append({**of_group[0], "task": "cute", "value": value, "interval": None, "num_examples": count})
            found[-1]["num_tasks"] = len(of_group)
    return found


def _tasks(settings: EvaluateSettings, names: list[str]) -> list[ExampleTask]:
    wanted = list(dict.fromkeys(task for name in names for task in FAMILIES[name]))
    if MEANING in wanted and settings.related is None and MEANING not in names:
        LOGGER.warning(f"{MEANING} is left out: it needs a file of related words (--related)")
        wanted.remove(MEANING)
    limit, seed, words = settings.limit or NUM_EXAMPLES, settings.seed, None
    if any(task in CUTE for task in wanted):
        if settings.words is None:
            raise UserError("cute: name words with --words FILE: a file with one word per line, or any text")
        rows = settings.model_dump(include={"text_key", "max_bad_rows", "max_row_bytes"})
        try:
            texts = Texts([str(settings.words)], **rows, max_bytes=MAX_WORD_BYTES)
        except UserError as error:
            raise UserError(f"words: {str(error).removeprefix('data: ')}") from None
        text = "\n".join(sample.document.text.decode("utf-8", "replace") for sample in texts.read())
        must_have_read(texts.bad_rows.unread)
        related = "" if settings.related is None else _text_in(settings.related)
        words = Words.parse(text, related)
    found = []
    for task in wanted:
        of = g2p_task(pronunciations(), limit, seed, settings.shots) if task == G2P else None
        assert of is not None or words is not None
        found.append(of or cute_task(task, words, limit, seed, settings.shots))  # pyright: ignore[reportArgumentType]
    return found


def _text_in(path: Path) -> str:
    """A file of lines, whatever it is called."""
    with readable(str(path)), TextReader(str(path), kind_of(str(path)).compression) as text:
        text.skip_byte_order_mark()
        return text.read().decode("utf-8", "replace")


def _with_noise(task: ExampleTask, noise: Noise, settings: EvaluateSettings) -> ExampleTask:
    """A task whose prompts have noise; its completions are the model's."""
    if settings.noise_on == "completion":
        raise UserError(f"noise-on: the completions of {task.name} are the model's own; use --noise-on prompt")
    return replace(task, examples=tuple(replace(each, prompt=noise(each.prompt)) for each in task.examples))


def _generator(settings: EvaluateSettings, found: FoundModel) -> Generate:
    if (stored := found.stored) is None:
        model = found.load()
        assert isinstance(model, TransformersModel)
        return continue_tokens_with(model, settings.batch_size or BATCH_SIZE)
    loaded = stored.load(choose_device(settings.device), DTYPES[settings.dtype])
    # In float32, however it is stored: the same patches as those of `BLT`.
    byte_lm = loaded.byte_lm.to(torch.float32) if loaded.byte_lm is not None else None
    size = settings.batch_size or BATCH_SIZE
    engine = engine_for(loaded.model, stored.config.patching, byte_lm, size, vocabulary=loaded.vocabulary)
    return continue_with(engine, size)


@contextmanager
def _answers(
    settings: EvaluateSettings, rows: list[dict[str, Any]], states: list[str]
) -> Iterator[tuple[list[str], Callable[[dict[str, Any], str], None]]]:
    """The answers that an interrupted call left to the first rows, and what stores one more."""
    if settings.out is None:
        yield [], lambda row, text: None
        return
    path = answers_path(settings.out)
    must_be_free(path)
    made_with = {**json.loads(settings.model_dump_json(include=FIXED)), "files of models": states}
    with rows_at(path, rows, made_with, {"text"}) as (file, num_done):
        known = []
        if num_done:
            LOGGER.info(f"{num_done:,} of {len(rows):,} answers are in '{partial_path(path)}'; resuming")
            with partial_path(path).open("rb") as lines:
                known = [json.loads(line)["text"] for line in lines]

        def add(row: dict[str, Any], text: str) -> None:
            file.write(line_of({**row, "text": text}))

        yield known, add


def _ratio(counts: list[Counts], settings: EvaluateSettings) -> tuple[float, tuple[float, float] | None]:
    """The sum of numerators over that of denominators, and its 95 % interval by a bootstrap over examples."""
    top, bottom = np.array(counts, dtype=np.float64).T
    interval = None
    if len(counts) >= FEWEST and settings.resamples:
        # It takes nats and gives bits.
        [interval], _ = bootstrap(top[None] * math.log(2), bottom, settings.resamples, settings.seed)
    return float(top.sum() / bottom.sum()), interval
