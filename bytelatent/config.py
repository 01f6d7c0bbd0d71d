"""Strict settings, and YAML files that hold them.

Settings are pydantic models; a key nobody knows is an error that names the nearest known one. `command_line.py` reads
`key=value`.
"""

import functools
import re
import sys
import sysconfig
from collections.abc import Callable, Collection
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, ParamSpec, Self, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from bytelatent.credentials import masked
from bytelatent.errors import UserError, nearest

KIND_OF_VALUE = re.compile(r"bool|int|float|str|literal\[.*\]|function-\w+\[.*\]")
LARGEST = 2**64 - 1  # more, and a number overflows where torch takes it; a seed may have 64 bits

# For YAML files: `path: ${stdlib:}/json` is text that every machine has.
_register = (
    getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
)  # which OmegaConf < 2.4 has
_register("stdlib", lambda: sysconfig.get_paths()["stdlib"], replace=True)


class Option:
    """How the command line takes a field, where it is not `--its-name`.

    Args:
        names: the option's names.
        is_argument: the field is an argument, not an option.
    """

    def __init__(self, *names: str, is_argument: bool = False):
        self.names, self.is_argument = names, is_argument


ARGUMENT = Option(is_argument=True)


class Settings(BaseModel):
    """A group of settings: unknown keys are errors, numbers are finite, values do not change after they are read.

    Attributes:
        presets: fields that may be the name of a preset; with other keys beside it, the name's key is `preset`.
        alternatives: fields of which one may be set. One on the command line unsets the others of a file.
        old_names: earlier names of fields, which still work.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
    presets: ClassVar[tuple[str, ...]] = ()
    alternatives: ClassVar[tuple[str, ...]] = ()
    old_names: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _by_their_names(cls, values: Any) -> Any:
        return renamed(values, cls.old_names)

    @field_validator("*")
    @classmethod
    def _not_too_large(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"Input should be at most {LARGEST}, not {shorten(str(value), 40)}")
        return value

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "") -> Self:
        """Check `values` against this model.

        Args:
            values: nested plain values, as read from YAML or JSON.
            where: the file they came from, named in the error.

        Raises:
            UserError: one line for the first wrong key, with the nearest known key.
        """
        return cls.parse_from(values, lambda _: where)

    @classmethod
    def parse_from(cls, values: dict[str, Any], whence: Callable[[str], str]) -> Self:
        """The same where values came from several places; `whence` names the file of a key, if it is of one."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_one_line(cls, error, whence)) from None

    def plain(self) -> dict[str, Any]:
        """The settings as plain nested values, as they would stand in a YAML file."""
        return self.model_dump(mode="json")

    def shown(self) -> dict[str, Any]:
        """As `plain`, with credentials masked: for all that is written or shown."""
        return masked(self.plain())

    def to_yaml(self) -> str:
        return to_yaml(self.shown())

    def source_of_default(self, key: str) -> str:
        """Where the value of a whole key comes from that nobody gave."""
        return "default"


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as nested plain values."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config: '{path}' does not exist; name a YAML file")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:  # OSError: a lone number
        raise UserError(f"config: '{path}' cannot be read as YAML: {error}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"config: '{path}' holds no settings; it should be a mapping of keys to values")
    return _resolved(config, str(path))


def to_yaml(values: dict[str, Any], references: Collection[str] = ()) -> str:
    """Nested plain values as YAML that `load_yaml` reads back as they are.

    Args:
        references: texts such as `${oc.env:NAME}` that are resolved when they are read.
    """
    # OmegaConf's writer, since its reader takes more for a number than YAML does: it quotes the string '1e5'.
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(values, references)))


def _escaped(value: Any, references: Collection[str]) -> Any:
    """Texts whose `${` is no interpolation when they are read, but for the references."""
    if isinstance(value, dict):
        return {key: _escaped(inner, references) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(inner, references) for inner in value]
    if value in references:
        return value
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def flat(values: dict[str, Any], between: str = ".") -> dict[str, Any]:
    """Nested values by their whole keys: `{"a": {"b": 1}}` is `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= {f"{name}{between}{key}": inner for key, inner in flat(value, between).items()}
        else:
            found[name] = value
    return found


def renamed(values: Any, names: dict[str, str], within: str = "") -> Any:
    """Plain values with the old names of settings replaced by the new ones, and a line about each on standard error.

    Args:
        within: comes before the names in the line.
    """
    if not isinstance(values, dict):
        return values
    values = dict(values)
    for old, new in names.items():
        if old in values:
            warn_renamed(within + old, within + new)
            values.setdefault(new, values.pop(old))
            values.pop(old, None)
    return values


@functools.cache
def warn_renamed(old: str, new: str) -> None:
    """Say once that a setting or an option has another name now."""
    print(f"{old} is now {new}; the old name still works", file=sys.stderr)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def renamed_arguments(**names: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function that still takes some arguments by their old names: `@renamed_arguments(old="new")`."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            for old, new in names.items():
                if old in kwargs:
                    warn_renamed(f"{old}=", f"{new}=")
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def renamed_attribute(old: str, new: str) -> Any:
    """A property that still gives an attribute its old name."""

    def read(self: object) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", f"{type(self).__name__}.{new}")
        return getattr(self, new)

    def write(self: object, value: Any) -> None:
        warn_renamed(f"{type(self).__name__}.{old}", f"{type(self).__name__}.{new}")
        setattr(self, new, value)

    return property(read, write)


def must_be_named(path: str, what: str) -> str:
    """For validators: an empty path, as of a variable that is not set, would mean the folder that one is in."""
    if not path.strip():
        raise ValueError(f"the path is empty; name {what}")
    return path


def laid_over(values: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested values with others over them, key by key; `null` over a group leaves it out."""
    laid = dict(values)
    for key, value in above.items():
        below = laid.get(key)
        laid[key] = laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return laid


def _resolved(config: Any, where: str) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _one_line(model: type[BaseModel], error: ValidationError, whence: Callable[[str], str]) -> str:
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])  # a wrong key explains the rest
    location = _location(first)
    same = [problem for problem in problems if _location(problem) == location]  # of each kind that may stand there
    key = ".".join(location)
    where = whence(key)
    prefix = f"{where}: " if where else ""
    more = f" (and {len(problems) - len(same)} more)" if len(problems) > len(same) else ""
    if first["type"] == "extra_forbidden":
        return f"{prefix}{key}: {_about_unknown(_models_at(model, location[:-1]), location)}{more}"
    message = ", or ".join(dict.fromkeys(problem["msg"].removeprefix("Value error, ") for problem in same))
    shown = "" if first["type"] in {"missing", "value_error"} else f", not {shorten(repr(first['input']))}"
    if first["type"] in {"string_type", "path_type"} and isinstance(first["input"], int | float | None):
        shown += "; in double quotes it is a text"
    return f"{prefix}{key + ': ' if key else ''}{message}{shown}{more}"


def _location(problem: Any) -> list[str]:
    """The key of a problem, without what pydantic adds where a value may be of several kinds."""
    first, *rest = (str(part) for part in problem["loc"] or ("",))
    return [name for name in (first, *(part for part in rest if not KIND_OF_VALUE.fullmatch(part))) if name]


def _about_unknown(models: list[type[BaseModel]], location: list[str]) -> str:
    """What is said of a key that settings found at its place do not know, and of the one that may be meant."""
    *group, name = location
    known = sorted({field for inner in models for field in inner.model_fields})
    deeper = [".".join([*group, *path]) for path in _inside(models, name)]
    meant = "; did you mean " + " or ".join(f"'{key}'" for key in deeper) + "?" if deeper else ""
    if name in known:  # of another of the kinds that may stand here
        return f"does not go together with the other keys here{meant}"
    return f"unknown key{nearest(name, known) or meant or '; known here: ' + ', '.join(known)}"


def _inside(models: list[type[BaseModel]], name: str) -> list[tuple[str, str]]:
    """The groups of these settings that have a field of this name, and the name."""
    fields = {field: info.annotation for model in models for field, info in model.model_fields.items()}
    return [
        (field, name) for field, kind in fields.items() if any(name in inner.model_fields for inner in models_in(kind))
    ]


def shorten(text: str, longest: int = 200) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def _models_at(model: type[BaseModel], location: list[str]) -> list[type[BaseModel]]:
    """The settings found by walking `location` down from `model`."""
    models = [model]
    for name in location:
        inner = [
            m for known in models if name in known.model_fields for m in models_in(known.model_fields[name].annotation)
        ]
        models = inner or models  # list indices and union tags are no fields
    return models


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings that a field's type names, at any depth."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def union_members(kind: Any) -> list[Any]:
    """The types of a union; the type itself if it is none."""
    if get_origin(kind) is Annotated:
        return union_members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [member for inner in get_args(kind) for member in union_members(inner)]
    return [kind]
