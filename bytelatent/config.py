"""YAML and `key=value` into strict settings.

Settings are pydantic models; a key nobody knows is an error that names the nearest known one.
"""

import json
import re
import types
from pathlib import Path
from typing import Any, Self, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from bytelatent.credentials import masked
from bytelatent.errors import UserError, nearest


class Settings(BaseModel):
    """A group of settings: unknown keys are errors, values do not change after they are read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "") -> Self:
        """Check `values` against this model.

        Args:
            values: nested plain values, as read from YAML or JSON.
            where: the file they came from, named in the error.

        Raises:
            UserError: one line for the first wrong key, with the nearest known key.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_one_line(cls, error, where)) from None

    def plain(self) -> dict[str, Any]:
        """The settings as plain nested values, as they would stand in a YAML file."""
        return self.model_dump(mode="json")

    def shown(self) -> dict[str, Any]:
        """As `plain`, with credentials masked: for all that is written or shown."""
        return masked(self.plain())

    def to_yaml(self) -> str:
        # OmegaConf's writer, since its reader takes more for a number than YAML does: it quotes the string '1e5'.
        return OmegaConf.to_yaml(OmegaConf.create(self.shown()))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as nested plain values."""
    if not str(path):
        raise UserError("config: no file is named; as in config=apps/bytelatent/configs/byte_lm.yaml")
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config: '{path}' does not exist; the presets are in apps/bytelatent/configs/")
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:  # OSError: a lone number
        raise UserError(f"config: '{path}' cannot be read as YAML: {error}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"config: '{path}' holds no settings; it should be a mapping of keys to values")
    return _resolved(config, str(path))


def merge(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`values` with `key.inner=value` overrides laid over them; values are read as YAML (`1e-4`, `true`, `[1, 2]`).

    A mapping is written with braces. A text with a colon, such as one that stops a generation, is a text.
    """
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not key or not equals:
            raise UserError(f"'{override}' is not a setting; write key=value, as in optimizer.lr=4e-4")
    try:
        laid_over = OmegaConf.from_dotlist([_with_text_quoted(override) for override in overrides])
        return _resolved(OmegaConf.merge(values, laid_over), " ".join(overrides))
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, IndexError) as error:
        # Beside its own errors OmegaConf raises plain ones, as for a key into a list; lists are replaced whole.
        raise UserError(f"{' '.join(overrides)}: {error}") from None


def _with_text_quoted(override: str) -> str:
    key, _, text = override.partition("=")
    is_text = re.search(r":(\s|$)", text) and text.isprintable() and text.strip()[:1] not in {*"{[\"'"}
    return f"{key}={json.dumps(text)}" if is_text else override


def flat(values: dict[str, Any], between: str = ".") -> dict[str, Any]:
    """Nested values by their whole keys: `{"a": {"b": 1}}` is `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= {f"{name}{between}{key}": inner for key, inner in flat(value, between).items()}
        else:
            found[name] = value
    return found


Given = TypeVar("Given", bound=Settings)


def from_command_line(model: type[Given], arguments: list[str], usage: str, text: str | None = None) -> Given:
    """Settings from `config=PATH` and `key=value`, later ones winning.

    Args:
        usage: what to do where there are no arguments.
        text: the key whose value is taken as it stands, not read as YAML.

    Raises:
        UserError: there are none, or a key or value will not do.
        SystemExit: `--help` or `-h` was asked for; it is printed.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"{usage}\nsettings: {', '.join(model.model_fields)}; those of a group as group.key=value")
        print("later ones win over earlier ones and over the file config=PATH; what each means: docs/")
        raise SystemExit(0)
    if not arguments:
        raise UserError(usage)
    config = [argument.removeprefix("config=") for argument in arguments if argument.startswith("config=")]
    rest = [argument for argument in arguments if not argument.startswith("config=")]
    texts = [argument for argument in rest if text and argument.startswith(f"{text}=")]
    values = merge(load_yaml(config[-1]) if config else {}, [argument for argument in rest if argument not in texts])
    if texts:
        values[str(text)] = texts[-1].partition("=")[2]
    where = config[-1] if config and not rest else ""  # a wrong key may as well stand on the command line
    return model.parse(values, where)


def _resolved(config: Any, where: str) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _one_line(model: type[BaseModel], error: ValidationError, where: str) -> str:
    problems = error.errors(include_url=False)
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])  # a wrong key explains the rest
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    prefix = f"{where}: " if where else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        if location[-1] in known:  # of another of the kinds that may stand here
            return f"{prefix}{key}: does not go together with the other keys here{more}"
        hint = nearest(location[-1], known) or f"; known here: {', '.join(known)}"
        return f"{prefix}{key}: unknown key{hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] in {"missing", "value_error"} else f", not {_short(repr(first['input']))}"
    if first["type"] in {"string_type", "path_type"} and isinstance(first["input"], int | float | None):
        shown += """; in double quotes it is a text (in a shell '"..."')"""
    return f"{prefix}{key + ': ' if key else ''}{message}{shown}{more}"


def _short(text: str, longest: int = 200) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."


def _fields_at(model: type[BaseModel], location: list[str]) -> list[str]:
    """The known keys of the settings found by walking `location` down from `model`."""
    models = [model]
    for name in location:
        inner = [
            m for known in models if name in known.model_fields for m in _models_in(known.model_fields[name].annotation)
        ]
        models = inner or models  # list indices and union tags are no fields
    return sorted({name for known in models for name in known.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list, dict, tuple) or get_args(annotation):
        return [model for inner in get_args(annotation) for model in _models_in(inner)]
    return []
