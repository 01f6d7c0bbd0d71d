"""Tasks about the characters of words: `blt eval --tasks cute,g2p`."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from bytelatent.commands.generate import line_of, rows_at, text_in_file
from bytelatent.commands.options import EvaluateSettings
from bytelatent.device import choose_device, precision_of_weights
from bytelatent.errors import UserError
from bytelatent.evaluation import bootstrap
from bytelatent.evaluation.cute import CUTE, NUM_EXAMPLES, Words, cute_task
from bytelatent.evaluation.examples import PAPER, STOP, Counts, ExampleTask, Generate, continue_with
from bytelatent.evaluation.noise import Noise, noises_of
from bytelatent.evaluation.phonemes import NAME as G2P
from bytelatent.evaluation.phonemes import g2p_task, pronunciations
from bytelatent.files import partial_path
from bytelatent.inference.step import engine_for
from bytelatent.progress import Progress
from bytelatent.report.text import UNKNOWN, aligned
from bytelatent.weights import open_pretrained

LOGGER = logging.getLogger(__name__)

MEANING = "cute_sem"  # the task that needs pairs of words
FAMILIES = {"cute": tuple(CUTE), G2P: (G2P,)} | {name: (name,) for name in CUTE}
BATCH_SIZE = 32
RESAMPLES = 1000
# Settings that a resumed evaluation must share with the one that was interrupted; its rows hold the rest.
FIXED = {"tasks", "limit", "shots", "seed", "noise", "noise_on", "noise_rates", "model", "entropy_model", "dtype"}


def split_tasks(tasks: str) -> tuple[list[str], list[str]]:
    """The names in `--tasks`: of tasks of examples, and all others."""
    names = list(dict.fromkeys(name for part in tasks.split(",") if (name := part.strip())))
    return [name for name in names if name in FAMILIES], [name for name in names if name not in FAMILIES]


def noises_with(settings: EvaluateSettings) -> list[Noise | None]:
    """Without noise first, and then each noise."""
    noises = noises_of(settings.noise, settings.noise_rates, settings.seed)
    return [None, *(noise for noise in noises if noise.rate > 0)]


@dataclass(frozen=True)
class Run:
    """A task that a model does, with noise or without."""

    model: str
    noise: Noise | None
    task: ExampleTask

    def rows(self) -> list[dict[str, Any]]:
        """What is asked, each with the key by which it is resumed."""
        about = {"model": self.model, "noise": None if self.noise is None else str(self.noise), "task": self.task.name}
        return [{**about, "prompt": each.prompt, "answers": list(each.answers)} for each in self.task.examples]

    def scores(self, texts: list[str], seed: int) -> list[dict[str, Any]]:
        """A result for each score of the task."""
        noise, found = self.noise, []
        about = {"model": self.model, "noise": noise and noise.name, "rate": 0.0 if noise is None else noise.rate}
        for name, score in self.task.scores.items():
            pairs = zip(texts, self.task.examples, strict=True)
            counts = [score(text, example.answers) for text, example in pairs]
            value, interval = _ratio(counts, seed)
            found.append({**about, "task": self.task.name, "score": name, "value": value, "interval": interval})
            found[-1]["num_examples"] = len(texts)
        return found


def evaluate_examples(settings: EvaluateSettings, names: list[str]) -> list[dict[str, Any]]:
    """The scores of models on tasks of examples; a model is loaded when it is first needed.

    Raises:
        UserError: words, a package or a model are missing, or --out cannot be written.
        Interrupted: Ctrl-C; names the file from which the same command resumes.
    """
    noises = noises_with(settings)
    tasks = _tasks(settings, names)
    models = {model: _generator(settings, model) for model in settings.model}
    runs = [
        Run(model, noise, task if noise is None else _with_noise(task, noise, settings))
        for model in models
        for noise in noises
        for task in tasks
    ]
    rows = [run.rows() for run in runs]
    every = [row for of_run in rows for row in of_run]
    results: list[dict[str, Any]] = []
    with _answers(settings, every) as (known, add), Progress("answering", len(every), unit="examples") as progress:
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
            results += run.scores(texts, settings.seed)
    return results


def table_of(results: list[dict[str, Any]], markdown: bool = False) -> str:
    """A line for each score, and one for the mean of CUTE, in percent, beside the paper's."""
    several = len({result["model"] for result in results}) > 1
    noisy = any(result["noise"] for result in results)
    header = ["model"] * several + ["noise"] * noisy + ["task", "score", "%", "95 % interval", "examples"]
    lines = []
    for result in [*results, *means_of_cute(results)]:
        noise = f"{result['noise']}:{result['rate']:g}" if result["noise"] else UNKNOWN
        is_paper = result["noise"] is None and result["score"] == "exact_match" and result["task"] in PAPER
        low, high = result["interval"] or (None, None)
        lines.append([result["model"]] * several + [noise] * noisy)
        lines[-1] += [result["task"], result["score"].replace("_", " "), f"{100 * result['value']:.1f}"]
        lines[-1] += [UNKNOWN if low is None else f"{100 * low:.1f} to {100 * high:.1f}", f"{result['num_examples']:,}"]
        lines[-1] += [f"{value:.1f}" for value in PAPER[result["task"]]] if is_paper else [UNKNOWN, UNKNOWN]
    return aligned([*header, "Llama 3 8B", "BLT 8B"], lines, 2 + several + noisy, markdown)


def means_of_cute(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
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
        text, related = (
            "" if path is None else text_in_file(str(path), option).decode("utf-8", "replace")
            for option, path in (("words", settings.words), ("related", settings.related))
        )
        words = Words.parse(text, related)
    found = []
    for task in wanted:
        of = g2p_task(pronunciations(), limit, seed, settings.shots) if task == G2P else None
        assert of is not None or words is not None
        found.append(of or cute_task(task, words, limit, seed, settings.shots))  # pyright: ignore[reportArgumentType]
    return found


def _with_noise(task: ExampleTask, noise: Noise, settings: EvaluateSettings) -> ExampleTask:
    """A task whose prompts have noise; its completions are the model's."""
    if settings.noise_on == "completion":
        raise UserError(f"noise-on: the completions of {task.name} are the model's own; use --noise-on prompt")
    return replace(task, examples=tuple(replace(each, prompt=noise(each.prompt)) for each in task.examples))


def _generator(settings: EvaluateSettings, model: str) -> Callable[[], Generate]:
    """What loads a model, which is there, and gives the same when it is called again."""
    precision, device = precision_of_weights(settings.dtype), choose_device(settings.device)
    found = open_pretrained(model, settings.entropy_model)
    patching = found.config.patching
    if patching is not None and patching.needs_entropies and found.byte_lm is None:
        raise UserError(f"eval: the patches of '{model}' need a byte LM; name it with --entropy-model")
    generate: list[Generate] = []

    def load() -> Generate:
        if not generate:
            loaded = found.load(device, precision)
            # In float32, however it is stored: the same patches as those of `BLT`.
            byte_lm = loaded.byte_lm.to(precision_of_weights("float32")) if loaded.byte_lm is not None else None
            generate.append(continue_with(engine_for(loaded.model, patching, byte_lm, BATCH_SIZE)))
        return generate[0]

    return load


@contextmanager
def _answers(
    settings: EvaluateSettings, rows: list[dict[str, Any]]
) -> Iterator[tuple[list[str], Callable[[dict[str, Any], str], None]]]:
    """The answers that an interrupted call left to the first rows, and what stores one more."""
    if settings.out is None:
        yield [], lambda row, text: None
        return
    if settings.out.exists():
        raise UserError(f"out: '{settings.out}' is there already; name another file, or move it away")
    path = settings.out.with_name(f"{settings.out.name}.rows.jsonl")
    made_with = json.loads(settings.model_dump_json(include=FIXED))
    with rows_at(path, rows, made_with, {"text"}) as (file, num_done):
        known = []
        if num_done:
            LOGGER.info(f"{num_done:,} of {len(rows):,} answers are in '{partial_path(path)}'; resuming")
            with partial_path(path).open("rb") as lines:
                known = [json.loads(line)["text"] for line in lines]
        yield known, lambda row, text: file.write(line_of({**row, "text": text})) and None


def _ratio(counts: list[Counts], seed: int) -> tuple[float, tuple[float, float] | None]:
    """The sum of numerators over that of denominators, and its 95 % interval by a bootstrap over examples."""
    top, bottom = np.array(counts, dtype=np.float64).T
    if len(counts) < 2:
        return float(top.sum() / bottom.sum()), None
    [found], _ = bootstrap(top[None] * math.log(2), bottom, RESAMPLES, seed)  # it takes nats and gives bits
    return float(top.sum() / bottom.sum()), found
