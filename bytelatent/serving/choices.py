"""The text of one choice as it comes, in whole characters, and what is known of each of its bytes."""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bytelatent.serving.answers import FinishReason, Plain
from bytelatent.vocab import BOE, BOS, BPE_DELIMITER, EOS, OFFSET

if TYPE_CHECKING:
    from bytelatent.serving.scheduler import Update

# As the tokenizer of `bytelatent.hf` writes them.
SPECIAL = {BOE: "<|pad|>", BOS: "<|begin|>", EOS: "<|end|>", BPE_DELIMITER: "<|delimiter|>"}
Alternatives = Sequence[tuple[int, float]]  # ids and their log-probabilities


@dataclass(frozen=True)
class ByteInfo:
    """A byte, its log-probability in nats, None where nothing is before it, the likeliest ids in its place, and whether
    it starts a patch.
    """

    byte: int
    log_probability: float | None
    alternatives: Alternatives
    starts: bool


@dataclass(frozen=True)
class TextPiece:
    """What is new of a choice: whole characters, and their bytes."""

    text: str
    bytes: list[ByteInfo]
    finish_reason: FinishReason | None = None


class ChoiceText:
    """Turns updates of a sample into pieces.

    A byte that is no part of a character shows as U+FFFD, once it is sure. All text of all pieces is that of all bytes
    at once.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._known: deque[ByteInfo | None] = deque()  # of bytes that are not yet released
        self._pending = b""
        self._num_echoed = 0  # of these, those of the prompt
        self.num_bytes = self.num_patches = 0
        self.ended = False

    def echo(self, data: bytes, infos: Sequence[ByteInfo], final: bool) -> TextPiece:
        """The prompt, which the text begins with. Its bytes are not counted.

        Args:
            infos: of each of its bytes, or none.
            final: whether nothing follows.
        """
        self._known += infos or [None] * len(data)
        self._num_echoed = len(data)
        return self._release(data, "length" if final else None)

    def take(self, updates: Iterable["Update"]) -> TextPiece:
        """What has become known by these updates, in order."""
        data, reason = b"", None
        for update in updates:
            alternatives: Sequence[Alternatives] = update.alternatives or [()] * len(update.ids)
            for id_, value, others, starts in zip(
                update.ids, update.log_probabilities, alternatives, update.starts, strict=True
            ):
                self._known.append(ByteInfo(id_ - OFFSET, value, others, starts))
            data += update.data
            reason = update.ended or reason
        return self._release(data, reason)

    def _release(self, data: bytes, reason: str | None) -> TextPiece:
        self.ended = self.ended or reason is not None
        text = self._decoder.decode(data, final=self.ended)
        self._pending += data
        size = len(self._pending) - (0 if self.ended else len(self._decoder.getstate()[0]))
        self._pending = self._pending[size:]
        released = [self._known.popleft() for _ in range(size)]
        num_echoed = min(self._num_echoed, size)
        self._num_echoed -= num_echoed
        self.num_bytes += size - num_echoed
        self.num_patches += sum(info.starts for info in released[num_echoed:] if info is not None)
        return TextPiece(text, [info for info in released if info is not None], _finish_reason(reason))


def _finish_reason(ended: str | None) -> FinishReason | None:
    if ended is None:
        return None
    return "length" if ended in ("length", "cancelled") else "stop"


def token(id_: int) -> str:
    """An id as text that is different for each one."""
    if id_ in SPECIAL:
        return SPECIAL[id_]
    byte = id_ - OFFSET
    return chr(byte) if byte < 0x80 else f"bytes:\\x{byte:02x}"


def token_bytes(id_: int) -> list[int] | None:
    return None if id_ in SPECIAL else [id_ - OFFSET]


def chat_logprobs(bytes: Sequence[ByteInfo], num_alternatives: int) -> Plain:
    """As of OpenAI's chat completions; a token is a byte."""
    content = []
    for info in bytes:
        id_ = info.byte + OFFSET
        top = [_top(*pair) for pair in info.alternatives[:num_alternatives]]
        content.append({**_top(id_, info.log_probability or 0.0), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _top(id_: int, log_probability: float) -> Plain:
    return {"token": token(id_), "logprob": log_probability, "bytes": token_bytes(id_)}


class CompletionLogprobsWriter:
    """Log-probabilities as of OpenAI's completions, piece by piece, with each byte's place in the whole text."""

    def __init__(self, num_alternatives: int):
        self.num_alternatives = num_alternatives
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_characters = 0

    def write(self, bytes: Sequence[ByteInfo]) -> Plain:
        tops: list[Any] = []
        for info in bytes:
            top = info.alternatives[: self.num_alternatives]
            tops.append(None if info.log_probability is None else {token(id_): value for id_, value in top})
        return {
            "tokens": [token(info.byte + OFFSET) for info in bytes],
            "token_logprobs": [info.log_probability for info in bytes],
            "top_logprobs": tops if self.num_alternatives else None,
            "text_offset": [self._offset(info.byte) for info in bytes],
            "bytes": [[info.byte] for info in bytes],
        }

    def _offset(self, byte: int) -> int:
        """The character that the next byte is in."""
        self._num_characters += len(self._decoder.decode(bytes([byte])))
        return self._num_characters - (not self._decoder.getstate()[0])


def byte_details(bytes: Sequence[ByteInfo]) -> Plain:
    """What `bytelatent: true` adds, see `ByteDetails`."""
    return {
        "bytes": [info.byte for info in bytes],
        "logprobs": [info.log_probability for info in bytes],
        "starts": [info.starts for info in bytes],
        "alternatives": [
            [(id_ - OFFSET if id_ >= OFFSET else None, value) for id_, value in info.alternatives] for info in bytes
        ],
    }
