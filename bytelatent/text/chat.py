r"""Conversations as bytes: chat templates in Jinja, as transformers stores them, and what in them is the assistant's.

Our own template writes each message as ``\x01 role \x02 content \x03``: ASCII's start of heading, start of text, end of
text. It drops these bytes from what people write, so that no text can hold a marker. In any template, the ids BOS and
EOS come from the template alone: the text `</s>` in a message is five bytes.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bytelatent.errors import UserError
from bytelatent.text.sandbox import BEGIN, END, Refused, compile_template, write
from bytelatent.vocab import BYTES, Vocabulary, to_bytes

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Characters that no text has, as `checked_messages` replaces all surrogates: what a template writes by them is its own.
BOS_MARK, EOS_MARK, CUT = "\ud800", "\ud801", "\ud804"
MARKS = re.compile(f"([{BOS_MARK}{EOS_MARK}{BEGIN}{END}{CUT}])")
SURROGATES = re.compile("[\ud800-\udfff]")
PROBE = "an answer to find again"
SHAPE = "it should be a list of messages, such as {'role': 'user', 'content': 'Hello'}"
DEFAULT = r"""{#- A message is \x01 role \x02 content \x03. Content loses these bytes, so it can hold no marker. -#}
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = "system" if message.role == "developer" else message.role -%}
{%- if role not in ["system", "user", "assistant"] -%}
{{- raise_exception("the role '" ~ role ~ "' is not one of system, user and assistant") -}}
{%- endif -%}
{%- set content = message.content -%}
{%- if content is not string -%}{%- set content = content | map(attribute="text") | join -%}{%- endif -%}
{%- set content = content | replace("\x01", "") | replace("\x02", "") | replace("\x03", "") | replace("\x04", "") -%}
{{- "\x01" ~ role ~ "\x02" -}}
{%- if role == "assistant" -%}
{% generation %}{{ content ~ "\x03" }}{% endgeneration %}
{%- else -%}
{{- content ~ "\x03" -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "\x01assistant\x02" -}}{%- endif -%}
"""

Special = Literal["bos", "eos"]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatPart:
    """A stretch of a conversation: text, or one special id in its place; and whether the assistant writes it."""

    text: bytes
    special: Special | None
    is_assistant: bool


@dataclass(frozen=True)
class Rendered:
    """A conversation that a template has written.

    Attributes:
        parts: in order.
        ends_by_itself: the template marks the end of an answer, by a text or EOS.
    """

    parts: tuple[ChatPart, ...]
    ends_by_itself: bool = True

    @property
    def text(self) -> bytes:
        """Its bytes, without special ids."""
        return b"".join(part.text for part in self.parts)

    def ids(self, vocabulary: Vocabulary = BYTES, eos: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ids, BOS first, and for each of them whether it is the assistant's.

        Args:
            eos: end with EOS, as a document does; it is the assistant's where nothing else ends its last answer.

        Returns:
            int64 [N] and bool [N].
        """
        specials = {"bos": vocabulary.bos, "eos": vocabulary.eos}
        found, is_assistant = [np.array([vocabulary.bos])], [np.zeros(1, bool)]
        for number, part in enumerate(self.parts):
            if part.special is None:
                found.append(vocabulary.encode(part.text, bos=False, eos=False))
            elif part.special == "eos" or number:  # the first id is BOS with any template
                found.append(np.array([specials[part.special]]))
            else:
                continue
            is_assistant.append(np.full(len(found[-1]), part.is_assistant))
        if eos and not (self.parts and self.parts[-1].special == "eos"):
            ends = bool(self.parts) and self.parts[-1].is_assistant and not self.ends_by_itself
            found.append(np.array([vocabulary.eos]))
            is_assistant.append(np.array([ends]))
        return np.concatenate(found).astype(np.int64), np.concatenate(is_assistant)


class BadMessages(UserError):
    """Messages that no template can write; or one refuses them."""


class ChatTemplate:
    """A chat template: Jinja in a sandbox, with what transformers gives its templates.

    Args:
        source: the Jinja.
        name: the file, for errors.

    Raises:
        UserError: it is not Jinja.
    """

    def __init__(self, source: str, name: str = CHAT_TEMPLATE):
        self.source, self.name = source, name
        _ = self._compiled

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatTemplate) and other.source == self.source

    def __hash__(self) -> int:
        return hash(self.source)

    def __repr__(self) -> str:
        return f"ChatTemplate({'default' if self == DEFAULT_TEMPLATE else repr(self.name)})"

    @classmethod
    def read(cls, path: str | Path, setting: str = "chat_template") -> "ChatTemplate":
        """The template in a file of Jinja, or the one beside a model in a folder.

        Args:
            setting: names the path, for errors.

        Raises:
            UserError: it does not exist, or is not Jinja.
        """
        path = Path(path)
        if path.is_dir():
            found = cls.find(path)
            if found is None:
                raise UserError(f"{setting}: '{path}' holds no {CHAT_TEMPLATE}; name a file of Jinja")
            return found
        try:
            return cls(path.read_text(encoding="utf-8-sig"), str(path))
        except FileNotFoundError:
            raise UserError(f"{setting}: '{path}' does not exist; leave it out for the default template") from None
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(f"{setting}: '{path}' cannot be read: {why}") from None

    @classmethod
    def find(cls, folder: Path) -> "ChatTemplate | None":
        """The template beside a model: `chat_template.jinja`, else `chat_template` in `tokenizer_config.json`.

        Raises:
            UserError: it cannot be read, or is not Jinja.
        """
        if (folder / CHAT_TEMPLATE).is_file():
            return cls.read(folder / CHAT_TEMPLATE)
        where = folder / TOKENIZER_CONFIG
        if not where.is_file():
            return None
        try:
            found: Any = json.loads(where.read_text(encoding="utf-8-sig")).get("chat_template")
        except (OSError, ValueError, AttributeError, RecursionError):
            return None  # it says nothing that any other part needs
        if isinstance(found, list):  # several, by name
            named = [one for one in found if isinstance(one, dict)]
            found = next((one.get("template") for one in named if one.get("name") == "default"), None)
        return cls(found, str(where)) if isinstance(found, str) else None

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer; EOS always ends it, too."""
        after = self._after_answer
        text = MARKS.split(after.replace(BEGIN, "").replace(END, ""))[0]
        stop = text.rstrip() or text
        return (stop,) if stop else ()

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> bytes:
        """A conversation as text; special ids are left out, which `ids` has.

        Args:
            messages: each with `role` and `content`, a text or a list of OpenAI's text parts.
            add_generation_prompt: end with what the assistant's answer follows.
            variables: more of the template's variables, such as `tools`.

        Raises:
            BadMessages: they are no messages, or the template refuses them.
        """
        return self.parts(messages, add_generation_prompt, **variables).text

    def ids(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        vocabulary: Vocabulary = BYTES,
        **variables: Any,
    ) -> np.ndarray:
        """A conversation as a prompt, BOS first, int64 [N]; the arguments are those of `render`."""
        return self.parts(messages, add_generation_prompt, **variables).ids(vocabulary)[0]

    def parts(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        mask: bool = True,
        num_given: int = 0,
        **variables: Any,
    ) -> Rendered:
        """A conversation in parts, those of the assistant marked.

        Args:
            messages, add_generation_prompt, variables: as in `render`.
            continue_final_message: end within the last message, for the model to continue it.
            mask: find the assistant's parts where the template does not mark them.
            num_given: messages at the beginning that are no one's answers, such as those of a prompt.

        Raises:
            BadMessages: as `render`; or the template does not say what the assistant's parts are, and it cannot be
                found.
        """
        given = checked_messages(messages)
        if continue_final_message:
            given[-1] = {**given[-1], "content": text_of(given[-1]["content"]) + CUT}
        text = self._rendered(given, add_generation_prompt, variables).partition(CUT)[0]
        if mask and BEGIN not in text and not self._marks_answers:
            text = self._marked(text, given, num_given, variables)
        elif mask and any(message["role"] == "assistant" for message in given[:num_given]):
            text = self._without_marks(text, given, num_given, variables)
        return Rendered(_parts(text), bool(self.stops) or EOS_MARK in self._after_answer)

    @cached_property
    def _probed(self) -> str:
        """A question and the answer `PROBE`, with the marks; empty where the template refuses them."""
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": PROBE}]
        try:
            return self._rendered(messages, False, {})
        except BadMessages:
            return ""

    @property
    def _after_answer(self) -> str:
        """What the template writes after an answer."""
        return self._probed.rpartition(PROBE)[2]

    @property
    def _marks_answers(self) -> bool:
        return BEGIN in self._probed

    def _without_marks(
        self, text: str, messages: list[dict[str, Any]], num_given: int, variables: dict[str, Any]
    ) -> str:
        """The text without the marks of answers among the given messages."""
        given = [{**message, "content": text_of(message["content"]) + CUT} for message in messages[:num_given]]
        before, *marked = text.split(BEGIN)
        again = self._rendered([*given, *messages[num_given:]], False, variables).split(BEGIN)[1:]
        if len(marked) != len(again):
            raise BadMessages(f"chat_template: '{self.name}' does not mark the answers of a prompt as it does others")
        is_given = [CUT in part.partition(END)[0] for part in again]
        pairs = zip(is_given, marked, strict=True)
        return before + "".join(part.replace(END, "") if given else BEGIN + part for given, part in pairs)

    def _marked(self, text: str, messages: list[dict[str, Any]], num_given: int, variables: dict[str, Any]) -> str:
        """The text with the assistant's parts between marks: what each answer adds to the prompt for it."""
        found, at = "", 0
        for number, message in enumerate(messages[num_given:], start=num_given):
            if message["role"] == "assistant":
                begin = self._rendered(messages[:number], True, variables)
                end = self._rendered(messages[: number + 1], False, variables)
                if not (text.startswith(end) and end.startswith(begin)):
                    raise BadMessages(
                        f"chat_template: '{self.name}' does not say what is the assistant's, and writes a turn in "
                        "another way once more follow; put {% generation %} and {% endgeneration %} around its answers"
                    )
                found, at = found + text[at : len(begin)] + BEGIN + text[len(begin) : len(end)] + END, len(end)
        return found + text[at:]

    def _rendered(self, messages: list[dict[str, Any]], add_generation_prompt: bool, variables: dict[str, Any]) -> str:
        clean = {name: _without_surrogates(value) for name, value in variables.items()}
        clean = {"tools": None, "documents": None, **clean}
        own = {"bos_token": BOS_MARK, "eos_token": EOS_MARK, "messages": messages}
        try:
            return write(self._compiled, {**clean, **own, "add_generation_prompt": add_generation_prompt})
        except Refused as error:
            raise BadMessages(f"chat_template: {error}") from None
        except Exception as error:  # whatever a template does
            raise BadMessages(f"chat_template: '{self.name}' fails: {type(error).__name__}: {error}") from None

    @property
    def _compiled(self) -> Any:
        return compile_template(self.source, self.name)


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as a template gets them: plain, and without the characters that mark things.

    Half a surrogate pair, which is no text, becomes U+FFFD.

    Raises:
        BadMessages: they are not messages.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise BadMessages(f"messages: {SHAPE}")
    found = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadMessages(f"{where} has no role; {SHAPE}")
        _check_content(message.get("content"), f"{where} ({message['role'][:20]})")
        found.append(_without_surrogates({name: value for name, value in message.items() if value is not None}))
    if not found:
        raise BadMessages(f"messages: it is empty; {SHAPE}")
    return found


def _check_content(content: Any, where: str) -> None:
    if isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise BadMessages(f"{where} has no content that is a text or a list of text parts")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise BadMessages(f"{where} has a part of its content that is no text{f' but {kind}' if kind else ''}")


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return SURROGATES.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_without_surrogates(name): _without_surrogates(inner) for name, inner in value.items()}
    return [_without_surrogates(inner) for inner in value] if isinstance(value, list | tuple) else value


def _parts(text: str) -> tuple[ChatPart, ...]:
    specials: dict[str, Special] = {BOS_MARK: "bos", EOS_MARK: "eos"}
    found, inside = [], False
    for piece in MARKS.split(text):
        if piece in (BEGIN, END):
            inside = piece == BEGIN
        elif piece in specials:
            found.append(ChatPart(b"", specials[piece], inside))
        elif piece and piece != CUT:
            found.append(ChatPart(to_bytes(piece), None, inside))
    return tuple(found)


DEFAULT_TEMPLATE = ChatTemplate(DEFAULT, "default")
