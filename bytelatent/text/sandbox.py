"""Jinja as chat templates have it: in a sandbox, with what transformers gives its templates."""

import json
import time
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from bytelatent.errors import UserError

BEGIN, END = "\ud802", "\ud803"  # around what the assistant writes; no text has these characters
MAX_CHARACTERS = 1 << 27  # that a template may write; a row to train on has at most half as many bytes
MAX_SECONDS = 10.0  # for which a template may run; those in use take milliseconds

_deadline: ContextVar[float] = ContextVar("deadline")  # of the template that this thread writes by, by time.monotonic


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
    _deadline.set(time.monotonic() + MAX_SECONDS)
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
    from jinja2.visitor import NodeTransformer

    class Bounded(NodeTransformer):
        """Calls the sandbox in each pass of a loop and in each macro, and to join texts."""

        def visit_For(self, node: Any) -> Any:  # noqa: N802  # as Jinja has it
            node.body.insert(0, nodes.ExprStmt(self._call("goes_on", [])))
            return self.generic_visit(node)

        visit_Macro = visit_CallBlock = visit_For

        def visit_Concat(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            return self._call("joined", node.nodes)

        @staticmethod
        def _call(name: str, arguments: list[Any]) -> Any:
            return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)

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
        """Without loops that never end, and without sums and products that fill the memory."""

        intercepted_binops = frozenset({"*", "**", "+"})

        def _parse(self, *source: Any) -> Any:
            return Bounded().visit(super()._parse(*source)).set_environment(self)

        def goes_on(self) -> None:
            if time.monotonic() > _deadline.get():
                raise TemplateError(f"it runs for more than {MAX_SECONDS:g} seconds")

        def joined(self, *parts: Any) -> str:
            texts = [str(part) for part in parts]
            if sum(map(len, texts)) > MAX_CHARACTERS:
                raise TemplateError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
            return "".join(texts)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+":
                are_joined = isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple)
                if are_joined and len(left) + len(right) > MAX_CHARACTERS:
                    raise TemplateError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
            elif operator == "*":
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
