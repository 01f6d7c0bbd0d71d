"""`blt eval`, also as `python -m bytelatent.eval`: bits per byte of text, tasks, or robustness against noise."""

from importlib import import_module

from bytelatent.commands.options import EvaluateSettings
from bytelatent.errors import UserError


def run(settings: EvaluateSettings) -> None:
    if settings.text and settings.tasks is not None:
        raise UserError("eval: text and --tasks are given; give one of them")
    if settings.tasks is not None:
        name = "eval_characters"
    elif settings.text:
        name = "eval_noise" if settings.noise or settings.noise_rates is not None else "eval_text"
    else:
        raise UserError("eval: name the text to measure: blt eval held-out/*.jsonl --model runs/demo")
    import_module(f"bytelatent.commands.{name}").run(settings)
