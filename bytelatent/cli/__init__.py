"""`blt VERB`: one small function a verb, no logic.

The verbs stand by their subject: `text` makes text ready, `training` trains, `using` runs models, `weights` converts
and describes them, `bench` measures the machine. Here they become one command.
"""

import sys

import typer
import typer.rich_utils

from bytelatent.cli import bench, text, training, using, weights
from bytelatent.errors import guarded
from bytelatent.terminal import Console, safe

VERBS = {  # as the help lists them
    "demo": training.demo,
    "prepare": text.prepare,
    "train": training.train,
    "runs": training.runs,
    "launch": training.launch,
    "calibrate": text.calibrate,
    "entropies": text.entropies,
    "eval": using.evaluate,
    "generate": using.generate,
    "patch": using.patch,
    "convert": weights.convert,
    "export": weights.export,
    "info": weights.info,
}

app = typer.Typer(
    name="blt",
    help="Byte-level language models with dynamic patches.\n\nExample:  `blt demo`",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, verb in VERBS.items():
    app.command(name)(verb)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """The command `blt`."""
    if any(argument != safe(argument) for argument in sys.argv):  # typer shows one that it cannot take
        typer.rich_utils.Console = Console  # pyright: ignore[reportPrivateImportUsage]
    guarded(app)
