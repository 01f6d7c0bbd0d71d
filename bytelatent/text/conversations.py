"""Rows that hold conversations: `messages`, as OpenAI and TRL have them, or TRL's `prompt` and `completion`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bytelatent.text.chat import SURROGATES, BadMessages, ChatPart, ChatTemplate, Message, Rendered, checked_messages
from bytelatent.vocab import BYTES, Vocabulary, to_bytes

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
SYSTEM = ("system", "developer")
TEXT_KEY = "text"  # the default of the setting; conversations have other keys

TrainOn = Literal["assistant", "all"]


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are read.

    Attributes:
        template: writes their messages.
        train_on: `assistant`: its answers count in the loss; `all`: every byte does.
    """

    template: ChatTemplate
    train_on: TrainOn = "assistant"

    def render(self, messages: Sequence[Message], num_given: int) -> Rendered:
        """A conversation.

        Raises:
            BadMessages: as `ChatTemplate.parts`.
        """
        is_marked = self.train_on == "assistant"
        return self.template.parts(messages, mask=is_marked, num_given=num_given)


@dataclass(frozen=True)
class Conversation:
    """A conversation as one document, or as several that each fit a context.

    Attributes:
        rendered: all of it.
        messages: none where it was a prompt and a completion in plain text.
        num_given: messages of the prompt, none of which counts.
    """

    rendered: Rendered
    options: ChatOptions
    messages: tuple[Message, ...] = ()
    num_given: int = 0

    def within(self, size: int, vocabulary: Vocabulary = BYTES) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The ids of a document, BOS to EOS, and which of them count; of several, where it has more than `size + 1`.

        Each of several begins with the system message and ends after an answer. Every answer that counts is in one of
        them, a question after the last answer in none. One exchange that is longer than `size` stays whole.
        """
        whole = self._ids(self.rendered, vocabulary)
        if len(whole[0]) <= size + 1 or not self.messages:
            yield whole
            return
        begin = int(self.messages[0]["role"] in SYSTEM)
        system, window, num_given = self.messages[:begin], [], self.num_given
        best = None
        for exchange in self._exchanges(begin):
            found = self._window([*system, *window, *exchange], num_given, vocabulary)
            if best is not None and len(found[0]) > size + 1:
                yield best
                window, num_given = [], 0
                found = self._window([*system, *exchange], num_given, vocabulary)
            window, best = [*window, *exchange], found
        yield best or whole

    def _exchanges(self, begin: int) -> Iterator[Sequence[Message]]:
        """The messages from `begin` on, up to each answer that counts."""
        for number in range(max(begin, self.num_given), len(self.messages)):
            if self.messages[number]["role"] == "assistant":
                yield self.messages[begin : number + 1]
                begin = number + 1

    def _window(
        self, messages: Sequence[Message], num_given: int, vocabulary: Vocabulary
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._ids(self.options.render(messages, num_given), vocabulary)

    def _ids(self, rendered: Rendered, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
        ids, counts = rendered.ids(vocabulary, eos=True)
        return ids, np.ones(len(ids), bool) if self.options.train_on == "all" else counts


def conversation_of(row: Mapping[str, Any], text_key: str, options: ChatOptions) -> Conversation | None:
    """The conversation in a row; None where it has no key of one.

    Args:
        text_key: the key of the messages; `text`, the setting's default, is `messages`.

    Raises:
        BadMessages: it is no conversation, or holds nothing to train on.
    """
    key = MESSAGES if text_key == TEXT_KEY else text_key
    if row.get(key) is not None:
        given = _checked(row[key], key)
        return _trained(Conversation(options.render(given, 0), options, given))
    prompt, completion = row.get(PROMPT), row.get(COMPLETION)
    if prompt is None or completion is None:
        return None
    if isinstance(prompt, str) and isinstance(completion, str):
        _ = _clean(prompt, PROMPT), _clean(completion, COMPLETION)
        parts = ChatPart(to_bytes(prompt), None, False), ChatPart(to_bytes(completion), None, True)
        return Conversation(Rendered(parts, ends_by_itself=False), options)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise BadMessages("its prompt and completion should both be texts, or both lists of messages")
    messages = (*_checked(prompt, PROMPT), *_checked(completion, COMPLETION))
    num_given = len(prompt)
    return _trained(Conversation(options.render(messages, num_given), options, messages, num_given))


def _checked(messages: Any, key: str) -> tuple[Message, ...]:
    return tuple(checked_messages(_clean(messages, key)))


def _clean(value: Any, key: str) -> Any:
    """The value, if all in it is text."""
    texts = [value]
    while texts:
        found = texts.pop()
        if isinstance(found, str) and SURROGATES.search(found):
            raise BadMessages(f"its {key} holds bytes that are not UTF-8, or half a surrogate pair; mend or remove it")
        if isinstance(found, Mapping):
            texts += found.values()
        elif isinstance(found, list | tuple):
            texts += found
    return value


def _trained(conversation: Conversation) -> Conversation:
    is_answered = any(part.is_assistant for part in conversation.rendered.parts)
    if conversation.options.train_on == "assistant" and not is_answered:
        raise BadMessages("it holds no answer of the assistant to train on")
    return conversation
