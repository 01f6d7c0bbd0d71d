"""Jinja as chat templates have it: in a sandbox, with what transformers gives its templates."""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from bytelatent.errors import UserError

BEGIN, END = "\ud802", "\ud803"  # around what the assistant writes; no text has these characters
MAX_CHARACTERS = 1 << 27  # that a template may write; a row to train on has at most half as many bytes


class Refused(Exception):
    """What a template says against its messages, or that it does too much."""


@lru_cache(maxsize=64)
def compile_template(source: str, name: str) -> Any:
    """A template of Jinja.

    Raises:
        UserError: it is no Jinja; `name` is its file.
    """
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise UserError(f"chat_template: '{name}', line {error.lineno}: {error.message}") from None


def write(template: Any, variables: dict[str, Any]) -> str:
    """What a template writes.

    Raises:
        Refused: by itself, or by the sandbox.
    """
    from jinja2 import TemplateError

    pieces, size = [], 0
    try:
        for piece in template.generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_CHARACTERS:
                raise Refused(f"it writes more than {MAX_CHARACTERS:,} characters")
    except TemplateError as error:
        raise Refused(error.message or str(error)) from None
    return "".join(pieces)


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: what is within is the assistant's."""

        tags = {"generation"}  # noqa: RUF012  # as Jinja has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("between_marks"), [], [], body).set_lineno(line)

        def between_marks(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    class Sandbox(ImmutableSandboxedEnvironment):
        """Without products that fill the memory."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                for one, times in ((left, right), (right, left)):
                    if isinstance(one, str | list | tuple) and len(one) * int(times) > MAX_CHARACTERS:
                        raise TemplateError(f"it repeats something {times:,} times")
            elif isinstance(right, int) and abs(right) > 1000:
                raise TemplateError(f"it raises to the power of {right:,}")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **how: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **how})  # Jinja's own escapes HTML

    found = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    found.filters["tojson"] = to_json
    found.globals["raise_exception"] = raise_exception
    found.globals["strftime_now"] = lambda how: datetime.now().strftime(how)
    return found
