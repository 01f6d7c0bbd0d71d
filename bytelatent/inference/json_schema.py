"""What a JSON schema asks for: where its parts are, whether some value of finite size can meet it, and what is refused.

The compiler reports most of what it cannot do. Here is what it would accept and not hold to, or not end on.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

from bytelatent.errors import UserError

MAX_DEPTH = 100  # of objects and arrays within one another, as in the text of a schema
MAX_PARTS = 20_000
# An expression of what JSON takes for white space.
WHITE_SPACE = re.compile(r"(?:(?:[ \t\n\r]|\\[tnr]|\[(?:[ \t\n\r]|\\[tnr])+\])(?:[*+?]|\{\d+(?:,\d*)?\})?)*")
MAX_OPEN_PROPERTIES = 1000  # of an object, that may be left out
MAX_STEPS = 10_000  # an automaton of that many states knows the multiples of a number
IN_OBJECTS = ("properties", "patternProperties", "$defs", "definitions")  # keywords whose values hold schemas by name
IN_LISTS = ("prefixItems", "allOf", "anyOf", "oneOf")
ALONE = ("items", "additionalProperties", "additionalItems")

Part = tuple[str, Any]  # where a schema is within the whole, as a JSON pointer, and the schema


def parts(schema: Any, at: str = "") -> Iterator[Part]:
    """All schemas within one, itself first."""
    waiting = [(at, schema)]
    while waiting:
        at, schema = waiting.pop()
        yield at, schema
        waiting += reversed(list(_within(schema, at)))


def _within(schema: Any, at: str) -> Iterator[Part]:
    if not isinstance(schema, dict):
        return
    for keyword in (*IN_OBJECTS, *IN_LISTS, *ALONE):
        value, place = schema.get(keyword), f"{at}/{keyword}"
        if keyword in IN_OBJECTS and isinstance(value, dict):
            yield from ((f"{place}/{_escaped(name)}", part) for name, part in value.items())
        elif keyword in (*IN_LISTS, "items") and isinstance(value, list):
            yield from ((f"{place}/{index}", part) for index, part in enumerate(value))
        elif keyword in ALONE and isinstance(value, dict | bool):
            yield place, value


def _escaped(name: str) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")


def depth(value: Any) -> int:
    """Objects and arrays within one another; counted up to `MAX_DEPTH` + 1."""
    level, number = [value], 0
    while level and number <= MAX_DEPTH:
        level = [each for each in level if isinstance(each, dict | list)]
        number += bool(level)
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return number


def check(schema: Any) -> None:
    """Refuse what is too large, what has no finite value, and what would not be held to exactly.

    Raises:
        UserError: names the part by its JSON pointer.
    """
    if depth(schema) > MAX_DEPTH:
        raise UserError(f"schema: it nests more than {MAX_DEPTH} objects and arrays; name inner parts under $defs")
    for number, (at, part) in enumerate(parts(schema), start=1):
        if number > MAX_PARTS:
            raise UserError(f"schema: it has more than {MAX_PARTS:,} parts; ask for less at once")
        if isinstance(part, dict):
            _check_part(part, at)
    if (at := _endless(schema)) is not None:
        why = "no value of finite size meets it, since it needs itself; make a property optional"
        raise UserError(f"schema: {_at(at)}: {why}")


def with_encoded_references(schema: Any) -> Any:
    """The schema, changed in place, with references as the standard writes them: as URIs, which are ASCII."""
    for _, part in parts(schema):
        if isinstance(part, dict) and isinstance(name := part.get("$ref"), str):
            part["$ref"] = quote(name, safe="#/%:?&=~$@!'()*+,;[]")
    return schema


def _check_part(part: dict[str, Any], at: str) -> None:
    properties, required = part.get("properties", {}), part.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return  # the compiler refuses it
    if (
        num_open := len(properties.keys() - {name for name in required if isinstance(name, str)})
    ) > MAX_OPEN_PROPERTIES:
        raise UserError(
            f"schema: {_at(at)} has {num_open:,} properties that may be left out, more than {MAX_OPEN_PROPERTIES:,}; "
            "require them, or split the object"
        )
    is_open = part.get("additionalProperties", True) is not False or bool(part.get("patternProperties"))
    least = part.get("minProperties", 0)
    if is_open and isinstance(least, int) and least > len(required) + 1:
        # A key that is not named may come twice, which counts once.
        raise UserError(
            f"schema: {_at(at)} has minProperties={least} and names no more than {len(required)} required properties; "
            "require them by name, or set additionalProperties to false"
        )
    if "x-guidance" in part:
        _check_guidance(part["x-guidance"], at)
    step = part.get("multipleOf")
    if isinstance(step, int | float) and not isinstance(step, bool) and step <= 0:
        raise UserError(f"schema: {_at(at)} has multipleOf={step}, which is not above 0")
    if isinstance(step, int | float) and not isinstance(step, bool) and _digits(step) > MAX_STEPS:
        raise UserError(f"schema: {_at(at)} has multipleOf={step}, of more than {MAX_STEPS:,} steps; leave it out")


def _check_guidance(guidance: Any, at: str) -> None:
    """Of llguidance's own options the one is taken that says how parts are spaced, in white space."""
    if at or not isinstance(guidance, dict) or guidance.keys() - {"whitespace_pattern"}:
        raise UserError(f"schema: {_at(at)} has x-guidance, which takes whitespace_pattern in the whole alone")
    pattern = guidance.get("whitespace_pattern", "")
    if not isinstance(pattern, str) or WHITE_SPACE.fullmatch(pattern) is None:
        raise UserError(
            "schema: x-guidance: whitespace_pattern is spaces, \\t, \\n, \\r, or some of them in [], "
            "each with *, +, ? or {1,2}"
        )


def _digits(step: float) -> int:
    """The digits of a number as a whole one: 25 of 0.25."""
    text = f"{step:.17g}" if isinstance(step, int) else repr(step)
    digits = text.partition("e")[0].replace(".", "").replace("-", "").lstrip("0")
    return int(digits[:20] or 0)


def _at(pointer: str) -> str:
    return f"'{pointer}'" if pointer else "the whole"


def _endless(schema: Any) -> str | None:
    """The first part that no value of finite size may meet, going by what it requires; None where all have one.

    References are resolved to the least fixed point: a part that needs itself has no value.
    """
    by_name = {f"#{at}": part for at, part in parts(schema)}
    has_value = dict.fromkeys(by_name, False)
    if not any(isinstance(part, dict) and "$ref" in part for part in by_name.values()):
        return None

    def holds(part: Any) -> bool:
        if not isinstance(part, dict) or "const" in part or "enum" in part:
            return True  # `false` is the compiler's to refuse
        if not has_value.get(unquote(str(part.get("$ref", ""))), True):
            return False
        for keyword, some_or_all in (("allOf", all), ("anyOf", any), ("oneOf", any)):
            inner = part.get(keyword)
            if isinstance(inner, list) and inner and not some_or_all(map(holds, inner)):
                return False
        types = part.get("type", "null")
        types = types if isinstance(types, list) else [types]
        return any(_of_type(part, type_, holds) for type_ in types) if types else True

    while True:
        after = {name: holds(part) for name, part in by_name.items()}
        if after == has_value:
            return next((name[1:] for name, found in has_value.items() if not found), None)
        has_value = after


def _of_type(part: dict[str, Any], type_: Any, holds: Any) -> bool:
    """Whether a part may have a value of one type."""
    if type_ == "object" and isinstance(part.get("required"), list) and isinstance(part.get("properties", {}), dict):
        properties = part.get("properties", {})
        return all(holds(properties[name]) for name in part["required"] if name in properties)
    if type_ == "array" and isinstance(least := part.get("minItems", 0), int) and least > 0:
        items = part.get("items", True)
        first = part.get("prefixItems", items if isinstance(items, list) else [])
        rest = part.get("additionalItems", True) if isinstance(items, list) else items
        needed = [*first[:least], *([rest] if least > len(first) else [])] if isinstance(first, list) else []
        return all(map(holds, needed))
    return True
