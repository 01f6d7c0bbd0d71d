"""What a request asks its output to meet, as OpenAI's clients and vLLM's write it.

    {"response_format": {"type": "json_object"}}
    {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": {...}, "strict": true}}}
    {"structured_outputs": {"regex": "[0-9]+"}}         one of json, json_object, regex, choice and grammar

A schema is held to exactly, with `strict` or without.
"""

from typing import Any

from bytelatent.errors import UserError, nearest
from bytelatent.inference.constraint import Constraint

ANY_OBJECT = {"type": "object"}
FORMATS = ("text", "json_object", "json_schema")
CHOICES = ("json", "json_object", "regex", "choice", "grammar")
SPECIAL = frozenset("\\.+*?()|[]{}^$#&-~/")  # characters that mean something in an expression


def constraint_of(response_format: Any = None, structured_outputs: Any = None) -> Constraint | None:
    """The constraint that the two fields of a request ask for, if any.

    Args:
        response_format: OpenAI's: an object with the `type` text, json_object or json_schema.
        structured_outputs: an object with one of json (a schema), json_object (true), regex, choice (texts, one of
            which comes) and grammar.

    Raises:
        UserError: a field has another form, or cannot be met; the message begins with the field's name.
    """
    if response_format is not None and structured_outputs is not None:
        raise UserError("response_format: structured_outputs is given too; give one of them")
    name = "response_format" if structured_outputs is None else "structured_outputs"
    wanted = _of_format(response_format) if structured_outputs is None else _of_outputs(structured_outputs)
    try:
        return Constraint.of(**wanted)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _of_format(given: Any) -> dict[str, Any]:
    if given is None:
        return {}
    kind = _object("response_format", given).get("type")
    if kind not in FORMATS:
        hint = nearest(kind, list(FORMATS)) if isinstance(kind, str) else ""
        raise UserError(f"response_format: type {kind!r:.60} is not one of {', '.join(FORMATS)}{hint}")
    if kind != "json_schema":
        return {"schema": ANY_OBJECT} if kind == "json_object" else {}
    about = _object("response_format.json_schema", given.get("json_schema"))
    if not isinstance(about.get("strict"), bool | None):
        raise UserError(f"response_format.json_schema.strict: {about['strict']!r:.60} is not true or false")
    if (schema := about.get("schema")) is None:
        raise UserError('response_format.json_schema: "schema" is missing; for any object, use json_object')
    return {"schema": _object("response_format.json_schema.schema", schema)}


def _of_outputs(given: Any) -> dict[str, Any]:
    named = [key for key, value in _object("structured_outputs", given).items() if value is not None]
    for key in named:
        if key not in CHOICES:
            hint = nearest(key, list(CHOICES))
            raise UserError(f"structured_outputs: '{key:.60}' is not one of {', '.join(CHOICES)}{hint}")
    if len(named) != 1:
        shown = " and ".join(named) or "nothing"
        raise UserError(f"structured_outputs: {shown} is given; give one of {', '.join(CHOICES)}")
    [key] = named
    value = given[key]
    if key == "json":
        return {"schema": value}
    if key == "json_object":
        if value is not True:
            raise UserError(f"structured_outputs.json_object: {value!r:.60} is not true; leave it out")
        return {"schema": ANY_OBJECT}
    if key == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
            raise UserError("structured_outputs.choice: a list of texts is needed, none of them empty")
        return {"regex": "|".join(map(expression_for, value))}
    return {key: value}


def expression_for(text: str) -> str:
    """A regular expression that matches one text."""
    return "".join(f"\\{character}" if character in SPECIAL else character for character in text)


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{name}: an object is needed, not {type(value).__name__}")
    return value
