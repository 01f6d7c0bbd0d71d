"""`blt VERB`: one small function a verb, no logic.

The verbs stand by their subject: `text` makes text ready, `training` trains, `using` runs models, `weights` converts
and describes them, `bench` measures the machine. Here they become one command.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer
import typer.rich_utils

from bytelatent import __version__, interrupt, log
from bytelatent.cli import bench, text, training, using, weights
from bytelatent.errors import Interrupted, guarded
from bytelatent.log import Console
from bytelatent.terminal import safe, say

VERBS = {  # as the help lists them
    "demo": training.demo,
    "prepare": text.prepare,
    "train": training.train,
    "configs": training.configs,
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


def _stoppable(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, so that Ctrl-C ends it in one line: typer would end it without a word."""

    @wraps(verb)
    def run(*arguments: Any, **options: Any) -> None:
        interrupt.begin()
        try:
            verb(*arguments, **options)
        except KeyboardInterrupt as stop:
            raise Interrupted(str(stop)) from None

    return run


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

for command in [*app.registered_commands, *bench.app.registered_commands]:
    assert command.callback is not None
    command.callback = _stoppable(command.callback)


def _version(asked: bool) -> None:
    if asked:
        say(f"bytelatent {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """The command `blt`, with the process's own arguments if none are given."""
    # Threads of GNU's OpenMP that wait for one another keep their cores for milliseconds. Where other programs want the
    # cores, a training step takes several times as long then; alone, it is as fast either way (dev/LOG.md). It is read
    # as torch is imported, by the verbs.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    log.configure()
    given = sys.argv if arguments is None else arguments
    if any(argument != safe(argument) for argument in given):  # typer shows one that it cannot take
        typer.rich_utils.Console = Console  # pyright: ignore[reportPrivateImportUsage]
    guarded(lambda: app(arguments, prog_name="blt"))
