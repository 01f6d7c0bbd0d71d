"""`blt VERB`: options and help made from the settings of each verb, their fields and their docstrings."""

import inspect
import logging
import os
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import typer
from typer.core import TyperGroup

from bytelatent import __version__, log, signals
from bytelatent.commands import (
    bench_options,
    byteify_options,
    chat_options,
    eval_options,
    import_uncollected,
    options,
    plot_options,
    serve_options,
    study_options,
)
from bytelatent.config import Option, Settings, union_members, warn_renamed
from bytelatent.errors import BAD_INPUT, UserError, guarded, nearest
from bytelatent.prepare import PrepareSettings
from bytelatent.terminal import print_line

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
    "eval": eval_options.EvaluateSettings,
    "generate": options.GenerateSettings,
    "chat": chat_options.ChatSettings,
    "patch": options.PatchesSettings,
    "serve": serve_options.ServeSettings,
    "convert": options.ConvertSettings,
    "export": options.ExportSettings,
    "byteify": byteify_options.ByteifySettings,
    "info": options.InfoSettings,
    "study": study_options.StudySettings,
    "speedrun": study_options.SpeedrunSettings,
}
PLOTS: dict[str, type[Settings]] = {  # of `blt plot`
    "entropies": plot_options.PlotEntropiesSettings,
    "patches": plot_options.PlotPatchesSettings,
    "runs": plot_options.PlotRunsSettings,
    "study": plot_options.PlotStudySettings,
}
SECTION = "Attributes:"  # of a docstring
FIELD = re.compile(r"(\w+): (.*)")

UsageError: Any = typer.BadParameter.__base__


class Verbs(TyperGroup):
    """Verbs by name. An unknown one is an error that names the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if not args[0].startswith("-") and args[0] not in self.commands:
            near = nearest(args[0], list(self.commands))
            raise UserError(f"no command '{args[0]}'{near}; all commands: {ctx.command_path} --help")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="blt",
    cls=Verbs,
    help="Byte-level language models with dynamic patches.\n\nExample:  `blt demo`",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(
    cls=Verbs, help="Measure this machine.\n\nExample:  `blt bench train demo-blt`", no_args_is_help=True
)
plot = typer.Typer(
    cls=Verbs,
    help='Draw figures of models and runs.\n\nExample:  `blt plot entropies runs/demo "Daenerys Targaryen"`',
    no_args_is_help=True,
)


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
        imported = import_uncollected(f"bytelatent.commands.{module}")
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
    for name in settings.removed:  # the settings refuse it
        yield _parameter(name, str, None, typer.Option(_option(name), hidden=True)), _Given((*within, name))
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
bench.command("train")(verb_of(bench_options.BenchTrainSettings, "bench"))
app.add_typer(bench, name="bench")
for name, model in PLOTS.items():
    plot.command(name)(verb_of(model, "plot"))
app.add_typer(plot, name="plot")


def main(arguments: list[str] | None = None) -> None:
    """The command `blt`, with the process's own arguments if none are given; it ends the process."""
    # Threads of GNU's OpenMP that wait for one another keep their cores for milliseconds. Where other programs want the
    # cores, a training step takes several times as long then; alone, it is as fast either way (dev/LOG.md). It is read
    # as torch is imported, by the verbs.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    guarded(lambda: _run(sys.argv[1:] if arguments is None else arguments))  # also the help and the version
    sys.exit(0)


def _run(arguments: list[str]) -> None:
    try:
        code = app(arguments, prog_name="blt", standalone_mode=False)
    except UsageError as error:
        if not error.format_message():  # nothing was given, and the help is printed
            sys.exit(BAD_INPUT)
        raise UserError(_in_short(error, arguments)) from None
    if code:
        sys.exit(code)


def _in_short(error: Any, arguments: list[str]) -> str:
    """What is wrong with the options, in a line that names the option, the value, the nearest option and the help."""
    parameter = getattr(error, "param", None)
    command = " ".join(["blt", *(given for given in arguments[:1] if given[:1] != "-")])
    line = error.format_message().rstrip(".")
    line = line[:1].lower() + line[1:]
    shown: list[Any] = []
    if error.ctx is not None:
        command = error.ctx.command_path
        shown = [option for option in error.ctx.command.params if not getattr(option, "hidden", False)]
    if hasattr(error, "possibilities"):  # no such option
        known = ["--help", *(name for option in shown for name in option.opts if name.startswith("--"))]
        near = nearest(error.option_name, known, cutoff=0.6) if error.option_name.startswith("--") else ""
        line = f"no option '{error.option_name}'{near}"
    elif parameter is not None and not hasattr(error, "param_type"):  # a value; otherwise one that is missing
        names = [name for name in parameter.opts if name.startswith("-")]
        values = [_value_of(name, *pair) for pair in pairwise([*arguments, ""]) for name in names]
        given = next((f", not '{value}'" for value in values if value is not None), "")
        line = f"{' / '.join(names) or parameter.name}: {error.message}{given}"
    return f"{line}; see: {command} --help"


def _value_of(name: str, argument: str, following: str) -> str | None:
    """The value that an argument and the one behind it give to an option; None if it is another's."""
    joined = f"{name}=" if name.startswith("--") else name
    return following if argument == name else argument.removeprefix(joined) if argument.startswith(joined) else None


if __name__ == "__main__":
    main()
