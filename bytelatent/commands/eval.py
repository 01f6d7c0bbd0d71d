"""`blt eval`, also as `python -m bytelatent.eval`: bits per byte of text, tasks, or robustness against noise."""

from bytelatent.commands.eval_options import EvaluateSettings
from bytelatent.errors import UserError, nearest

TEXT, NOISE, TASKS, WORDS = "TEXT", "TEXT with --noise", "tasks of lm-evaluation-harness", "cute and g2p"
# Where options that do not work everywhere do; elsewhere they are refused.
PLACES = {
    **dict.fromkeys(("shots", "limit", "noise_on"), (TASKS, WORDS)),
    **dict.fromkeys(("include_path", "samples", "temperature", "run_programs"), (TASKS,)),
    **dict.fromkeys(("words", "related"), (WORDS,)),
    **dict.fromkeys(("by", "overlap", "max_bytes"), (TEXT, NOISE)),
    **dict.fromkeys(("text_key", "max_bad_rows", "max_row_bytes", "resamples", "tokenizer"), (TEXT, NOISE, WORDS)),
    "context": (TEXT, NOISE, TASKS),
    "figure": (NOISE, TASKS, WORDS),
}


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
        check_options(settings, WORDS if own else TASKS)
        (eval_characters if own else eval_tasks).run(settings)
    elif not settings.text:
        raise UserError("eval: name the text to measure: blt eval held-out/*.jsonl --model runs/demo")
    elif settings.noise or settings.noise_rates is not None:
        from bytelatent.commands import eval_noise

        check_options(settings, NOISE)
        eval_noise.run(settings)
    else:
        from bytelatent.commands import eval_text

        check_options(settings, TEXT)
        eval_text.run(settings)


def check_options(settings: EvaluateSettings, place: str) -> None:
    """
    Raises:
        UserError: an option was given that has no effect there.
    """
    for name, places in PLACES.items():
        default = EvaluateSettings.model_fields[name].get_default(call_default_factory=True)
        if place not in places and getattr(settings, name) != default:
            option = name.replace("_", "-")
            raise UserError(f"{option}: it has no effect on {place}, only on {' and on '.join(places)}; leave it out")
    if settings.noise_on != "both" and not settings.noise:
        raise UserError("noise-on: there is no noise; name one: --noise drop, or --noise all")
