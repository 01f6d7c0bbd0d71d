"""`blt VERB`: options made from the settings of each verb."""

import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.rich_utils

from bytelatent import __version__, log, signals
from bytelatent.cli.options import verb_of
from bytelatent.commands import settings
from bytelatent.config import Settings
from bytelatent.errors import Interrupted, guarded
from bytelatent.log import Console
from bytelatent.prepare import PrepareSettings
from bytelatent.terminal import print_line, safe

# The settings and the module in `commands` of each verb, in the order in which the help lists them.
VERBS: dict[str, tuple[type[Settings], str]] = {
    "demo": (settings.DemoSettings, "demo"),
    "prepare": (PrepareSettings, "prepare"),
    "train": (settings.TrainArguments, "train"),
    "configs": (settings.ConfigsSettings, "configs"),
    "runs": (settings.RunsSettings, "runs"),
    "launch": (settings.LaunchArguments, "launch"),
    "calibrate": (settings.CalibrateSettings, "calibrate"),
    "entropies": (settings.EntropiesSettings, "entropies"),
    "eval": (settings.EvaluateSettings, "evaluate"),
    "generate": (settings.GenerateSettings, "generate"),
    "patch": (settings.PatchesSettings, "patch"),
    "convert": (settings.ConvertSettings, "convert"),
    "export": (settings.ExportSettings, "export"),
    "info": (settings.InfoSettings, "info"),
}
BENCHMARKS: dict[str, tuple[type[Settings], str]] = {"train": (settings.BenchTrainSettings, "bench")}

app = typer.Typer(
    name="blt",
    help="Byte-level language models with dynamic patches.\n\nExample:  `blt demo`",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure this machine.\n\nExample:  `blt bench train demo-blt`", no_args_is_help=True)


def _running(module: str) -> Callable[[Any], None]:
    """Run a verb. Ctrl-C ends it in one line: typer would end it without a word."""

    def run(given: Any) -> None:
        signals.begin()
        try:
            import_module(f"bytelatent.commands.{module}").run(given)
        except KeyboardInterrupt as stop:
            raise Interrupted(str(stop)) from None

    return run


def _log_level(quiet: bool, verbose: bool) -> None:
    log.configure(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


for group, verbs in ((app, VERBS), (bench, BENCHMARKS)):
    for name, (model, module) in verbs.items():
        group.command(name)(verb_of(model, _running(module), _log_level))
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        print_line(f"bytelatent {__version__}")
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
