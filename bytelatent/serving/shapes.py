"""What requests hold, as OpenAI's API names it, and our own additions.

A field nobody knows is an error. Fields of OpenAI's that would change the answer and that we have not are errors unless
their value changes nothing (`only`); fields that change nothing here are ignored (`Ignored`). docs/serve.md lists both.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from bytelatent.config import Settings, shorten
from bytelatent.vocab import VOCAB_SIZE

OTHER_MODES = ("space", "static:4", "byte")  # patching modes beside the model's own, where none are asked for
MAX_ALTERNATIVES = 20
MAX_STOPS = 16
LONGEST_STOP = 1024  # characters
MAX_PROMPTS = 1024
SURROGATE = re.compile("[\ud800-\udfff]")

Id = Annotated[int, Field(ge=0, lt=VOCAB_SIZE)]
Ids = Annotated[list[Id], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Ignored = Annotated[Any, Field(description="Ignored.")]


def only(*neutral: Any, way_out: str) -> Any:
    """A field that is not supported: it takes the values that change nothing."""
    return Field(default=neutral[0], description=f"Not supported; {way_out}.", json_schema_extra={"enum": [*neutral]})


def must_hold_characters(value: Any) -> Any:
    """Refuse half of a surrogate pair, in a text or within lists and objects."""
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, str) and (found := SURROGATE.search(inner)):
            where = f"{found[0]!a} at character {found.start() + 1}"
            raise ValueError(f"{where} is half of a surrogate pair; write the whole character")
        if isinstance(inner, dict):
            waiting += [*inner, *inner.values()]
        elif isinstance(inner, list):
            waiting += inner
    return value


class Body(Settings):
    """A JSON object: strict types, no unknown fields."""

    model_config = ConfigDict(strict=True)

    @field_validator("*")
    @classmethod
    def _holds_characters(cls, value: Any) -> Any:
        return must_hold_characters(value)

    @field_validator("*")
    @classmethod
    def _is_supported(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if isinstance(field.json_schema_extra, dict):
            neutral: Any = field.json_schema_extra["enum"]
            if isinstance(value, bool) or value not in neutral:
                about = str(field.description)
                raise ValueError(f"{shorten(repr(value))} is {about[:1].lower()}{about[1:-1]}")
        return value


def _in_one_line(value: Any, handler: ValidatorFunctionWrapHandler, kinds: str) -> Any:
    """A field of several kinds, whose error is not that of each kind."""
    must_hold_characters(value)
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(f"it takes {kinds}, not {shorten(repr(value))}") from None


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationBody(Body):
    """What both ways to generate share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    valid_utf8: bool | None = None
    bytelatent: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    presence_penalty: Any = only(None, 0, way_out="leave it out, or set repetition_penalty")
    frequency_penalty: Any = only(None, 0, way_out="leave it out, or set repetition_penalty")
    logit_bias: Any = only(None, {}, way_out="leave it out")
    user: Ignored = None

    @field_validator("stop", mode="wrap")
    @classmethod
    def _texts(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return _in_one_line(
            value, handler, f"a text, or up to {MAX_STOPS} of them, of 1 to {LONGEST_STOP:,} characters"
        )

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: it goes with stream=true; leave it out")
        return self

    @property
    def num_samples(self) -> int:
        return self.n or 1

    @property
    def length_field(self) -> str:
        return "max_tokens"

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(GenerationBody):
    """Continue a text, or each of several."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None

    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: Any = only(None, "", way_out="leave it out")

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _texts_or_ids(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        return _in_one_line(value, handler, f"a text, ids from 0 to {VOCAB_SIZE - 1}, or a list of such prompts")

    @model_validator(mode="after")
    def _best_of_all(self) -> Self:
        if self.best_of not in (None, self.num_samples):
            raise ValueError(
                "best_of: it is not supported; leave it out, and choose among the n texts by their logprobs"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 gives nothing without echo=true; give at least 1")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return list(self.prompt)  # pyright: ignore[reportReturnType]


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """A message of a chat. What an answer of ours holds may be sent back as it is."""

    role: Literal["system", "developer", "user", "assistant"]
    name: Ignored = None
    refusal: Any = only(None, way_out="leave it out")
    audio: Any = only(None, way_out="there is only text here; leave it out")
    annotations: Any = only(None, [], way_out="leave it out")
    function_call: Any = only(None, way_out="there are no functions; leave it out")
    tool_calls: Any = only(None, [], way_out="there are no tools; leave it out")
    content: str | Annotated[list[TextPart], Field(min_length=1)]  # after those that explain why it is null

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationBody):
    """Answer a chat."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_ALTERNATIVES)] | None = None

    tools: Any = only(None, [], way_out="there are no tools; leave it out")
    tool_choice: Any = only(None, "none", "auto", way_out="there are no tools; leave it out")
    functions: Any = only(None, [], way_out="there are no functions; leave it out")
    function_call: Any = only(None, "none", "auto", way_out="there are no functions; leave it out")
    modalities: Any = only(None, ["text"], way_out="there is only text here; leave it out")
    audio: Any = only(None, way_out="there is only text here; leave it out")
    web_search_options: Any = only(None, way_out="there is no search here; leave it out")
    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning_effort: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    verbosity: Ignored = None

    @model_validator(mode="after")
    def _alternatives_of_what_is_shown(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: it goes with logprobs=true; set that, or leave it out")
        return self

    @property
    def length_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def max_new_bytes(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class PatchesRequest(Body):
    """Where patches begin in a text."""

    text: str
    model: str | None = None
    modes: Annotated[list[Annotated[str, Field(max_length=100)]], Field(max_length=16)] | None = None
    threshold: float | None = None
    patches: bool | None = None


class ScoreRequest(Body):
    """How well the model predicts texts."""

    texts: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    model: str | None = None
    log_probabilities: bool | None = None
    end: bool | None = None


class TokenizeRequest(Body):
    """The ids of a text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Body):
    """The text of ids."""

    tokens: list[Id]
    model: str | None = None
