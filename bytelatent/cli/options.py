"""Options and help of a verb, made from the fields and the docstring of its settings."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from bytelatent.config import Option, Settings, union_members, warn_renamed

SECTION = "Attributes:"
NAME = re.compile(r"(\w+): (.*)")


@dataclass(frozen=True)
class _Given:
    """Where the value of an option belongs among the settings, and the option's new name if it is an old one."""

    key: tuple[str, ...]
    old: str = ""
    new: str = ""


def verb_of(settings: type[Settings], run: Callable[[Any], None], before: Callable[[bool, bool], None]) -> Any:
    """A function for typer: it reads its options into `settings` and runs the verb with them.

    Args:
        before: is called first, with `--quiet` and `--verbose`.
    """
    options = list(_options(settings))
    given_by = {parameter.name: given for parameter, given in options}

    def verb(of_typer: typer.Context, quiet: bool, verbose: bool, **given: Any) -> None:
        before(quiet, verbose)
        values: dict[str, Any] = {}
        for name, where in given_by.items():
            source = of_typer.get_parameter_source(name)
            if source is None or source.name.startswith("DEFAULT"):
                continue
            if where.old:
                warn_renamed(where.old, where.new)
            group = values
            for part in where.key[:-1]:
                group = group.setdefault(part, {})
            group[where.key[-1]] = given[name]
        run(settings.parse(values))

    shared = [
        _parameter("quiet", bool, False, typer.Option("--quiet", help="Show warnings only.")),
        _parameter("verbose", bool, False, typer.Option("--verbose", help="Show debugging messages too.")),
    ]
    of_typer = inspect.Parameter("of_typer", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [of_typer, *(parameter for parameter, _ in options), *shared]
    verb.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    verb.__doc__ = inspect.getdoc(settings).partition(SECTION)[0]  # pyright: ignore[reportOptionalMemberAccess]
    return verb


def _options(settings: type[Settings], within: tuple[str, ...] = ()) -> Iterator[tuple[inspect.Parameter, _Given]]:
    about = descriptions(settings)
    for name, field in settings.model_fields.items():
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
        names = how.names or _names(name, is_switch=kind is bool and default is not False)
        info = typer.Argument(help=help) if how.is_argument else typer.Option(*names, help=help)
        yield _parameter(name, kind, default, info), _Given((*within, name))
    for old, new in settings.old_names.items():
        option, renamed = f"--{old.replace('_', '-')}", f"--{new.replace('_', '-')}"
        kind = _kind(settings.model_fields[new].annotation)
        yield _parameter(old, kind, None, typer.Option(option, hidden=True)), _Given((*within, new), option, renamed)


def _parameter(name: str, kind: Any, default: Any, info: Any) -> inspect.Parameter:
    optional = kind | None if default is None else kind
    default = inspect.Parameter.empty if default is ... else default
    annotation = Annotated[optional, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _names(name: str, is_switch: bool) -> tuple[str, ...]:
    option = name.replace("_", "-")
    return (f"--{option}/--no-{option}",) if is_switch else (f"--{option}",)


def _kind(annotation: Any) -> Any:
    """The type that typer reads. The settings check the value, so that all messages have one form."""
    member = next(member for member in union_members(annotation) if member is not type(None))
    if get_origin(member) is list:
        [item] = get_args(member)
        texts = [kind for kind in union_members(item) if kind in (str, Path)]
        return list[texts[0]] if texts else str
    return member if member in (bool, int, float, str, Path) else str


def descriptions(settings: type[Settings]) -> dict[str, str]:
    """What the docstrings of these settings and of their bases say about each field."""
    found: dict[str, str] = {}
    for owner in reversed(settings.__mro__):
        if owner is Settings or not (isinstance(owner, type) and issubclass(owner, Settings)):
            continue
        name, lines = "", inspect.cleandoc(owner.__doc__ or "").partition(SECTION)[2].splitlines()
        margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        for line in (line[margin:] for line in lines):
            if match := NAME.match(line):
                name, found[match[1]] = match[1], match[2]
            elif name and line.strip():
                found[name] += f" {line.strip()}"
    return found
