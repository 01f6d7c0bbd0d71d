"""Settings from `config=FILE` and `key=value`, each with the place that it comes from.

A value is read by the type that its field declares. A text, a path or a choice stays what was typed, so that
`run=0123`, `'run=a #3'` and `data.train=*.jsonl` are these texts; a whole value in quotes is the text within. Lists and
mappings are written as in YAML, in brackets and braces. All else is a number, `true`, `false` or `null`.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import yaml

from bytelatent.config import (
    Settings,
    declared,
    find_config,
    flat,
    load_yaml,
    renamed,
    shorten,
    to_yaml,
    types_of,
    union_members,
)
from bytelatent.credentials import masked
from bytelatent.errors import UserError
from bytelatent.terminal import print_line

COMMAND_LINE = "command line"
PRINT_CONFIG = "--print-config"
NULL = {"null", "~", ""}
NUMBER = re.compile(r"[+-]?(?:0|[1-9][0-9_]{0,999})?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")  # Python reads no longer ones
SINGLE_QUOTED = re.compile(r"'((?:[^']|'')*)'", re.DOTALL)
SOURCE_COLUMN = 60  # comments begin here at the latest
USE = (
    "later ones win over earlier ones and over config=FILE; `blt configs` lists the package's own files\n"
    f"{PRINT_CONFIG} shows all settings as they are now and where each comes from; their meaning: docs/"
)

Read = TypeVar("Read", bound=Settings)


@dataclass
class ParsedSettings(Generic[Read]):
    """Settings values as the user gave them, with their sources.

    Attributes:
        model: the settings; bare `Settings` where nobody declares them.
        values: nested plain values.
        sources: for each whole key the file it is in, or `COMMAND_LINE`.
        literal: a key whose value is a text whatever it looks like.
    """

    model: type[Read]
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    literal: str | None = None

    def read_file(self, config: str) -> None:
        """Begin with a YAML file: its path, or the name of a configuration of the package."""
        path = find_config(config)
        self.values = renamed(load_yaml(path), self.model.old_names)
        self.sources = dict.fromkeys(flat(self.values), str(path))

    def lay_over(self, overrides: list[str]) -> None:
        """Lay `key.inner=value` over what is there; later ones win.

        Raises:
            UserError: one is no setting, cannot be read, or would drop an earlier one.
        """
        before: list[str] = []
        for override in overrides:
            key, equals, text = override.partition("=")
            if not all(key.split(".")) or not equals:
                raise UserError(f"'{override}' is not a setting; write key=value, as in optimizer.lr=4e-4")
            inner = next((other for other in before if other.startswith(f"{key}.")), None)
            if inner is not None:
                raise UserError(f"'{shorten(override)}' comes after {inner}=... and would drop it; write it first")
            self._set(key, text)
            before.append(key)
        alternatives = self.model.alternatives
        if any(name in before and self.values[name] is not None for name in alternatives):
            for name in alternatives:
                if name not in before and name in self.values:
                    self.values[name], self.sources[name] = None, COMMAND_LINE

    def _set(self, key: str, text: str) -> None:
        [key] = renamed({key: text}, self.model.old_names)
        *groups, name = key.split(".")
        value = text if key == self.literal else _read(text, declared(self.model, key.split(".")), key)
        group = self.values
        for depth, part in enumerate(groups, 1):
            whole, inner = ".".join(groups[:depth]), group.get(part)
            if isinstance(inner, str) and whole in self.model.presets:
                inner = {"preset": inner}
            elif inner is not None and not isinstance(inner, dict):
                found = shorten(repr(inner))
                raise UserError(f"{key}: {whole} is {found}, which has no keys; set it whole: {whole}=...")
            group[part] = dict(inner or {})
            group = group[part]
        group[name] = value
        for replaced in [known for known in self.sources if _within(known, key)]:
            del self.sources[replaced]
        self.sources |= dict.fromkeys(flat({key: value}), COMMAND_LINE)

    def settings(self) -> Read:
        """The settings.

        Raises:
            UserError: a key or a value is wrong. The message begins with the name of the file that it is in.
        """
        return self.model.parse(self.values, self._file_of)

    def _file_of(self, key: str) -> str:
        """The file that a whole key is from, or all keys are where it is from none; empty if there is not one."""
        related = {source for known, source in self.sources.items() if _within(known, key) or _within(key, known)}
        sources = related or set(self.sources.values())
        return "" if len(sources) != 1 or COMMAND_LINE in sources else sources.pop()

    def with_sources(self, settings: Read) -> str:
        """The resolved settings as YAML, with a comment behind each: the place it comes from."""
        lines = list(_lines(settings.shown()))
        width = min(max(len(line) for line, _ in lines), SOURCE_COLUMN)
        return "\n".join(
            line if key is None else f"{line:<{width}}  # {self._source_of(key, settings)}" for line, key in lines
        )

    def _source_of(self, key: str, settings: Read) -> str:
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            known = ".".join(parts[:length])
            preset = self.values.get(known) if known in self.model.presets else None
            preset = preset.get("preset") if isinstance(preset, dict) else preset
            if known in self.sources and (known == key or known not in self.model.presets):
                return self.sources[known]
            if isinstance(preset, str):
                return f"preset {preset}"
        return settings.source_of_default(key)


def from_command_line(model: type[Read], arguments: list[str], usage: str, literal: str | None = None) -> Read:
    """Settings from `config=FILE` and `key=value`, later ones winning.

    Args:
        usage: what to do where there are no arguments.
        literal: the key whose value is a text whatever it looks like.

    Raises:
        UserError: there are none, or a key or value is wrong.
        SystemExit: `--help`, `-h` or `--print-config` was asked for; it is printed.
    """
    if {"-h", "--help"} & set(arguments):
        print_line(f"{usage}\nsettings: {', '.join(model.model_fields)}; those of a group as group.key=value\n{USE}")
        raise SystemExit(0)
    rest = [argument for argument in arguments if argument != PRINT_CONFIG]
    if not rest:
        raise UserError(usage)
    configs = [argument.removeprefix("config=") for argument in rest if argument.startswith("config=")]
    if len(configs) > 1:
        raise UserError(f"config: it is given {len(configs)} times; name one file, and lay key=value over it")
    given = ParsedSettings(model, literal=literal)
    if configs:
        given.read_file(configs[0])
    given.lay_over([argument for argument in rest if not argument.startswith("config=")])
    settings = given.settings()
    if PRINT_CONFIG in arguments:
        print_line(masked(given.with_sources(settings)))
        raise SystemExit(0)
    return settings


def _within(key: str, group: str) -> bool:
    return f"{key}.".startswith(f"{group}.")


def _lines(values: dict[str, Any], within: tuple[str, ...] = ()) -> Iterator[tuple[str, str | None]]:
    """Lines of YAML, each with the whole key of its value; None where it begins a group."""
    for name, value in values.items():
        begin = f"{'  ' * len(within)}{name}:"
        if isinstance(value, dict) and value:
            yield begin, None
            yield from _lines(value, (*within, name))
        else:
            written = to_yaml({"a": value}).removeprefix("a: ").removesuffix("\n")
            if written != value and isinstance(value, str | list | dict):
                written = json.dumps(value, ensure_ascii=False)
            yield f"{begin} {written}", ".".join([*within, name])


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    return isinstance(kind, type) and issubclass(kind, str | Path)


def _is_number(kind: Any) -> bool:
    return kind is Any or (isinstance(kind, type) and issubclass(kind, bool | int | float))


def _read(text: str, types: list[Any], key: str) -> Any:
    """A value as it was typed."""
    may_nest = [kind for kind in types if kind is not NoneType and not _is_text(kind)] or not types
    if may_nest and text[:1] + text[-1:] in ("[]", "{}"):
        try:
            return _of_node(yaml.compose(text, yaml.SafeLoader), types, key)
        except (yaml.YAMLError, RecursionError) as error:
            problem = getattr(error, "problem", None) or error
            raise UserError(f"{key}: '{shorten(text)}' is no list or mapping ({problem}); quote its texts") from None
    if text[:1] == text[-1:] == '"':
        with suppress(ValueError):
            return json.loads(text, strict=False)
    if quoted := SINGLE_QUOTED.fullmatch(text):
        return quoted[1].replace("''", "'")
    return _scalar(text, types)


def _of_node(node: yaml.Node, types: list[Any], key: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else _scalar(node.value, types)
    if isinstance(node, yaml.SequenceNode):
        items = [item for kind in types if get_origin(kind) in (list, tuple) for item in union_members(*get_args(kind))]
        return [_of_node(item, items, key) for item in node.value]
    values: dict[str, Any] = {}
    for name, value in node.value:
        if str(name.value) in values:
            raise UserError(f"{key}.{name.value}: it is given twice")
        values[str(name.value)] = _of_node(value, types_of(types, str(name.value)), f"{key}.{name.value}")
    return values


def _scalar(text: str, types: list[Any]) -> Any:
    """A text that is a whole value, read by the types that the field may have."""
    kinds = [kind for kind in types if kind is not NoneType]
    if kinds and not any(map(_is_number, kinds)):  # texts; or a list or a group, for which a text may be given
        return None if text == "null" and (NoneType in types or not all(map(_is_text, kinds))) else text
    if text.lower() in NULL and (kinds or text):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if NUMBER.fullmatch(text):
        for number in (int, float):
            with suppress(ValueError):
                return number(text)
    return text
