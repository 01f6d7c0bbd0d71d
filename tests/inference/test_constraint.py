"""Structured output: what may come next, against all texts that meet a constraint; and what is refused."""

import itertools
import json
import re
import sys
import time
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.inference import constraint as module
from bytelatent.inference.constraint import Constraint, ConstraintState
from bytelatent.vocab import EOS, OFFSET

COMPACT = {"x-guidance": {"whitespace_pattern": ""}}


def constraint(**given: Any) -> Constraint:
    found = Constraint.of(**given)
    assert found is not None
    return found


def after(given: Constraint, data: bytes) -> ConstraintState:
    state = given.start()
    for byte in data:
        assert state.allowed[byte + OFFSET], f"{byte} after {data!r}"
        state.read(byte + OFFSET)
    return state


def allowed(state: ConstraintState) -> set[int]:
    return set(state.allowed.nonzero()[0].tolist())


def following(texts: set[str]) -> dict[bytes, set[int]]:
    """What comes next in some of the texts, by each beginning."""
    found: dict[bytes, set[int]] = {}
    for data in map(str.encode, texts):
        for end, next_ in enumerate([*(byte + OFFSET for byte in data), EOS]):
            found.setdefault(data[:end], set()).add(next_)
    return found


def texts_of(given: Constraint, most: int = 3000) -> set[str]:
    """All texts that the masks lead to."""
    found, waiting = set(), [b""]
    while waiting:
        data = waiting.pop()
        state = after(given, data)
        assert state.error is None
        for id_ in allowed(state):
            if id_ == EOS:
                found.add(data.decode())
            else:
                waiting.append(data + bytes([id_ - OFFSET]))
        assert len(found) + len(waiting) < most
    return found


Language = tuple[str, frozenset[str]]  # an expression, and all texts that match it


def joined(parts: tuple[Language, Language]) -> Language:
    (one, texts), (other, others) = parts
    return one + other, frozenset(a + b for a in texts for b in others)


def either(parts: list[Language]) -> Language:
    return f"(?:{'|'.join(one for one, _ in parts)})", frozenset().union(*(texts for _, texts in parts))


def repeated(part: Language, low: int, high: int) -> Language:
    times = [frozenset(map("".join, itertools.product(part[1], repeat=count))) for count in range(low, high + 1)]
    return f"(?:{part[0]}){{{low},{high}}}", frozenset().union(*times)


LEAVES = {"a": "a", "[ab]": "ab", "é": "é", "[ç-ê]": "çèéê", "[🙁-🙃é]": "🙁🙂🙃é", "\\.": ".", "[0-3]": "0123"}
LANGUAGES = st.recursive(
    st.sampled_from([(expression, frozenset(texts)) for expression, texts in LEAVES.items()]),
    lambda inner: (
        st.tuples(inner, inner).map(joined)
        | st.lists(inner, min_size=2, max_size=3).map(either)
        | st.builds(repeated, inner, st.integers(0, 1), st.integers(1, 2))
    ),
    max_leaves=4,
).filter(lambda language: len(language[1]) <= 60)


@settings(max_examples=30)
@given(LANGUAGES)
def test_what_is_allowed_is_what_comes_next_in_some_text(language: Language) -> None:
    """After every beginning of every text: nothing more, nothing less."""
    expression, texts = language
    assert all(re.fullmatch(expression, text) for text in texts)
    given = constraint(regex=expression)
    for data, expected in following(set(texts)).items():
        state = after(given, data)
        assert (allowed(state), state.error) == (expected, None)
        assert state.is_complete == (expected == {EOS})


@pytest.mark.parametrize("expression", ["(?:ab|é)*a", "(?:a|aé)+b?", "[^a]*b", "a*b*é{2,}", "(?:aa|b.)*", ""])
def test_what_is_allowed_by_endless_expressions(expression: str) -> None:
    every = ("".join(text) for size in range(8) for text in itertools.product("abé", repeat=size))
    expected = following({text for text in every if re.fullmatch(expression, text)})
    over = {EOS, *(byte + OFFSET for byte in "abé".encode())}
    given = constraint(regex=expression)
    for data, ids in expected.items():
        if len(data.decode(errors="ignore")) <= 3:  # of longer ones not all ends were tried
            assert allowed(after(given, data)) & over == ids & over


PAIRS = [list(pair) for pair in itertools.product([1, 2], repeat=2)]
BOOLEAN, BOTH = {"größe": {"type": "boolean"}}, {"a": 1, "é": 2}
TWO = {name: {"const": value} for name, value in BOTH.items()}


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        ({"type": "integer", "minimum": -12, "exclusiveMaximum": 11, "multipleOf": 3}, [-12, -9, -6, -3, 0, 3, 6, 9]),
        ({"enum": ["é", "a\nb", 1.5, None, {"🙂": [1, {}]}]}, ["é", "a\nb", 1.5, None, {"🙂": [1, {}]}]),
        ({"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 2}, [[1], [2], *PAIRS]),
        ({"anyOf": [{"const": "x"}, {"$ref": "#/$defs/größe"}], "$defs": BOOLEAN}, ["x", True, False]),
        ({"type": "object", "properties": TWO, "required": ["é"], "additionalProperties": False}, [{"é": 2}, BOTH]),
        ({"type": "string", "pattern": "^[ab]é?$", "maxLength": 1}, ["a", "b"]),
        ({"oneOf": [{"const": "a"}, {"type": "null"}]}, ["a", None]),
    ],
)
def test_all_values_of_a_schema_and_no_other(schema: Any, values: list[Any]) -> None:
    found = [json.loads(text) for text in texts_of(constraint(schema={**schema, **COMPACT}))]
    assert set(map(repr, found)) == set(map(repr, values))


def test_a_grammar() -> None:
    grammar = 'start: item ("," item)?\nitem: /[ab]/ | "(" item ")"'
    given = constraint(grammar=grammar)
    assert allowed(after(given, b"((a")) == {ord(")") + OFFSET}
    assert allowed(after(given, b"a,b")) == {EOS}
    assert after(given, b"a,b").is_complete


def test_a_key_can_be_written_in_one_way_only() -> None:
    """Or an escape would let a property in under another schema than its own."""
    given = constraint(schema={"type": "object", "properties": {"a": {"type": "integer"}}, **COMPACT})
    assert ord("u") + OFFSET not in allowed(after(given, b'{"\\'))
    assert ord('"') + OFFSET not in allowed(after(given, b'{"a":1,"a'))


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_ways_to_give_a_schema() -> None:
    of_class = constraint(schema=Person)
    assert of_class is constraint(schema=Person.model_json_schema()), "it is compiled once"
    assert of_class is constraint(schema=json.dumps(Person.model_json_schema()))
    assert constraint(schema=pydantic.TypeAdapter(list[Person])).kind == "schema"
    assert repr(constraint(regex="ab")) == "Constraint(regex='ab')"
    assert Constraint.of() is None
    assert allowed(constraint(schema=True).start()) >= {ord(sign) + OFFSET for sign in '"{[0'}


LIST_OF_ITSELF = {"type": "array", "minItems": 1, "items": {"allOf": [{"$ref": "#/$defs/a b"}]}}
NEEDS_ITSELF = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
NEVER = {"$ref": "#/properties/a"}
DOUBLED = "".join(f"r{number}: r{number + 1} r{number + 1}\n" for number in range(60))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two": ({"regex": "a", "grammar": "b"}, "regex and grammar are given; .* give one"),
    "no text": ({"regex": 3}, "regex: a text is needed, not int"),
    "no object": ({"schema": [1]}, "schema: an object is needed, not list"),
    "no JSON": ({"schema": '{"type":'}, "schema: it is no JSON: .*char 8"),
    "no number": ({"schema": {"const": float("nan")}}, "schema: it is no JSON"),
    "half a character": ({"schema": {"const": "\ud800"}}, "schema: it is no JSON"),
    "half of one": ({"regex": "a\udc80"}, "regex: it holds half of a surrogate pair"),
    "extension": ({"schema": {"items": {"x-guidance": {}}}}, "schema: '/items' has x-guidance"),
    "letters between": (
        {"schema": {"x-guidance": {"whitespace_pattern": "[ a]"}}},
        "schema: x-guidance: whitespace_pattern is spaces",
    ),
    "negative steps": ({"schema": {"multipleOf": -3}}, "the whole has multipleOf=-3, which is not above 0"),
    "no such type": ({"schema": {"properties": {"a": {"type": "strin"}}}}, "schema: '/properties/a': .*strin"),
    "not supported": ({"schema": {"items": {"not": {}}}}, "schema: '/items': not: not supported; leave it out"),
    "elsewhere": ({"schema": {"$ref": "https://example.com/x"}}, "schema: .*'https://example.com/x'"),
    "several at once": ({"schema": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "write anyOf"),
    "keys that may repeat": ({"schema": {"type": "object", "minProperties": 2}}, "the whole has minProperties=2"),
    "never": ({"schema": False}, "schema: no value meets false"),
    "empty": ({"schema": {"type": "integer", "minimum": 5, "maximum": 4}}, "no value meets it: minimum"),
    "no length": ({"schema": {"type": "string", "pattern": "^a$", "minLength": 3}}, "no value meets it: Regex is"),
    "needs itself": ({"schema": NEEDS_ITSELF}, "the whole: no value of finite size meets it"),
    "in lists": (
        {"schema": {"$ref": "#/$defs/a%20b", "$defs": {"a b": LIST_OF_ITSELF}}},
        "the whole: no value of finite size",
    ),
    "optional": ({"schema": {"properties": {"a": NEVER}}}, "'/properties/a': no value of finite size meets it"),
    "deep": ({"schema": '{"items":' * 5000 + "{}" + "}" * 5000}, "nests"),
    "deeper than a compiler goes": ({"schema": '{"items":' * 110 + "{}" + "}" * 110}, "nests more than 100"),
    "large": ({"schema": {"enum": [f"value {number}" for number in range(60_000)]}}, "are more than 500,000"),
    "wide": ({"schema": {"properties": {f"p{n}": {} for n in range(2000)}}}, "2,000 properties that may be left out"),
    "slow": ({"schema": {"properties": {"a": {"multipleOf": 1_000_003}}}}, "'/properties/a' has multipleOf=1000003"),
    "huge bounds": ({"schema": {"type": "integer", "minimum": 10**30}}, "bounds of this size are not supported"),
    "no expression": ({"regex": "ab(c"}, r"regex: at character 3, '\(c': unclosed group"),
    "look-ahead": ({"regex": "ab(?=c)c"}, r"regex: at character 3, '\(\?=c\)c': look-around"),
    "word boundary": ({"regex": r"a\bb"}, "regex: look-around"),
    "backreference": ({"regex": r"(a)\1"}, "regex: at character 4.*: backreferences are not supported"),
    "raw bytes": ({"regex": r"(?-u:\xff)"}, "can match invalid UTF-8"),
    "nothing": ({"regex": r"a[^\s\S]"}, "regex: after 'a': no text meets it|regex: no text meets it"),
    "no grammar": ({"grammar": 'start: "a'}, "grammar: line 1, column 10"),
    "no rule": ({"grammar": "start: other"}, 'grammar: line 1, column 8: unknown name: "other"'),
    "no start": ({"grammar": 'other: "a"'}, "grammar: no start"),
    "no end": ({"grammar": 'start: "a" start'}, "grammar: after 'a': it has too many readings, or never ends"),
    "dead end": ({"grammar": 'start: "x" /[^\\s\\S]/ | "b"'}, "grammar: after 'x': no text meets it"),
    "ambiguous": ({"grammar": f'{DOUBLED}r60: "a"\nstart: r0'}, "grammar: after 'a': it has too many readings"),
    "special ids": ({"grammar": "start: <[1]>"}, "grammar: no text meets it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    """In one line that names what and where, within a second."""
    given, message = REFUSED[name]
    began = time.process_time()
    with pytest.raises(UserError, match=message) as error:
        Constraint.of(**given)
    assert time.process_time() - began < module.MAX_SECONDS
    assert len(str(error.value)) < 350


def test_a_thousand_properties_may_be_left_out() -> None:
    names = [f"p{number}" for number in range(1000)]
    state = constraint(schema={"type": "object", "properties": {name: {"type": "integer"} for name in names}}).start()
    for byte in b'{"p999":5':
        assert state.allowed[byte + OFFSET]
        state.read(byte + OFFSET)


def test_what_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.01)
    required = [f"p{number}" for number in range(900)]
    schema = {"type": "object", "properties": {name: {"type": "number"} for name in required}, "required": required}
    with pytest.raises(UserError, match=r"schema: it takes more than 0\.01 s to compile"):
        Constraint.of(schema=schema)


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"needs llguidance; run: pip install 'bytelatent\[serve\]'"):
        Constraint.of(regex="never compiled before")


WORDS = (
    st.sampled_from(["type", "properties", "items", "$ref", "$defs", "required", "minItems", "minProperties", "anyOf"])
    | st.sampled_from(["allOf", "oneOf", "pattern", "enum", "const", "multipleOf", "minimum", "prefixItems", "format"])
    | st.sampled_from(["additionalProperties", "$id", "x"])
    | st.text(max_size=2)
)
VALUES = st.sampled_from(["object", "array", "string", "#", "#/$defs/a", "(", "date"])
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**20) | st.floats() | st.text(max_size=4) | VALUES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60)
@given(st.dictionaries(WORDS, ANY_JSON, max_size=5))
def test_any_json_is_a_schema_or_an_error(schema: dict[str, Any]) -> None:
    try:
        state = constraint(schema=schema).start()
    except UserError as error:
        message = str(error)
    else:
        assert allowed(state)
        message = "schema: "
    assert message.startswith("schema: ")
