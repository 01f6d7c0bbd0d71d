"""How much noise in texts costs: `blt eval TEXT... --noise drop`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from bytelatent.commands.eval_characters import check_figure, check_out, draw_scores, noises_with
from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.commands.eval_text import FIXED, UNITS, evaluate_one, found_models, shown_interval, stored_rows
from bytelatent.data import Patcher
from bytelatent.errors import UserError
from bytelatent.evaluation import Measured, Texts, compare
from bytelatent.evaluation.noise import Noise
from bytelatent.evaluation.text import TextSample
from bytelatent.files import write_whole_json
from bytelatent.report.text import UNKNOWN, aligned, number
from bytelatent.signals import sigterm_interrupts
from bytelatent.terminal import print_json, print_line
from bytelatent.text import Document
from bytelatent.text.documents import forget_logged, must_have_read

BITS = "bits per byte"


@dataclass
class NoisyTexts(Texts):
    """Texts with noise in each document."""

    noise: Noise | None = None

    def read(self, patcher: Patcher | None = None) -> Iterator[TextSample]:
        for sample in super().read(patcher if self.noise is None else None):
            own = sample.document
            if self.noise is not None:
                own = Document(self.noise(own.text), own.id, field=own.field)
            yield replace(sample, document=own)


def run(settings: EvaluateSettings) -> None:
    if settings.by is not None:
        raise UserError("by: it does not go with --noise; leave one of them out")
    check_figure(settings)
    with sigterm_interrupts():
        result = evaluate_noise(settings)
    if settings.as_json:
        print_json(result)
    else:
        for remark in result["remarks"]:
            print_line(remark)
        print_line(_table(result["results"], settings.markdown))
    if settings.figure is not None:
        scores = [{**one, "task": "", "score": BITS, "value": one["bits_per_byte"]} for one in result["results"]]
        draw_scores(settings.figure, scores, BITS, scale=1)
    must_have_read(result["unread"])


def evaluate_noise(settings: EvaluateSettings) -> dict[str, Any]:
    """Bits per byte of the texts without noise and with each noise, whole documents; bytes are those with noise.

    Raises:
        UserError: a model or the text is not there, or there are too many bad rows.
        Interrupted: Ctrl-C; names the file from which the same command resumes.
    """
    forget_logged()
    check_out(settings.out)
    noises, models = noises_with(settings), found_models(settings)
    names = {"text_key", "max_bytes", "max_bad_rows", "max_row_bytes"}
    texts = NoisyTexts(
        settings.text, **settings.model_dump(include=names), valid_only=any(model.reads_tokens for model in models)
    )
    measured = [Measured() for _ in models for _ in noises]
    results: list[dict[str, Any]] = []
    remarks: list[str] = []
    with stored_rows(settings, models, measured, FIXED | {"noise", "noise_rates", "seed"}) as write:
        for model in models:
            loaded = replace(model, load=cache(model.load))
            for noise in noises:
                at, texts.noise = len(results), noise
                like = measured[at - len(noises) * (at // len(noises))] if at >= len(noises) else None
                extra, own = evaluate_one(loaded, measured[at], texts, at, write, like)
                [found] = compare([measured[at]], settings.resamples, settings.seed)
                about = {"noise": noise and noise.name, "rate": 0.0 if noise is None else noise.rate}
                results.append({**extra, **about, **found})
                remarks += [remark for remark in own if remark not in remarks]
        remarks += texts.remarks(next((model.name for model in models if model.reads_tokens), ""))
        result = {"results": results, "left_out": texts.num_left_out, "remarks": remarks}
        result |= {"bad_rows": texts.bad_rows.count, "unread": texts.bad_rows.unread}
        if settings.out is not None:
            write_whole_json(settings.out, result, indent=1)
    return result


def _table(results: list[dict[str, Any]], markdown: bool) -> str:
    several = len({result["model"] for result in results}) > 1
    units = [unit for unit in UNITS if any(result[f"mean_{unit}_bytes"] is not None for result in results)]
    header = ["model"] * several + ["noise", BITS, "95 % interval", "bytes"]
    lines = []
    for result in results:
        noise = f"{result['noise']}:{result['rate']:g}" if result["noise"] else UNKNOWN
        lines.append([result["model"]] * several + [noise, number(result["bits_per_byte"], 4)])
        lines[-1] += [shown_interval(result["interval"]), f"{result['num_bytes']:,}"]
        means = [value for unit in units if (value := result[f"mean_{unit}_bytes"]) is not None]
        lines[-1] += [number(means[0] if means else None)] * bool(units)
    return aligned([*header, *[f"bytes per {' or '.join(units)}"] * bool(units)], lines, 1 + several, markdown)
