"""How a `BLT` continues texts."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bytelatent.blt.core import Core
from bytelatent.blt.forward import Text, Texts, as_list
from bytelatent.config import renamed_arguments
from bytelatent.errors import UserError
from bytelatent.inference import Engine, Sampling, prompt_ids
from bytelatent.inference.constraint import Constraint
from bytelatent.inference.continuation import Continuation, Reason
from bytelatent.inference.settings import check_limits
from bytelatent.inference.step import engine_for

MAX_BATCH_SIZE = 64  # sequences that `generate` decodes at once; further ones wait
MAX_CONTINUATIONS = 1_000_000  # of all prompts of a call with `samples`
HINTS = {  # arguments of transformers' `generate`, and ours
    "max_new_tokens": "write max_new_bytes=; bytes are the unit here",
    "max_length": "write max_new_bytes=, which counts without the prompt",
    "do_sample": "leave it out; temperature=0 takes the likeliest byte, any other samples",
    "num_return_sequences": "write samples=",
    "stop_strings": "write stop=",
    "num_beams": "leave it out; there is no beam search",
    "streamer": "leave it out; blt.stream gives the text as it comes",
}


@dataclass(frozen=True)
class GeneratedText:
    """A continuation with its log-probabilities.

    Attributes:
        text: with U+FFFD for bytes that are not UTF-8.
        ids: what was drawn, a stop text and EOS included.
        log_probabilities: float32 nats, of each of `ids`: the model's own, whatever was sampled with.
        ended: why nothing more came.
    """

    text: str
    ids: Tensor
    log_probabilities: Tensor
    ended: Reason | None

    @classmethod
    def of(cls, which: Continuation) -> "GeneratedText":
        return cls(which.text, torch.tensor(which.ids), torch.tensor(which.log_probabilities), which.ended)


@dataclass(frozen=True)
class Request:
    """A prompt and how it is continued."""

    ids: Tensor
    sampling: Sampling
    max_new_bytes: int


class Generating(Core):
    @renamed_arguments(num_rows="batch_size")
    def engine(self, batch_size: int = 16, varies: bool = False) -> Engine:
        """Continuous batching: up to `batch_size` sequences are decoded at once, and join and leave at any time.

        Args:
            varies: whether there are often fewer; then steps are faster, and their caches take more memory.
        """
        return engine_for(
            self.model,
            self.patching,
            self.needed_entropy_model(),
            batch_size,
            varies=varies,
            kv_cache=self.kv_cache,
        )

    @overload
    def generate(
        self,
        prompt: Text | Texts,
        max_new_bytes: int | list[int] = ...,
        samples: int | None = ...,
        *,
        return_log_probabilities: Literal[True],
        **sampling: Any,
    ) -> Any: ...
    @overload
    def generate(self, prompt: Text, max_new_bytes: int = ..., samples: None = ..., **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: Text, max_new_bytes: int = ..., samples: int = ..., **sampling: Any) -> list[str]: ...
    @overload
    def generate(
        self, prompt: Texts, max_new_bytes: int | list[int] = ..., samples: None = ..., **sampling: Any
    ) -> list[str]: ...
    @overload
    def generate(
        self, prompt: Texts, max_new_bytes: int | list[int] = ..., samples: int = ..., **sampling: Any
    ) -> list[list[str]]: ...
    def generate(
        self,
        prompt: Text | Texts,
        max_new_bytes: int | list[int] = 200,
        samples: int | None = None,
        *,
        return_log_probabilities: bool = False,
        schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        **sampling: Any,
    ) -> Any:
        """Continue a text, or several at once; each result is the same as for the text alone.

        Args:
            max_new_bytes: largest number of new bytes; the model may end the text earlier.
            samples: number of continuations of each prompt; the result then is a list for each prompt.
            return_log_probabilities: give a `GeneratedText` for each continuation in place of its text.
            schema, regex, grammar: one of them, which every continuation must meet: a JSON schema (a dict, its JSON, or
                a pydantic model), a regular expression, or a grammar. One that is cut at `max_new_bytes` may not.
            sampling: fields of `Sampling`, such as `temperature` (0.8; 0 takes the most likely byte), `top_p`, `seed`
                (0; None for a random one) and `stop` (texts that end it). With several prompts each of them, and
                `max_new_bytes`, may be a list with a value for each prompt; `stop` a list of lists.

        Returns:
            The continuation of each prompt, with U+FFFD for bytes that are not UTF-8.

        Raises:
            UserError: a sampling setting is not valid, a prompt is neither str nor bytes, or the schema, expression or
                grammar is not supported or cannot be met.
        """
        num_samples = 1 if samples is None else samples
        constraint = Constraint.of(schema=schema, regex=regex, grammar=grammar)
        requests = _requests("generate", prompt, max_new_bytes, sampling)
        check_limits(samples=num_samples)
        if num_samples * len(requests) > MAX_CONTINUATIONS:
            asked = f"{num_samples:,} of each of {len(requests):,} prompts"
            raise UserError(f"samples: {asked}; a call gives at most {MAX_CONTINUATIONS:,} texts")
        with self._borrowed_engine(max(min(len(requests) * num_samples, MAX_BATCH_SIZE), 1)) as engine:
            asked = [
                engine.submit(each.ids, each.sampling, each.max_new_bytes, num_samples, constraint=constraint)
                for each in requests
            ]
            engine.run()
        for continuation in chain(*asked):
            _raise_failure(continuation)
        result = GeneratedText.of if return_log_probabilities else lambda which: which.text
        found: list[Any] = [[result(continuation) for continuation in continuations] for continuations in asked]
        found = found if samples is not None else [only for [only] in found]
        return found[0] if isinstance(prompt, str | bytes) else found

    @overload
    def stream(self, prompt: Text, max_new_bytes: int = ..., **sampling: Any) -> Iterator[str]: ...
    @overload
    def stream(
        self, prompt: Texts, max_new_bytes: int | list[int] = ..., **sampling: Any
    ) -> Iterator[tuple[int, str]]: ...
    def stream(
        self,
        prompt: Text | Texts,
        max_new_bytes: int | list[int] = 200,
        *,
        schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        **sampling: Any,
    ) -> Iterator[Any]:
        """Continue a text piece by piece, in whole characters; the arguments are those of `generate`.

        With several prompts, pairs of a prompt's index and what is new of its continuation, as they come.
        """
        constraint = Constraint.of(schema=schema, regex=regex, grammar=grammar)
        requests = _requests("stream", prompt, max_new_bytes, sampling)
        self.needed_entropy_model()
        is_one = isinstance(prompt, str | bytes)

        def pieces() -> Iterator[Any]:  # a separate function, so that `stream` itself raises errors at once
            with self._borrowed_engine(max(min(len(requests), MAX_BATCH_SIZE), 1)) as engine:
                asked = [
                    engine.submit(each.ids, each.sampling, each.max_new_bytes, constraint=constraint)[0]
                    for each in requests
                ]
                index = {id(which): number for number, which in enumerate(asked)}
                try:
                    while not engine.is_idle:
                        for which in engine.advance():
                            if new := which.new_text():
                                yield new if is_one else (index[id(which)], new)
                            _raise_failure(which)
                finally:  # the caller may stop early
                    for which in asked:
                        if which.ended is None:
                            engine.cancel(which)

        return pieces()

    @contextmanager
    def _borrowed_engine(self, batch_size: int) -> Iterator[Engine]:
        """The engine of the last call if it fits and no other thread has it: its captured step can be reused."""
        parts = [self.model, *([self.entropy_model] if self.entropy_model is not None else [])]
        weights = [weight for part in parts for weight in part.parameters()]
        # Weights that were made in inference mode do not tell whether they have changed.
        state = [(each.data_ptr(), object() if each.is_inference() else each._version) for each in weights]
        key = (batch_size, self.kv_cache, self.patching, state)
        idle, self._idle_engine = self._idle_engine, None
        engine = idle[1] if idle is not None and idle[0] == key else self.engine(batch_size)
        yield engine
        if engine.is_idle:
            self._idle_engine = (key, engine)


def _raise_failure(which: Continuation) -> None:
    """Raise what a sequence failed with, as where its constraint left nothing to draw."""
    if which.failure is not None:
        raise which.failure


def _requests(name: str, prompt: Text | Texts, max_new_bytes: Any, sampling: dict[str, Any]) -> list[Request]:
    """The prompts, each with its settings.

    Raises:
        UserError: a setting is unknown or not valid, or a list of them has another length than the prompts.
    """
    if name == "stream" and "samples" in sampling:
        raise UserError("samples: stream gives one continuation of a prompt; use generate, or give the prompt again")
    for key in sampling.keys() & HINTS.keys():
        raise UserError(f"{name}: {key} is a name of transformers; {HINTS[key]}")
    is_one = isinstance(prompt, str | bytes)
    prompts = [prompt_ids(text) for text in as_list(prompt)]
    given = {**sampling, "max_new_bytes": max_new_bytes}
    several = {key: values for key, values in given.items() if _is_for_each(key, values)}
    for key, values in several.items():
        if is_one or len(values) != len(prompts):
            count = "1 prompt" if len(prompts) == 1 else f"{len(prompts):,} prompts"
            raise UserError(f"{key}: a list of {len(values):,} for {count}; give one value, or one for each prompt")
    differ = several or given.get("seed", 0) is None
    shared = None if differ else Sampling.parse(sampling, where=name)
    found = []
    for number, ids in enumerate(prompts):
        own = {key: several[key][number] if key in several else value for key, value in given.items()}
        size = own.pop("max_new_bytes")
        check_limits(max_new_bytes=size)
        if own.get("seed", 0) is None:
            own["seed"] = secrets.randbits(63)
        found.append(Request(ids, shared or Sampling.parse(own, where=name), size))
    return found


def _is_for_each(key: str, values: Any) -> bool:
    """Whether values are one for each prompt; a list of stop texts is one value."""
    if not isinstance(values, list | tuple):
        return False
    return key != "stop" or any(isinstance(value, list | tuple) for value in values)
