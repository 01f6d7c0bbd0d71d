"""Strict settings, and YAML files that hold them.

Settings are pydantic models; a key nobody knows is an error that names the nearest known one. `command_line.py` reads
`key=value`. The package's own configurations are in `apps/bytelatent/configs/` of a clone, and in `bytelatent/configs/`
of a wheel, where `setup.py` puts them.
"""

import functools
import logging
import re
import sysconfig
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, NamedTuple, ParamSpec, Self, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from bytelatent.credentials import masked
from bytelatent.errors import UserError, nearest

LOGGER = logging.getLogger(__name__)
KIND_OF_VALUE = re.compile(r"bool|int|float|str|(literal|list|function-\w+|constrained-\w+)(\[.*\])?")
LARGEST = 2**64 - 1  # more, and a number overflows where torch takes it; a seed may have 64 bits
PACKAGE = Path(__file__).parent

# For YAML files: `path: ${stdlib:}/json` is text that every machine has. OmegaConf < 2.4 has the longer name.
_register = getattr(OmegaConf, "register_resolver", None) or OmegaConf.register_new_resolver
_register("stdlib", lambda: sysconfig.get_paths()["stdlib"], replace=True)


class Option(NamedTuple):
    """How the command line takes a field, where it is not `--its-name`: by these names, or as an argument."""

    names: tuple[str, ...] = ()
    is_argument: bool = False


ARGUMENT = Option(is_argument=True)


class Settings(BaseModel):
    """A group of settings: unknown keys are errors, numbers are finite, values do not change after they are read.

    Attributes:
        presets: fields that may be the name of a preset; with other keys beside it, the name's key is `preset`.
        alternatives: fields of which one may be set. One on the command line unsets the others of a file.
        old_names: earlier names of fields, which still work.
        removed: earlier fields, and what a line about each says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
    presets: ClassVar[tuple[str, ...]] = ()
    alternatives: ClassVar[tuple[str, ...]] = ()
    old_names: ClassVar[dict[str, str]] = {}
    removed: ClassVar[dict[str, str]] = {}

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
    def parse(cls, values: dict[str, Any], where: str | Callable[[str], str] = "") -> Self:
        """Check `values` against this model.

        Args:
            values: nested plain values, as read from YAML or JSON.
            where: the file they came from, named in the error; or a function that gives the file of a key.

        Raises:
            UserError: one line for the first wrong key, with the nearest known key.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(one_line_of(cls, error.errors(include_url=False), where)) from None

    def plain(self) -> dict[str, Any]:
        """The settings as plain nested values, as in a YAML file."""
        return self.model_dump(mode="json")

    def shown(self) -> dict[str, Any]:
        """As `plain`, with credentials masked: for all that is written or shown."""
        return masked(self.plain())

    def to_yaml(self) -> str:
        return to_yaml(self.shown())

    def source_of_default(self, key: str) -> str:
        """Where the value of a whole key comes from that nobody gave."""
        return "default"


def config_files() -> dict[str, Path]:
    """The package's own configurations by their names."""
    for folder in (PACKAGE / "configs", PACKAGE.parent / "apps" / "bytelatent" / "configs"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def find_config(config: str) -> Path:
    """The file that `config=` names: a path, or else a name of the package's own.

    Raises:
        UserError: there is neither.
    """
    if not config:
        raise UserError("config: no file is named; as in config=apps/bytelatent/configs/byte_lm.yaml")
    path, files = Path(config), config_files()
    if path.is_file() or config in files:
        return path if path.is_file() else files[config]
    hint = nearest(path.stem, list(files), cutoff=0.7)
    raise UserError(f"config: '{config}' does not exist{hint}; name a YAML file, or one that `blt configs` lists")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as nested plain values.

    Raises:
        UserError: it does not exist, or holds no settings.
    """
    if not Path(path).is_file():
        raise UserError(f"config: '{path}' does not exist; name a YAML file")
    try:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise UserError(f"config: '{path}' holds no settings; it should be a mapping of keys to values")
        values: Any = OmegaConf.to_container(config, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:  # OSError: a lone number
        raise UserError(f"config: '{path}' cannot be read as YAML: {error}") from None
    return {str(key): value for key, value in values.items()}


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
    if isinstance(value, str) and value not in references:
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value


def flat(values: dict[str, Any], between: str = ".") -> dict[str, Any]:
    """Nested values by their whole keys: `{"a": {"b": 1}}` is `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= {f"{name}{between}{key}": inner for key, inner in flat(value, between).items()}
        else:
            found[name] = value
    return found


def laid_over(values: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge nested values key by key; the later ones win, and `null` over a group leaves it out."""
    laid = dict(values)
    for key, value in above.items():
        below = laid.get(key)
        laid[key] = laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return laid


def renamed(values: Any, names: dict[str, str], within: str = "") -> Any:
    """Plain values with the old names of settings replaced by the new ones, and a warning about each.

    Args:
        within: comes before the names in the warning.
    """
    if not isinstance(values, dict):
        return values
    values = dict(values)
    for old, new in names.items():
        if old in values:
            warn_renamed(within + old, within + new)
            values.setdefault(new, values.pop(old))
    return values


@functools.cache
def warn_renamed(old: str, new: str) -> None:
    """Warn once that a setting or an option has another name now."""
    LOGGER.warning(f"{old} is now {new}; the old name still works")


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def renamed_arguments(**names: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function that still takes some arguments by their old names: `@renamed_arguments(old="new")`."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            for old in names.keys() & kwargs.keys():
                warn_renamed(f"{old}=", f"{names[old]}=")
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return wrapper

    return decorate


def removed_arguments(**names: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorate a function that had these arguments once; an error about one says what is given here."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            for name in names.keys() & kwargs.keys():
                raise UserError(f"{name}: {names[name]}")
            return function(*args, **kwargs)

        return wrapper

    return decorate


def removed_attribute(name: str, why: str) -> Any:
    """A property in place of an attribute that was removed: to read or to set it is an error."""

    def refuse(*_: object) -> None:
        raise UserError(f"{name}: {why}")

    return property(refuse, refuse)


def renamed_attribute(old: str, new: str) -> Any:
    """A property that still gives an attribute its old name."""

    def current(self: object) -> str:
        warn_renamed(f"{type(self).__name__}.{old}", f"{type(self).__name__}.{new}")
        return new

    return property(lambda self: getattr(self, current(self)), lambda self, value: setattr(self, current(self), value))


def must_be_named(path: str, what: str) -> str:
    """For validators: an empty path, as of a variable that is not set, would mean the folder that one is in."""
    if not path.strip():
        raise ValueError(f"the path is empty; name {what}")
    return path


def shorten(text: str, longest: int = 200) -> str:
    """The beginning of a text, for a message."""
    return text if len(text) <= longest else f"{text[:longest]}..."


def one_line_of(model: type[BaseModel], problems: Sequence[Any], where: str | Callable[[str], str] = "") -> str:
    """A line about the first wrong key among pydantic's problems, see `Settings.parse`."""
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])  # a wrong key explains the rest
    location = _location(first)
    same = [problem for problem in problems if _location(problem) == location]  # of each kind that may be there
    key = ".".join(location)
    file = where(key) if callable(where) else where
    prefix = "".join(f"{part}: " for part in (file, key) if part)
    more = f" (and {len(problems) - len(same)} more)" if len(problems) > len(same) else ""
    if first["type"] == "extra_forbidden":
        return f"{prefix}{_about_unknown(model, location)}{more}"
    message = ", or ".join(dict.fromkeys(_message(problem) for problem in same))
    shown = "" if first["type"] in {"missing", "value_error"} else f", not {shorten(repr(first['input']))}"
    if first["type"] in {"string_type", "path_type"} and isinstance(first["input"], int | float | None):
        shown += "; in double quotes it is a text"
    return f"{prefix}{message}{shown}{more}"


def _message(problem: Any) -> str:
    """pydantic's message, or that of an error which a validator raised."""
    return str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]


def _location(problem: Any) -> list[str]:
    """The key of a problem, without what pydantic adds where a value may be of several kinds."""
    names = [str(part) for part in problem["loc"]]
    return [name for name in names[:1] + [name for name in names[1:] if not KIND_OF_VALUE.fullmatch(name)] if name]


def _about_unknown(model: type[BaseModel], location: list[str]) -> str:
    """A line about a key that the settings at its place do not know, and about the one that may be meant."""
    *group, name = location
    for inner in _models_at(model, group):
        if issubclass(inner, Settings) and name in inner.removed:
            return inner.removed[name]
    known = list(dict.fromkeys(field for inner in _models_at(model, group) for field in inner.model_fields))
    places = [[*group, field] for field in known]
    deeper = [
        ".".join([*at, name]) for at in places if any(name in inner.model_fields for inner in _models_at(model, at))
    ]
    meant = "; did you mean " + " or ".join(f"'{key}'" for key in deeper) + "?" if deeper else ""
    if name in known:  # of another of the kinds that may be here
        return f"does not go together with the other keys here{meant}"
    return f"unknown key{nearest(name, sorted(known)) or meant or '; known here: ' + ', '.join(sorted(known))}"


def _models_at(model: type[BaseModel], location: list[str]) -> list[type[BaseModel]]:
    return [inner for kind in declared(model, location) for inner in _models_in(kind)]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def declared(model: type[BaseModel], location: Sequence[str]) -> list[Any]:
    """The types, no unions, that the value of a key may have; none where nobody declares it."""
    types: list[Any] = [model]
    for name in location:
        types = types_of(types, name)
    return types


def types_of(outer: list[Any], name: str) -> list[Any]:
    """The types, no unions, of the values called `name` in values of these types."""
    found: list[Any] = []
    for kind in outer:
        origin = get_origin(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += [kind.model_fields[name].annotation] if name in kind.model_fields else []
        elif origin is dict:
            found.append(get_args(kind)[1])
        elif origin in (list, tuple):  # a single one may be given for a list of one
            items = union_members(*get_args(kind))
            found += items if name.isdecimal() else types_of(items, name)
    return union_members(*found)


def union_members(*kinds: Any) -> list[Any]:
    """The types that are no unions: the members of those that are, and the others themselves."""
    found: list[Any] = []
    for kind in kinds:
        if get_origin(kind) is Annotated:
            found += union_members(get_args(kind)[0])
        elif get_origin(kind) in (Union, UnionType):
            found += union_members(*get_args(kind))
        else:
            found.append(kind)
    return found
