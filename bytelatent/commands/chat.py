"""A conversation with a model in the terminal, or through pipes."""

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bytelatent import terminal
from bytelatent.commands.chat_options import ChatSettings
from bytelatent.commands.generate import open_engine
from bytelatent.commands.options import default_model, model_named
from bytelatent.errors import Interrupted, UserError
from bytelatent.inference import Engine, Sampling
from bytelatent.inference.prefix_cache import PrefixCache
from bytelatent.signals import noting_interrupts, sigterm_interrupts
from bytelatent.text.chat import DEFAULT_TEMPLATE, BadMessages, ChatTemplate, checked_messages, text_of
from bytelatent.text.documents import json_value
from bytelatent.weights import open_pretrained

LOGGER = logging.getLogger(__name__)

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation, but for the system message",
    "/system TEXT": "set the system message, without TEXT remove it, and begin again",
    "/save FILE": "add the conversation to a file of JSONL, to train on",
    "/exit": "end; so do Ctrl-C and Ctrl-D",
}
HELP = (
    "\n".join(f"  {name:<14}{about}" for name, about in COMMANDS.items())
    + '\nA line that ends in \\ continues in the next one; """ begins and ends a message of several lines. Write // '
    "for / at the beginning of a message. Ctrl-C stops an answer and keeps its beginning."
)
PREFILL_CHUNK = 8192  # bytes of a prompt that are read before Ctrl-C is asked for again
PREFIX_CACHE_BYTES = 1 << 30  # for the states of what was read: each takes as much as the KV caches of its texts
MARK, MORE, SEVERAL = "> ", ". ", '"""'


def run(settings: ChatSettings) -> None:
    with sigterm_interrupts():
        settings = settings.model_copy(update={"model": model_named(settings) or default_model()})
        chat = open_chat(settings)
        if settings.as_json:
            _answer_rows(chat)
        elif sys.stdin.isatty():
            _talk(chat, settings.model)
        else:
            _answer_lines(chat)


@dataclass
class Chat:
    """A conversation with a model.

    Attributes:
        limit: ids of the prompt and the answer together.
        messages: all messages, the system message first.
        num_dropped: messages after the system message that the model does not read any more.
        ended: why the last answer ended: a `Reason`; `stopped` by Ctrl-C.
    """

    engine: Engine
    template: ChatTemplate
    sampling: Sampling
    max_new_bytes: int
    limit: int
    messages: list[dict[str, str]] = field(default_factory=list)
    num_dropped: int = 0
    ended: str = ""

    def reset(self, system: str | None) -> None:
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.num_dropped = 0

    @property
    def system(self) -> str | None:
        first = self.messages[0] if self.messages else {"role": ""}
        return first["content"] if first["role"] == "system" else None

    def answer(self, said: str) -> Iterator[str]:
        """What the model answers to a message, as it comes. Both are in `messages` afterwards.

        Ctrl-C ends the answer and keeps its beginning; a second one raises `Interrupted`.

        Raises:
            BadMessages: the template refuses the message, which is forgotten.
        """
        self.messages.append({"role": "user", "content": said})
        try:
            prompt = self._prompt()
        except BadMessages:
            self.messages.pop()
            raise
        [asked] = self.engine.submit(torch.from_numpy(prompt), self.sampling, self.max_new_bytes)
        with noting_interrupts() as pressed:
            try:
                while asked.ended is None and not pressed:
                    self.engine.advance()
                    if new := asked.new_text():
                        yield new
            finally:
                self.ended = "stopped" if asked.ended is None else asked.ended
                self.engine.cancel(asked)
                if asked.failure is None:
                    self.messages.append({"role": "assistant", "content": asked.text})
            if len(pressed) > 1:
                raise Interrupted
        if asked.failure is not None:
            raise asked.failure

    def _prompt(self) -> Any:
        """The ids of the conversation. Where they are too many, the oldest exchanges are dropped, with a warning."""
        system, others = self._system_and_others()
        room = max(self.limit - min(self.max_new_bytes, self.limit // 2), 1)
        dropped = self.num_dropped
        ids = self._ids([*system, *others[dropped:]])
        while len(ids) > room and (after := self._next_question(others, dropped)) is not None:
            dropped = after
            ids = self._ids([*system, *others[dropped:]])
        if dropped > self.num_dropped:
            LOGGER.warning(
                f"the conversation is longer than the context of {self.limit:,} {self.engine.vocabulary.unit}: the "
                f"oldest {dropped} messages are not read any more"
            )
            self.num_dropped = dropped
        if len(ids) > room:
            LOGGER.warning(f"this message alone is longer than fits the context of {self.limit:,}; answers may suffer")
        return ids

    def _ids(self, messages: list[dict[str, str]]) -> Any:
        return self.template.ids(messages, vocabulary=self.engine.vocabulary)

    def _system_and_others(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        begin = 0 if self.system is None else 1
        return self.messages[:begin], self.messages[begin:]

    @staticmethod
    def _next_question(others: list[dict[str, str]], dropped: int) -> int | None:
        """Where the next exchange begins; None at the end."""
        return next((n for n in range(dropped + 1, len(others)) if others[n]["role"] == "user"), None)


def open_chat(settings: ChatSettings) -> Chat:
    """Load a model for a conversation.

    Raises:
        UserError: there is no such model or template.
    """
    found = open_pretrained(settings.model, settings.entropy_model, weights=False)
    template = found.chat_template
    if settings.chat_template is not None:
        template = ChatTemplate.read(settings.chat_template, "--chat-template")
    elif template is None:
        template = DEFAULT_TEMPLATE
        LOGGER.warning(
            f"'{settings.model}' has no chat template, so it was hardly trained to answer; the default template is "
            "used. Another: --chat-template FILE"
        )
    sampling = settings.sampling.model_copy(update={"stop": [*settings.sampling.stop, *template.stops]})
    engine = open_engine(settings, 1)
    engine.serve(PREFILL_CHUNK, PrefixCache(PREFIX_CACHE_BYTES))  # a turn reads only what is new of the conversation
    chat = Chat(engine, template, sampling, settings.max_new_bytes, settings.context or found.config.context)
    chat.reset(settings.system)
    return chat


def _talk(chat: Chat, model: str) -> None:
    """With a person at a terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # lets `input` edit lines and go back to earlier ones
    terminal.print_line(f"{model}; /help lists the commands")
    while True:
        try:
            said = obeyed(chat, message_from(input), terminal.print_line)
        except (EOFError, KeyboardInterrupt):
            terminal.print_line("")
            return
        if said is None:
            continue
        try:
            for piece in chat.answer(said):
                terminal.print_line(piece, end="")
        except BadMessages as error:
            LOGGER.warning(error)
            continue
        terminal.print_line(" [stopped]" if chat.ended == "stopped" else "")
        _log_cut(chat)


def _answer_lines(chat: Chat) -> None:
    """Answer the messages of standard input, one a line."""
    with contextlib.suppress(EOFError):
        while True:
            said = obeyed(chat, message_from(lambda _: _next_line()), LOGGER.info)
            if said is not None:
                for piece in chat.answer(said):
                    terminal.print_line(piece, end="")
                terminal.print_line("")
                _log_cut(chat)


def _answer_rows(chat: Chat) -> None:
    """Answer the rows of JSON of standard input."""
    system = chat.system
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if not line.strip():
            continue
        said = _said_in(chat, line, f"standard input: line {number}", system)
        content = "".join(chat.answer(said))
        answer = {"role": "assistant", "content": content, "ended": chat.ended}
        terminal.print_line(json.dumps(answer, ensure_ascii=False))


def _said_in(chat: Chat, line: bytes, where: str, system: str | None) -> str:
    """The message of a row of JSON; a row of messages begins a conversation of its own, by default with `system`."""
    try:
        row = json_value(line)
    except ValueError as error:
        raise UserError(f'{where} is no JSON ({error}); write {{"content": "..."}}') from None
    if isinstance(row, dict) and "messages" in row:
        try:
            *before, last = checked_messages(row["messages"])
        except BadMessages as error:
            raise UserError(f"{where}: {error}") from None
        if last["role"] != "user":
            raise UserError(f"{where}: its last message is the {last['role'][:20]}'s; it should be the user's")
        chat.reset(system if not before or before[0]["role"] != "system" else None)
        chat.messages += [{"role": each["role"], "content": text_of(each["content"])} for each in before]
        return text_of(last["content"])
    if not isinstance(row, dict) or not isinstance(row.get("content"), str):
        raise UserError(f'{where} has no text under "content", and no "messages"')
    return row["content"]


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")


def _log_cut(chat: Chat) -> None:
    if chat.ended == "length":
        LOGGER.info(f"the answer was cut after {chat.max_new_bytes:,} bytes (--max-new-bytes)")


def message_from(read: Callable[[str], str]) -> str:
    """A message of one line, or of several; the end of the input ends it, too.

    Args:
        read: gives the next line, with a mark to show before it; raises EOFError at the end.
    """
    line = read(MARK)
    if line.lstrip().startswith(SEVERAL):
        lines = [line.lstrip().removeprefix(SEVERAL)]
        with contextlib.suppress(EOFError):
            while not lines[-1].rstrip().endswith(SEVERAL):
                lines.append(read(MORE))
        lines[-1] = lines[-1].rstrip().removesuffix(SEVERAL)
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        with contextlib.suppress(EOFError):
            lines.append(read(MORE))
    return "\n".join(lines)


def obeyed(chat: Chat, line: str, show: Callable[[str], Any]) -> str | None:
    """The message to answer; None where the line was empty or a command, which is obeyed.

    Raises:
        EOFError: the command ends the conversation.
    """
    if line.startswith("//"):
        return line[1:]
    if not line.startswith("/"):
        return line if line.strip() else None
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/exit", "/quit"):
        raise EOFError
    if name == "/help":
        show(HELP)
    elif name == "/reset":
        chat.reset(chat.system)
        show("the conversation begins again")
    elif name == "/system":
        chat.reset(argument or None)
        show("the conversation begins again" + ("" if argument else ", without a system message"))
    elif name == "/save":
        show(_saved(chat, argument))
    else:
        show(f"there is no command {terminal.one_line(name)}; /help lists them, and // begins a message with /")
    return None


def _saved(chat: Chat, path: str) -> str:
    """Add the conversation to a file of JSONL; what to say about it."""
    if not path:
        return "name the file: /save FILE"
    try:
        with Path(path).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": chat.messages}) + "\n")
    except (OSError, RuntimeError) as error:
        return f"'{terminal.one_line(path)}' cannot be written: {getattr(error, 'strerror', None) or error}"
    return f"{len(chat.messages)} messages added to '{terminal.one_line(path)}'"
