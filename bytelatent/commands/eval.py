"""`blt eval`, also as `python -m bytelatent.eval`: bits per byte of text, tasks, or robustness against noise."""

from bytelatent.commands.options import EvaluateSettings
from bytelatent.errors import UserError


def run(settings: EvaluateSettings) -> None:
    if settings.tasks is not None:
        from bytelatent.commands import eval_tasks

        eval_tasks.run(settings)
        return
    if not settings.text:
        raise UserError("eval: name the text to measure: blt eval held-out/*.jsonl --model runs/demo")
    from bytelatent.commands import eval_text

    eval_text.run(settings)
