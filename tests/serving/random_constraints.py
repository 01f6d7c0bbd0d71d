"""Random JSON schemas and regular expressions, and independent checks of texts: jsonschema, and the package regex."""

import decimal
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema
import regex

LETTERS = "abcxyz019 _-éüßñ語кλ🙂\u2028"
ESCAPED = "\\.+*?()|[]{}^$/"
KEYS = ["a", "b", "name", "größe", "語", "🙂", 'quo"te', "back\\slash", "line\nbreak", "a b", "", "$x", "id"]
MAX_EXPONENT = 2000
FORMATS = ["date", "ipv4", "uuid", "email", "ipv6", "date-time"]
CHECKED = jsonschema.FormatChecker(["date", "ipv4", "uuid", "email", "ipv6"])


@dataclass(frozen=True)
class Case:
    """A constraint and whether a text meets it.

    Attributes:
        given: arguments of `Constraint.of`.
    """

    given: dict[str, Any]
    is_met: Callable[[str], bool]


def case(number: int) -> Case:
    """Every third one is an expression."""
    chance = random.Random(number)
    return expression_case(chance) if number % 3 == 2 else schema_case(chance)


# Expressions


def expression(chance: random.Random, depth: int = 3) -> str:
    """Valid in Rust's syntax and in Python's, with one meaning."""
    kind = chance.choice(["text", "class", "group", "alternatives", "sequence", "repeated"]) if depth else "text"
    if kind == "text":
        return "".join(map(literal, chance.choices(LETTERS, k=chance.randint(1, 3))))
    if kind == "class":
        return character_class(chance)
    if kind == "group":
        begin = chance.choice(["(", "(?:", f"(?P<g{chance.getrandbits(40)}>", "(?s:", "(?i:"])
        return f"{begin}{expression(chance, depth - 1)})"
    if kind == "alternatives":
        return f"(?:{'|'.join(expression(chance, depth - 1) for _ in range(chance.randint(2, 4)))})"
    if kind == "sequence":
        return "".join(expression(chance, depth - 1) for _ in range(chance.randint(2, 3)))
    low = chance.randint(0, 3)
    times = chance.choice(["*", "+", "?", f"{{{low}}}", f"{{{low},{low + chance.randint(0, 4)}}}", f"{{{low},}}"])
    return f"(?:{expression(chance, depth - 1)}){times}{chance.choice(['', '?'])}"


def character_class(chance: random.Random) -> str:
    kind = chance.randrange(6)
    if kind == 0:
        return chance.choice(
            [".", r"\d", r"\w", r"\s", r"\S"]
        )  # not \W: letters of newer versions of Unicode are in it
    if kind == 1:
        return chance.choice([r"[\d.]", r"[^\s,]", r"[\w-]", r"\x41", r"[\x00-\x1f]", "\\t", "\\n"])
    ranges = [("a", "f"), ("0", "9"), ("à", "ö"), ("α", "ω"), ("一", "龥"), ("😀", "🙏"), ("A", "Z")]
    inner = "".join("-".join(chance.choice(ranges)) for _ in range(chance.randint(1, 2)))
    inner += "".join(map(literal, chance.sample("xyz_.,;é語", chance.randint(0, 2))))
    return f"[{chance.choice(['', '', '^'])}{inner}]"


def literal(character: str) -> str:
    return f"\\{character}" if character in ESCAPED else character


def expression_case(chance: random.Random) -> Case:
    wanted = expression(chance)
    if chance.random() < 0.1:
        wanted = f"^(?:{wanted})$"
    compiled = regex.compile(wanted, regex.V0)

    def is_met(text: str) -> bool:
        return compiled.fullmatch(text, timeout=20) is not None

    return Case({"regex": wanted}, is_met)


# Schemas


def schema_case(chance: random.Random) -> Case:
    definitions = ["node", "größe", "x"][: chance.randint(0, 3)]
    whole = schema(chance, 3, definitions)
    if definitions:
        whole = {**whole, "$defs": {name: schema(chance, 2, definitions) for name in definitions}}
    if chance.random() < 0.3:
        whole["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    exact = json.loads(json.dumps(whole), parse_float=decimal.Decimal)
    validator = jsonschema.Draft202012Validator(exact, format_checker=CHECKED)
    try:
        _ = [validator.is_valid(value) for value in (None, 1, "a", [], {})]
    except RecursionError:  # a part that refers to itself at once, which means nothing
        return schema_case(chance)

    def is_met(text: str) -> bool:
        with decimal.localcontext() as context:
            context.prec = 2 * MAX_EXPONENT
            return all(validator.is_valid(value) for value in values(text))

    return Case({"schema": whole}, is_met)


def values(text: str) -> list[Any]:
    """What a text means, where of two keys that are equal the last counts, and the first."""

    def first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(reversed(pairs))

    return [json.loads(text, parse_float=number), json.loads(text, parse_float=number, object_pairs_hook=first)]


def number(digits: str) -> decimal.Decimal:
    """Exact, but for exponents that no schema here has bounds or steps for."""
    mantissa, _, exponent = digits.lower().partition("e")
    return decimal.Decimal(f"{mantissa}e{max(min(int(exponent or 0), MAX_EXPONENT), -MAX_EXPONENT)}")


def schema(chance: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    simple = [_null, _integer, _number, _string, _enum, _string, _integer]
    if depth == 0:
        return chance.choice(simple)(chance)
    if definitions and chance.random() < 0.15:
        return {"$ref": f"#/$defs/{chance.choice(definitions)}"}
    made = chance.choice([*simple, _object, _object, _object, _array, _array, _any_of, _one_of, _all_of])
    return made(chance) if made in simple else made(chance, depth - 1, definitions)


def _null(chance: random.Random) -> dict[str, Any]:
    return {"type": chance.choice(["null", "boolean", ["null", "boolean"]])}


def _bounds(chance: random.Random, number: Callable[[], Any]) -> dict[str, Any]:
    low, high = sorted((number(), number()))
    bounds = {chance.choice(["minimum", "exclusiveMinimum"]): low, chance.choice(["maximum", "exclusiveMaximum"]): high}
    return {name: value for name, value in bounds.items() if chance.random() < 0.7}


def _integer(chance: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"type": chance.choice(["integer", "integer", ["integer", "null"]])}
    found |= _bounds(chance, lambda: chance.choice([0, -1, 7, chance.randint(-2000, 2000), chance.randint(-9, 99)]))
    if chance.random() < 0.2:
        found["multipleOf"] = chance.choice([2, 3, 5, 7, 10, 25])
    return found


def _number(chance: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "number"}
    found |= _bounds(chance, lambda: round(chance.uniform(-50, 50), chance.randint(0, 4)))
    if chance.random() < 0.15:
        found["multipleOf"] = chance.choice([0.5, 0.25, 0.1, 0.01, 3])
    return found


def _string(chance: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    kind = chance.randrange(5)
    if kind == 0:
        found["pattern"] = chance.choice(
            ["^[a-f]+$", "^\\d{3}-\\d{4}$", "^(é|語)*$", "a.c", "^[^a-z]{2,5}$", "^[A-Z][a-zé-ü]{0,8}$", "x{2}", "^$"]
        )
        return found
    if kind == 1:
        found["format"] = chance.choice(FORMATS)
        return found
    low = chance.randint(0, 4)
    found |= {"minLength": low} if chance.random() < 0.5 else {}
    found |= {"maxLength": low + chance.randint(0, 9)}
    if kind == 2:
        found["pattern"] = chance.choice(["^[a-zé]*$", "^.*[0-9]$", "[語🙂]"])
    return found


def _enum(chance: random.Random) -> dict[str, Any]:
    simple = [None, True, False, 0, 17, -3, 1.5, "é", "語🙂", "a/b", 'q"uo', "li\nne", "", "ok", "b\\s"]
    deep = [[1, "é"], {"a": [None]}, {"語": 1, "b": {}}, []]
    if chance.random() < 0.3:
        return {"const": chance.choice([*simple, *deep])}
    return {"enum": chance.sample([*simple, *deep], chance.randint(1, 5))}


def _object(chance: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    names = chance.sample(KEYS, chance.randint(0, 5))
    found: dict[str, Any] = {"type": "object"}
    found["properties"] = {name: schema(chance, depth, definitions) for name in names}
    others = [name for name in KEYS if name not in names]
    required = [name for name in names if chance.random() < 0.6]
    extra = chance.random()
    if extra < 0.65:
        found["additionalProperties"] = False
    elif extra < 0.85:
        found["additionalProperties"] = schema(chance, 0, definitions)
        if chance.random() < 0.3:
            required.append(chance.choice(others))
    if chance.random() < 0.1:
        found["patternProperties"] = {chance.choice(["^x", "[0-9]$", "é"]): schema(chance, 0, definitions)}
    if required:
        chance.shuffle(required)
        found["required"] = required
    if chance.random() < 0.1:
        found["maxProperties"] = len(names) + chance.randint(0, 2)
    if chance.random() < 0.1:
        found["minProperties"] = chance.randint(0, len(required) + 1)
    return found


def _array(chance: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "array"}
    if chance.random() < 0.85:
        found["items"] = schema(chance, depth, definitions)
    if chance.random() < 0.2:
        found["prefixItems"] = [schema(chance, depth, definitions) for _ in range(chance.randint(1, 3))]
    low = chance.randint(0, 3)
    if chance.random() < 0.5:
        found["minItems"] = low
    if chance.random() < 0.8:
        found["maxItems"] = low + chance.randint(0, 3)
    return found


def _any_of(chance: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    return {"anyOf": [schema(chance, depth, definitions) for _ in range(chance.randint(1, 4))]}


def _one_of(chance: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    """Parts that cannot hold at once: of different types, or objects with a property that tells them apart."""
    if chance.random() < 0.5:
        made = chance.sample([_integer, _string, lambda c: _array(c, depth, definitions)], 2)
        parts = [make(chance) for make in made]
        for part in parts:
            part["type"] = part["type"][0] if isinstance(part["type"], list) else part["type"]
        return {"oneOf": parts}
    parts = []
    for value in chance.sample(["a", "é", 1, None], chance.randint(2, 3)):
        part = _object(chance, depth, definitions)
        part["properties"] = {"id": {"const": value}, **without(part["properties"], "id")}
        part["required"] = ["id", *(name for name in part.get("required", []) if name != "id")]
        parts.append(part)
    return {"oneOf": parts}


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _all_of(chance: random.Random, depth: int, definitions: list[str]) -> dict[str, Any]:
    if chance.random() < 0.5:
        return {"allOf": [_string(chance), {"minLength": chance.randint(0, 2)}, {"maxLength": chance.randint(4, 20)}]}
    parts = [_object(chance, depth, definitions) for _ in range(2)]
    for part in parts:
        part.pop("additionalProperties", None)
        part.pop("maxProperties", None)
        part.pop("minProperties", None)
    return {"allOf": parts}
