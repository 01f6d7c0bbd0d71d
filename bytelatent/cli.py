"""`blt VERB`: options and help made from the settings of each verb, their fields and their docstrings."""

import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import typer
import typer.rich_utils

from bytelatent import __version__, log, signals
from bytelatent.commands import options
from bytelatent.config import Option, Settings, union_members, warn_renamed
from bytelatent.errors import guarded
from bytelatent.prepare import PrepareSettings
from bytelatent.terminal import print_line, safe

# The settings of each verb, in the order in which the help lists them. What it does is in the file of its name.
VERBS: dict[str, type[Settings]] = {
    "demo": options.DemoSettings,
    "prepare": PrepareSettings,
    "tokenizer": options.TokenizerSettings,
    "train": options.TrainArguments,
    "configs": options.ConfigsSettings,
    "runs": options.RunsSettings,
    "launch": options.LaunchArguments,
    "calibrate": options.CalibrateSettings,
    "entropies": options.EntropiesSettings,
    "eval": options.EvaluateSettings,
    "generate": options.GenerateSettings,
    "patch": options.PatchesSettings,
    "convert": options.ConvertSettings,
    "export": options.ExportSettings,
    "info": options.InfoSettings,
}
SECTION = "Attributes:"  # of a docstring
FIELD = re.compile(r"(\w+): (.*)")

app = typer.Typer(
    name="blt",
    help="Byte-level language models with dynamic patches.\n\nExample:  `blt demo`",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure this machine.\n\nExample:  `blt bench train demo-blt`", no_args_is_help=True)


class _Given(NamedTuple):
    """Where the value of an option belongs among the settings, and the option's new name if it is an old one."""

    key: tuple[str, ...]
    old: str = ""
    new: str = ""


def verb_of(settings: type[Settings], module: str) -> Any:
    """A function for typer: it reads its options into `settings` and runs the module of `commands` with them."""
    parsed_options = list(_options(settings))

    def verb(typer_context: typer.Context, quiet: bool, verbose: bool, **given: Any) -> None:
        log.configure(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
        values: dict[str, Any] = {}
        for parameter, (key, old, new) in parsed_options:
            source = typer_context.get_parameter_source(parameter.name)
            if source is None or source.name.startswith("DEFAULT"):
                continue
            if old:
                warn_renamed(old, new)
            group = values
            for part in key[:-1]:
                group = group.setdefault(part, {})
            group[key[-1]] = given[parameter.name]
        guarded(lambda: run(settings.parse(values)))

    def run(parsed: Settings) -> None:
        imported = import_module(f"bytelatent.commands.{module}")
        signals.begin()
        imported.run(parsed)

    shared = [
        _parameter("quiet", bool, False, typer.Option("--quiet", help="Show warnings only.")),
        _parameter("verbose", bool, False, typer.Option("--verbose", help="Show debugging messages too.")),
    ]
    typer_context = inspect.Parameter("typer_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [typer_context, *(parameter for parameter, _ in parsed_options), *shared]
    verb.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    verb.__doc__ = inspect.cleandoc(settings.__doc__ or "").partition(SECTION)[0]
    return verb


def _options(settings: type[Settings], within: tuple[str, ...] = ()) -> Iterator[tuple[inspect.Parameter, _Given]]:
    about = descriptions(settings)
    own_first = sorted(settings.model_fields.items(), key=lambda item: item[0] not in settings.__annotations__)
    for name, field in own_first:
        annotation = field.annotation
        if inspect.isclass(annotation) and issubclass(annotation, Settings):
            yield from _options(annotation, (*within, name))
            continue
        how = next((part for part in field.metadata if isinstance(part, Option)), Option())
        help = about.get(name, "")
        help = help[:1].upper() + help[1:]
        default = ... if field.is_required() else field.default
        default = None if default == [] else default
        kind = _kind(annotation)
        names = how.names or (_switch(name) if kind is bool and default is not False else _option(name),)
        info = typer.Argument(help=help) if how.is_argument else typer.Option(*names, help=help)
        yield _parameter(name, kind, default, info), _Given((*within, name))
    for old, new in settings.old_names.items():
        kind = _kind(settings.model_fields[new].annotation)
        parameter = _parameter(old, kind, None, typer.Option(_option(old), hidden=True))
        yield parameter, _Given((*within, new), _option(old), _option(new))


def _parameter(name: str, kind: Any, default: Any, info: Any) -> inspect.Parameter:
    optional = kind | None if default is None else kind
    default = inspect.Parameter.empty if default is ... else default
    annotation = Annotated[optional, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _switch(name: str) -> str:
    return f"{_option(name)}/{_option(f'no_{name}')}"


def _kind(annotation: Any) -> Any:
    """The type that typer reads. The settings check the value, so that all messages have one form."""
    member = next(member for member in union_members(annotation) if member is not type(None))
    if get_origin(member) is list:
        [item] = get_args(member)
        texts = [kind for kind in union_members(item) if kind in (str, Path)]
        return list[texts[0]] if texts else str
    return member if member in (bool, int, float, str, Path) else str


def descriptions(settings: type[Settings]) -> dict[str, str]:
    """The descriptions of fields in the docstrings of these settings and of their bases."""
    found: dict[str, str] = {}
    for owner in reversed(settings.__mro__):
        if owner is Settings or not issubclass(owner, Settings):
            continue
        name, lines = "", inspect.cleandoc(inspect.cleandoc(owner.__doc__ or "").partition(SECTION)[2]).splitlines()
        for line in lines:
            if match := FIELD.match(line):
                name, found[match[1]] = match[1], match[2]
            elif name and line.strip():
                found[name] += f" {line.strip()}"
    return found


def _print_version(asked: bool) -> None:
    if asked:
        print_line(f"bytelatent {__version__}")
        raise typer.Exit


@app.callback()
def blt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for name, model in VERBS.items():
    app.command(name)(verb_of(model, name))
bench.command("train")(verb_of(options.BenchTrainSettings, "bench"))
app.add_typer(bench, name="bench")


def main(arguments: list[str] | None = None) -> None:
    """The command `blt`, with the process's own arguments if none are given."""
    # Threads of GNU's OpenMP that wait for one another keep their cores for milliseconds. Where other programs want the
    # cores, a training step takes several times as long then; alone, it is as fast either way (dev/LOG.md). It is read
    # as torch is imported, by the verbs.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    given = sys.argv if arguments is None else arguments
    if any(argument != safe(argument) for argument in given):  # typer shows one that it cannot take
        typer.rich_utils.Console = log.Console  # pyright: ignore[reportPrivateImportUsage]
    guarded(lambda: app(arguments, prog_name="blt"))  # also the help and the version


if __name__ == "__main__":
    main()
