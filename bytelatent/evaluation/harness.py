"""The model class of lm-evaluation-harness for all models of this package, straight on bytes.

    lm_eval --model bytelatent --model_args pretrained=runs/demo --tasks hellaswag

Context and continuation are joined as bytes: no token lies across their boundary, and nothing is moved from one to the
other. (For a token LM, they are joined and divided as lm-eval's own class for transformers does it.) A context begins
with BOS; an empty one is BOS alone. Of what is longer than `max_length`, the newest ids count, as in that class. No
text's end is scored.

This module needs lm_eval, and is imported only where that is wanted.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import groupby
from typing import Any, BinaryIO

import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]  # else its own models would be unknown
import torch
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from torch import Tensor

from bytelatent.device import choose_device, precision_of_weights
from bytelatent.errors import UserError, nearest
from bytelatent.evaluation.load import state_of
from bytelatent.inference import Engine, Sampling
from bytelatent.inference.quantize import check_quantize
from bytelatent.inference.scoring import scored_pairs
from bytelatent.inference.settings import MAX_BATCH_SIZE, Quantization, check_limits
from bytelatent.inference.step import engine_for
from bytelatent.progress import Progress
from bytelatent.vocab import Vocabulary
from bytelatent.weights import Pretrained, open_pretrained

LOGGER = logging.getLogger(__name__)

BATCH_ON_GPU, BATCH_ELSEWHERE = 64, 16  # texts that are continued at once
MAX_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
DEFAULT_MAX_NEW = 256
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
WITHOUT_EFFECT = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # values that other programs write for no setting
MADE_WITH = {"model", "max_length", "seed"}  # the least that answers depend on
KNOWN = {*MAX_NEW, *SAMPLING, "until", "do_sample"}

Arguments = tuple[Any, ...]
Answers = Iterator[tuple[int, Any]]  # the number of a request and its answer, as they become known


class StoredAnswers:
    """Answers that are kept in a file as they come, so that an interrupted evaluation resumes.

    Args:
        lines: what the file holds.
        file: takes new lines.
        made_with: what the answers depend on.

    Raises:
        UserError: the file is not one of answers, or they were made with something else.
    """

    def __init__(self, lines: Iterable[bytes], file: BinaryIO, made_with: dict[str, Any], name: str):
        self._file = file
        first, *rest = self.read(lines, name) or [{}]
        if not rest:
            file.truncate(0)
            self._write(made_with)
        for key, value in made_with.items():
            if rest and first.get(key) != value:
                raise UserError(
                    f"out: '{name}' was begun with {key}={first.get(key)}, not {value}; to start over, move it away"
                )
        self._known = {key: answer for line in rest for key, answer in line.items()}

    @staticmethod
    def read(lines: Iterable[bytes], name: str) -> list[dict[str, Any]]:
        """What the answers in such a file were made with, and each answer; a last line without end is left out.

        Raises:
            UserError: it is another file.
        """
        every = list(lines)
        found = [_object(line) for number, line in enumerate(every) if number == 0 or line.endswith(b"\n")]
        if found and not (found[0].keys() >= MADE_WITH and all(len(answer) == 1 for answer in found[1:])):
            raise UserError(f"out: '{name}' is in the way: it holds no answers to tasks; move it away")
        return found

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> Any:
        return self._known.get(key)

    def put(self, key: str, answer: Any) -> None:
        self._known[key] = answer
        self._write({key: answer})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")


@register_model("bytelatent")
class HarnessModel(LM):
    """A BLT, a byte LM or a token LM for lm-evaluation-harness.

    Args:
        pretrained: a run; a folder, or OWNER/NAME on the hub, in our format, Meta's or transformers'.
        entropy_model: the byte LM that finds patches, if it is not with the model.
        device: `auto`, `cpu`, `cuda`, `mps`; `cuda:0`, lm_eval's own default, means `auto`.
        dtype: precision of the weights: `auto` (as stored), `float32` or `bfloat16`.
        batch_size: texts that are continued at once. Default: chosen for the device. Scoring has batches of its own.
        max_length: ids that the model reads at once. Default: its context in training.
        quantize: `int8` or `fp8` quantizes the large matrices.
        seed: of sampling.
        threshold: of patches by entropy, in nats. Default: the model's own.
        revision: a branch, a tag or a commit of the repository.

    Raises:
        UserError: there is no such model, or an argument is not known or not valid.
    """

    def __init__(
        self,
        pretrained: str,
        entropy_model: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        quantize: Quantization = "full",
        seed: int = 0,
        revision: str | None = None,
        threshold: float | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            names = [name for name in HarnessModel.__init__.__annotations__ if name not in ("unknown", "return")]
            hint = nearest(next(iter(unknown)), names)
            raise UserError(f"model_args: '{next(iter(unknown))}' is unknown; use {', '.join(names)}{hint}")
        self._device = choose_device("auto" if device in (None, "cuda:0") else device)
        self._precision, self._quantize, self._seed = precision_of_weights(dtype), quantize, seed
        check_quantize(quantize, self._device)
        self.batch_size = _batch_size(batch_size, max_batch_size, self._device)
        found = open_pretrained(pretrained, entropy_model, None if revision is None else str(revision))
        self._found = found.with_threshold(threshold)
        self._patching = self._found.config.patching
        if self._patching is not None and self._patching.needs_entropies and self._found.byte_lm is None:
            raise UserError(f"model_args: the patches of '{pretrained}' need a byte LM; add entropy_model=FOLDER")
        self.max_length = self._found.config.context if max_length is None else int(max_length)
        check_limits(context=self.max_length)
        self.stored: StoredAnswers | None = None

    @property
    def eot_token_id(self) -> int:
        return self._vocabulary.eos

    @property
    def max_gen_toks(self) -> int:
        return DEFAULT_MAX_NEW

    @cached_property
    def _loaded(self) -> Pretrained:
        """The model; loaded when it is first needed, so that bad tasks are reported before."""
        LOGGER.info(self._found.in_a_line())
        return self._found.load(self._device, self._precision)

    @property
    def _vocabulary(self) -> Vocabulary:
        return self._loaded.vocabulary

    @cached_property
    def _engine(self) -> Engine:
        # Entropies in float32, however the byte LM is stored: the same patches as those of `BLT`.
        byte_lm = self._loaded.byte_lm.to(torch.float32) if self._loaded.byte_lm is not None else None
        model, more = self._loaded.model, {"quantize": self._quantize, "vocabulary": self._vocabulary}
        return engine_for(model, self._patching, byte_lm, self.batch_size, **more)

    def made_with(self) -> dict[str, Any]:
        """What answers depend on, beside the requests."""
        folders = [part.folder for part in (self._found, self._found.byte_lm) if part is not None]
        about = {"model": state_of(folders), "max_length": self.max_length, "seed": self._seed}
        about |= {"threshold": self._patching.threshold} if self._patching is not None else {}
        patching = None if self._patching is None else self._patching.in_words()
        return {**about, "dtype": str(self._precision), "quantize": self._quantize, "patching": patching}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation after its context: log P in nats, and whether greedy decoding would write it."""

        def answers(asked: list[Arguments]) -> Answers:
            for number, score in scored_pairs(self._engine.decoder, [self._pair(*pair) for pair in asked]):
                yield number, (self._finite(score.log_probability), score.is_greedy)

        return [(value, greedy) for value, greedy in self._answered("loglikelihood", requests, answers)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """log P of each text in nats, in windows of `max_length` that do not overlap.

        Each byte is predicted once. The first window begins with BOS, and each later one with the id before it; the
        last one is moved back, so that it is full.
        """

        def answers(asked: list[Arguments]) -> Answers:
            windows = [(number, *window) for number, (text,) in enumerate(asked) for window in self._windows(text)]
            left = [0] * len(asked)
            for number, _, _ in windows:
                left[number] += 1
            yield from ((number, 0.0) for number, count in enumerate(left) if count == 0)
            totals = [0.0] * len(asked)
            pairs = [(context, text) for _, context, text in windows]
            for which, score in scored_pairs(self._engine.decoder, pairs):
                number = windows[which][0]
                totals[number] += self._finite(score.log_probability)
                left[number] -= 1
                if left[number] == 0:
                    yield number, totals[number]

        return self._answered("loglikelihood_rolling", requests, answers)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of the texts `until`, the end of the text, or `max_gen_toks` ids.

        A request that is repeated is sampled with one seed after another.
        """

        def answers(asked: list[Arguments]) -> Answers:
            longest = int(self._vocabulary.id_bytes.max())  # of an id: the engine's limit is of bytes
            waiting: dict[int, tuple[int, int]] = {}  # the number and the limit of each continuation, by its identity
            for (context, values, first), group in _runs(asked):
                sampling, max_new = self._sampling(json.loads(values))
                sampling = sampling.model_copy(update={"seed": self._seed + first})
                prompt = self._prompt(context, max_new)
                submitted = self._engine.submit(prompt, sampling, max_new * longest, len(group))
                waiting |= {id(each): (number, max_new) for each, number in zip(submitted, group, strict=True)}
            while not self._engine.is_idle:
                for continuation in self._engine.advance():
                    number, max_new = waiting[id(continuation)]
                    if len(continuation.ids) >= max_new:
                        self._engine.cancel(continuation)
                    if continuation.ended is not None:
                        yield number, continuation.text

        return self._answered("generate_until", requests, answers)

    def _answered(self, kind: str, requests: list[Any], answers: Callable[[list[Arguments]], Answers]) -> list[Any]:
        """The answers to requests, in their order: those that are stored, and of the others what `answers` gives.

        Args:
            answers: takes the arguments of each request, and last how many equal ones came before, if that counts.
        """
        found: list[Any] = [None] * len(requests)
        occurrences: dict[str, int] = {}
        keys, asked = [], []
        for request in requests:
            own = json.dumps([kind, *request.args], default=str)
            occurrence = occurrences.get(own, 0)
            occurrences[own] = occurrence + 1
            keys.append(hashlib.sha256(f"{own} {occurrence}".encode("utf-8", "surrogatepass")).hexdigest())
            asked.append((*request.args, occurrence) if kind == "generate_until" else request.args)
        missing = []
        for number, key in enumerate(keys):
            found[number] = None if self.stored is None else self.stored.get(key)
            if found[number] is None:
                missing.append(number)
        if self.stored is not None and len(missing) < len(requests):
            LOGGER.info(f"{len(requests) - len(missing):,} of {len(requests):,} answers are stored; resuming")
        with Progress(kind.split("_")[0], len(missing), unit="requests") as progress:
            for index, answer in answers([asked[number] for number in missing]):
                number = missing[index]
                found[number] = answer
                if self.stored is not None:
                    self.stored.put(keys[number], answer)
                self.cache_hook.add_partial(kind, requests[number].args, answer)
                progress.advance(1)
        return found

    def _pair(self, context: str, continuation: str) -> tuple[Tensor, Tensor]:
        """The ids of a context and of what may follow it, the newest ones that fit."""
        encode = self._vocabulary.encode
        if self._vocabulary.is_tokens and context:
            words = context.rstrip()
            context, continuation = words, context[len(words) :] + continuation
            before = encode(context, eos=False)
            following = encode(context + continuation, eos=False)[len(before) :]
        else:
            before, following = encode(context, eos=False), encode(continuation, bos=False, eos=False)
        if len(following) > self.max_length:
            asked = f"a continuation has {len(following):,} ids and {self.max_length:,} fit"
            raise UserError(f"max_length: {asked}; give a larger one (--context)")
        return torch.from_numpy(before[-(self.max_length + 1 - len(following)) :]), torch.from_numpy(following)

    def _windows(self, text: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs of ids by whose scores a text is scored."""
        ids = self._vocabulary.encode(text, bos=False, eos=False).tolist()
        for window in get_rolling_token_windows(ids, self._vocabulary.bos, self.max_length, context_len=1):
            context, following = make_disjoint_window(window)
            yield torch.tensor(context), torch.tensor(following)

    def _prompt(self, context: str, max_new: int) -> Tensor:
        """The newest ids of a context that leave space for `max_new` more."""
        if max_new >= self.max_length:
            raise UserError(
                f"max_gen_toks: {max_new:,} leave no space for a prompt in max_length={self.max_length:,}; "
                "give a smaller number, or a larger max_length (--context)"
            )
        return torch.from_numpy(self._vocabulary.encode(context, eos=False)[-(self.max_length - max_new) :])

    def _sampling(self, given: dict[str, Any]) -> tuple[Sampling, int]:
        """Settings of generation, and the largest number of new bytes, from those of a task."""
        for name in given.keys() - KNOWN:
            LOGGER.warning(f"generation_kwargs: '{name}' is no setting here and has no effect")
        until = given.get("until") or []
        stop = [text for text in (until if isinstance(until, list | tuple) else [until]) if text]
        limit = next((name for name in MAX_NEW if given.get(name) is not None), MAX_NEW[0])
        max_new = DEFAULT_MAX_NEW if given.get(limit) is None else _count(limit, given[limit])
        values = {name: given[name] for name in SAMPLING if given.get(name) is not None}
        values = {name: value for name, value in values.items() if WITHOUT_EFFECT.get(name, "") != value}
        if given.get("do_sample") is False:
            values["temperature"] = 0.0
        values.setdefault("temperature", 1.0 if given.get("do_sample") else 0.0)
        return Sampling.parse({**values, "stop": stop}, where="generation_kwargs"), max_new

    def _finite(self, log_probability: float) -> float:
        if math.isnan(log_probability):
            raise UserError(f"'{self._found.source}' gives a log-probability of NaN; its weights are corrupt")
        return log_probability


def _object(line: bytes) -> dict[str, Any]:
    """A line of JSON; empty if it holds no object."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _count(name: str, given: Any) -> int:
    """A whole number of a task file, which may be a text."""
    with suppress(ValueError, TypeError, OverflowError):
        if not isinstance(given, bool) and int(given) == float(given) > 0:
            return int(given)
    raise UserError(f"generation_kwargs: {name} is {given!r}; give a whole number above 0 in the task's file")


def _batch_size(given: int | str | None, most: int | None, device: torch.device) -> int:
    """lm_eval also gives `auto`, or a text."""
    default = BATCH_ON_GPU if device.type == "cuda" else BATCH_ELSEWHERE
    text = str(default if given is None or str(given).startswith("auto") else given)
    if not text.isdigit() or not 1 <= int(text) <= MAX_BATCH_SIZE:
        raise UserError(f"batch_size: '{given}' is not a number from 1 to {MAX_BATCH_SIZE:,}, or auto")
    return min(int(text), most or MAX_BATCH_SIZE)


def _runs(asked: list[Arguments]) -> Iterator[tuple[tuple[str, str, int], list[int]]]:
    """Equal requests that follow one another: the context, its settings, the first occurrence; and their numbers.

    Args:
        asked: of each request the context, the settings, and how many equal ones came before.
    """
    keyed = [(context, json.dumps(values), count) for context, values, count in asked]
    order = sorted(range(len(keyed)), key=lambda number: keyed[number])
    runs = groupby(enumerate(order), key=lambda item: (*keyed[item[1]][:2], keyed[item[1]][2] - item[0]))
    for (context, values, _), group in runs:
        numbers = [number for _, number in group]
        yield (context, values, keyed[numbers[0]][2]), numbers
