"""Structured output: which bytes may come next in a text that must meet a JSON schema, an expression or a grammar.

A token LM must match the ends of tokens with those of the grammar. Here every id is a byte, and what is allowed is
exactly what comes next in some text that meets the constraint. The automaton is llguidance's, over our ids.
"""

import json
import random
import re
import threading
import time
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, Literal, TypeVar

import numpy as np

from bytelatent.errors import UserError
from bytelatent.inference import json_schema
from bytelatent.vocab import BOS, EOS, OFFSET, VOCAB_SIZE

# Shapes: V vocabulary

Kind = Literal["schema", "regex", "grammar"]
T = TypeVar("T")

MAX_TEXT = 500_000  # characters of a schema, an expression or a grammar
MAX_SECONDS = 1.0  # to compile one
CACHED = 256  # compiled constraints
LIMITS = {"max_items_in_row": 8000, "max_lexer_states": 50_000, "verbose_errors": False}
# What a schema leaves open is written in one way only, so that no key can be written in two: with no escapes but
# these, and at most a space between the parts, on which a small model could spend all bytes that it has.
JSON_OPTIONS = {
    "json_allowed_escapes": '"\\bfnrt',
    "json_allow_general_unicode_escapes": False,
    "coerce_one_of": False,
    "lenient": False,
}
JSON_DEFAULTS = {"whitespace_pattern": " "}
WALKS, WALK_BYTES = 4, 64  # texts that are tried on a new constraint
ANYWHERE = "docs/structured.md says what is supported"


class Constraint:
    """What a text must meet. To be shared by any number of sequences.

    Attributes:
        kind: `schema`, `regex` or `grammar`.
        text: the schema as JSON, the expression or the grammar.
    """

    def __init__(self, kind: Kind, text: str):
        self.kind: Kind = kind
        self.text = text
        self._matcher = _compiled(kind, text)

    @classmethod
    def of(cls, *, schema: Any = None, regex: str | None = None, grammar: str | None = None) -> "Constraint | None":
        """The constraint that is given, if any; one that was compiled before is reused.

        Args:
            schema: a JSON schema: a dict, its JSON as a text, or a pydantic model.
            regex: a regular expression in the syntax of Rust's `regex`, which the whole text must match.
            grammar: a grammar in llguidance's form of Lark.

        Raises:
            UserError: several are given; llguidance is not installed; it is not valid, not supported, cannot be met by
                any text, or is too large. The message names where.
        """
        given = {"schema": schema, "regex": regex, "grammar": grammar}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise UserError(f"{' and '.join(named)} are given; a text meets one of them, so give one")
        if not named:
            return None
        kind: Any = named[0]
        text = schema_text(schema) if kind == "schema" else given[kind]
        if not isinstance(text, str):
            raise UserError(f"{kind}: a text is needed, not {type(text).__name__}")
        if len(text) > MAX_TEXT:
            raise UserError(f"{kind}: {len(text):,} characters are more than {MAX_TEXT:,}; ask for less at once")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{kind}: it holds half of a surrogate pair; write whole characters") from None
        return _cached(kind, text)

    def __repr__(self) -> str:
        return f"Constraint({self.kind}={self.text[:60]!r})"

    def start(self) -> "ConstraintState":
        """A state for a sequence, before its first byte."""
        return ConstraintState(self.kind, self._matcher.deep_copy())


class ConstraintState:
    """What a constraint allows after the bytes of one sequence.

    Attributes:
        allowed: bool [V], the ids that may come next: bytes, and EOS where the text meets the constraint.
        error: why nothing may come, though the text does not meet the constraint; None as long as something may.
    """

    def __init__(self, kind: Kind, matcher: Any):
        self.kind, self._matcher = kind, matcher
        self.error: str | None = None
        self.allowed = _NOTHING
        self._find_allowed()

    @property
    def is_complete(self) -> bool:
        """Whether the text meets the constraint and nothing may be added."""
        return bool(self.allowed[EOS]) and int(self.allowed.sum()) == 1

    def read(self, id_: int) -> None:
        """Read the byte that came next, one of the allowed ones."""
        self._matcher.consume_token(id_)
        self._find_allowed()

    def _find_allowed(self) -> None:
        try:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            if self._matcher.is_error():
                raise ValueError(self._matcher.get_error())
        except ValueError as error:
            self.allowed, self.error = _NOTHING, _reason(str(error))
            return
        self.allowed = np.unpackbits(bits, count=VOCAB_SIZE, bitorder="little").view(bool) & _DRAWN
        if not self.allowed.any():
            self.error = _reason("NoExtension")


_NOTHING = np.zeros(VOCAB_SIZE, dtype=bool)
_DRAWN = np.arange(VOCAB_SIZE) >= OFFSET  # a grammar may name other ids by their numbers
_DRAWN[EOS] = True


def schema_text(schema: Any) -> str:
    """A JSON schema as JSON.

    Args:
        schema: a dict, a bool, JSON as a text, or what pydantic makes one of: a model, or a `TypeAdapter`.

    Raises:
        UserError: it is something else, or no JSON.
    """
    for method in ("model_json_schema", "json_schema"):
        if callable(made := getattr(schema, method, None)):
            schema = made()
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        if schema is False:
            raise UserError("schema: no value meets false; give an object")
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise UserError(
                f"schema: an object is needed, not {type(schema).__name__}; give a dict, or a pydantic model"
            )
        if json_schema.depth(schema) > json_schema.MAX_DEPTH:
            json_schema.check(schema)
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False).encode().decode()
        return json.dumps(json_schema.with_encoded_references(json.loads(text)), ensure_ascii=False)
    except RecursionError:
        raise UserError("schema: it nests too many objects and arrays") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"schema: it is no JSON: {error}") from None


@lru_cache(maxsize=CACHED)
def _cached(kind: Kind, text: str) -> Constraint:
    return Constraint(kind, text)


def _compiled(kind: Kind, text: str) -> Any:
    """A matcher before its first byte, which was tried."""
    library = _llguidance()
    began = time.monotonic()
    if kind == "schema":
        schema = json.loads(text)
        json_schema.check(schema)
    matcher = _within(MAX_SECONDS, kind, lambda: _matcher(library, kind, text))
    if matcher is None:
        raise UserError(f"{kind}: it takes more than {MAX_SECONDS:g} s to compile; ask for less at once")
    if matcher.is_error():
        raise UserError(_refusal(library, kind, text, matcher.get_error()))
    if error := _tried(kind, matcher, began + MAX_SECONDS):
        raise UserError(f"{kind}: {error}")
    return matcher


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError("structured output needs llguidance; run: pip install 'bytelatent[serve]'") from None
    return llguidance


@cache
def _tokenizer(library: Any) -> Any:
    """Our ids as llguidance's tokens: a byte each."""

    class Bytes:
        eos_token_id, bos_token_id = EOS, BOS
        special_token_ids = tuple(range(OFFSET))
        tokens = (b"", b"", b"<eos>", b"", *(bytes([byte]) for byte in range(256)))

        def __call__(self, text: str | bytes) -> list[int]:
            return [byte + OFFSET for byte in (text.encode() if isinstance(text, str) else text)]

    return library.LLTokenizer(library.TokenizerWrapper(Bytes()), slices=[])


def _matcher(library: Any, kind: Kind, text: str) -> Any:
    make = library.LLMatcher
    if kind == "schema":
        grammar = make.grammar_from_json_schema(text, defaults=JSON_DEFAULTS, overrides=JSON_OPTIONS)
    else:
        grammar = (make.grammar_from_regex if kind == "regex" else make.grammar_from_lark)(text)
    return make(_tokenizer(library), grammar, log_level=0, limits=library.LLParserLimits(**LIMITS))


def _within(seconds: float, kind: Kind, function: Callable[[], T]) -> T | None:
    """What a function gives that waits without the interpreter's lock; None if it takes longer."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except ValueError as error:
            found.append(UserError(f"{kind}: {error}"))

    thread = threading.Thread(target=run, daemon=True, name="compile-constraint")
    thread.start()
    thread.join(seconds)
    if found and isinstance(found[0], Exception):
        raise found[0]
    return found[0] if found else None


def _tried(kind: Kind, matcher: Any, until: float) -> str | None:
    """Why texts that are begun at random cannot go on, or take too long; None if all can."""
    chance = random.Random(0)
    for _ in range(WALKS):
        state, text = ConstraintState(kind, matcher.deep_copy()), b""
        for _ in range(WALK_BYTES):
            if state.error is not None:
                return f"after '{text.decode(errors='replace')}': {state.error}" if text else state.error
            if time.monotonic() > until:
                return f"it takes more than {MAX_SECONDS:g} s to compile; ask for less at once"
            id_ = chance.choice(state.allowed.nonzero()[0].tolist())
            if id_ == EOS:
                break
            text += bytes([id_ - OFFSET])
            state.read(id_)
    return None


def _reason(message: str) -> str:
    """Why a state has no next byte."""
    if "NoExtension" in message:
        return "no text meets it"
    for sign, reason in (
        ("Too many items", "it has too many readings, or never ends"),
        ("items; max is", "it has too many alternatives at one place"),
        ("fuel", "it takes too long to follow"),
        ("states", "it takes too much memory to follow"),
    ):
        if sign in message:
            return f"{reason}; write it more simply"
    return f"it cannot be followed ({message.partition(chr(10))[0][:200]})"


def _refusal(library: Any, kind: Kind, text: str, message: str) -> str:
    """The compiler's message in one line that names where."""
    if kind == "schema":
        return _schema_refusal(library, json.loads(text), message)
    place = re.match(r"(?:at )?(\d+)\((\d+)\): ?", message)
    where = f"line {place[1]}, column {place[2]}: " if place and kind == "grammar" else ""
    if "invalid regex" not in message:
        return f"{kind}: {where}{_short(message[place.end() :] if place else message)}; {ANYWHERE}"
    inner = message.partition("(in regex): ")[2] or message
    if "look" in inner:
        cause = "look-around, as (?=...), \\b, or ^ and $ within, is not supported"
    else:
        cause = _short(found[1] if (found := re.search(r"error: ([^\n]*)", inner)) else inner)
    marked = re.search(r"\n    ([^\n]*)\n    ( *)\^", inner)
    if marked and kind == "regex":
        begin = len(marked[2])
        where = f"at character {begin + 1}, '{marked[1][begin : begin + 20]}': "
    return f"{kind}: {where}{cause}; {ANYWHERE}"


def _schema_refusal(library: Any, schema: Any, message: str) -> str:
    where = ""
    named = {name: schema[name] for name in ("$defs", "definitions") if isinstance(schema, dict) and name in schema}
    until = time.monotonic() + MAX_SECONDS / 4
    for at, part in sorted(json_schema.parts(schema), key=lambda part: -part[0].count("/")):
        if not at or time.monotonic() > until:
            break
        if isinstance(part, dict) and _matcher(library, "schema", json.dumps(named | part)).get_error() == message:
            where = f"'{at}': "
            break
    if keys := re.match(r"Unimplemented keys: (.*)", message):
        message = f"{', '.join(json.loads(keys[1]))}: not supported; leave it out"
    elif message.startswith("oneOf constraints"):
        message = "oneOf whose parts may hold at once is not supported; write anyOf"
    elif message.startswith("Failed to generate regex for"):
        message = "bounds of this size are not supported; leave them out"
    elif message.startswith("Unable to determine"):
        message = "a pattern together with these lengths takes too long to follow; leave one of them out"
    elif message.startswith("Unsatisfiable schema: "):
        message = f"no value meets it: {message.partition(': ')[2]}"
    return f"schema: {where}{_short(' '.join(message.split()))}; {ANYWHERE}"


def _short(message: str) -> str:
    line = message.strip().partition("\n")[0]
    return line if len(line) <= 200 else f"{line[:200]}..."
