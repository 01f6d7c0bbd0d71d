"""`blt eval`, also as `python -m bytelatent.eval`: bits per byte of text, tasks, or robustness against noise."""

from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.errors import UserError, nearest


def run(settings: EvaluateSettings) -> None:
    if settings.tasks is not None:
        if settings.text:
            raise UserError("tasks: they bring their own text; leave TEXT out, or --tasks")
        from bytelatent.commands import eval_characters, eval_tasks

        own, others = eval_characters.split_tasks(settings.tasks)
        for name in others:
            hint = nearest(name, list(eval_characters.FAMILIES), cutoff=0.8)
            if hint and settings.include_path is None:
                raise UserError(f"tasks: '{name}' is unknown{hint}")
        (eval_characters if own else eval_tasks).run(settings)
    elif not settings.text:
        raise UserError("eval: name the text to measure: blt eval held-out/*.jsonl --model runs/demo")
    elif settings.noise or settings.noise_rates is not None:
        from bytelatent.commands import eval_noise

        eval_noise.run(settings)
    else:
        from bytelatent.commands import eval_text

        eval_text.run(settings)
