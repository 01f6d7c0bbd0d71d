"""Noise in the characters of a text, to measure how robust a model is: at any rate, the same for the same seed.

Each character is changed or not by a number of its own, which depends on the seed, the noise and the whole text. What a
rate changes, a higher rate changes too. Bytes that are not UTF-8 stay as they are.

Source: Pagnoni et al. 2024, section 6.1.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, overload

import numpy as np

from bytelatent.errors import UserError, nearest
from bytelatent.vocab import to_bytes

Target = Literal["prompt", "completion", "both"]
NEVER = 2.0  # the number of what no rate changes
ALL = "all"


def _antspeak(characters: str, first: list[float], second: list[float], rate: float) -> Iterable[str]:
    """Upper case, with a space before all but the text's first character."""
    for number, (character, x) in enumerate(zip(characters, first, strict=True)):
        yield character if x >= rate else (" " if number else "") + character.upper()


def _drop(characters: str, first: list[float], second: list[float], rate: float) -> Iterable[str]:
    return (character for character, x in zip(characters, first, strict=True) if x >= rate)


def _random_case(characters: str, first: list[float], second: list[float], rate: float) -> Iterable[str]:
    """The rate in upper case and as many in lower case; from 0.5 on, all others in lower case."""
    for character, x in zip(characters, first, strict=True):
        yield character.upper() if x < rate else character.lower() if x >= 1 - rate else character


def _repeat(characters: str, first: list[float], second: list[float], rate: float) -> Iterable[str]:
    """Two, three or four times the character."""
    for character, x, times in zip(characters, first, second, strict=True):
        yield character if x >= rate else character * (2 + int(3 * times))


def _uppercase(characters: str, first: list[float], second: list[float], rate: float) -> Iterable[str]:
    return (character if x >= rate else character.upper() for character, x in zip(characters, first, strict=True))


class NoiseKind(NamedTuple):
    """A noise.

    Attributes:
        rate: the paper's.
        change: gives the pieces of the changed text from its characters, two numbers from 0 to 1 for each, and a rate.
    """

    rate: float
    change: Callable[[str, list[float], list[float], float], Iterable[str]]


NOISES = {
    "antspeak": NoiseKind(1.0, _antspeak),
    "drop": NoiseKind(0.1, _drop),
    "randomcase": NoiseKind(0.5, _random_case),
    "repeat": NoiseKind(0.2, _repeat),
    "uppercase": NoiseKind(1.0, _uppercase),
}


@dataclass(frozen=True)
class Noise:
    """A noise at a rate, to call with a text; rate 0 changes nothing."""

    name: str
    rate: float
    seed: int = 0

    @overload
    def __call__(self, text: str) -> str: ...
    @overload
    def __call__(self, text: bytes) -> bytes: ...
    def __call__(self, text: str | bytes) -> str | bytes:
        if self.rate == 0 or not text:
            return text
        characters = text if isinstance(text, str) else text.decode("utf-8", "surrogateescape")
        first, second = _numbers(characters, self.name, self.seed)
        changed = "".join(NOISES[self.name].change(characters, first, second, self.rate))
        return changed if isinstance(text, str) else to_bytes(changed)

    def __str__(self) -> str:
        return f"{self.name}:{self.rate:g}"


def _numbers(characters: str, name: str, seed: int) -> tuple[list[float], list[float]]:
    """Two numbers from 0 to 1 for each character. The first is `NEVER` for halves of surrogate pairs, which stand for
    bytes that are not UTF-8.
    """
    codes = np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), "<u4")
    digest = hashlib.shake_256(f"{name} {seed} ".encode() + codes.tobytes()).digest(8 * len(codes))
    first, second = np.frombuffer(digest, "<u4").reshape(2, -1) / 2**32
    return np.where((codes >= 0xD800) & (codes <= 0xDFFF), NEVER, first).tolist(), second.tolist()


def noises_of(given: Sequence[str], rates: Sequence[float] | None = None, seed: int = 0) -> list[Noise]:
    """The noises that `--noise` and `--noise-rates` name, each once, in their order.

    Args:
        given: names, each with a rate or not (`drop:0.05`), or `all`.
        rates: of every noise; None: the given ones, or the paper's.

    Raises:
        UserError: a name is unknown, or a rate is not valid or is given twice.
    """
    if rates is not None and not given:
        raise UserError("noise-rates: there is no noise to have them; name one: --noise drop, or --noise all")
    found: list[Noise] = []
    for text in given:
        name, colon, rate = text.strip().partition(":")
        name = name.lower()
        if name not in NOISES and name != ALL:
            hint = nearest(name, [*NOISES, ALL]) or f"; there are {', '.join(NOISES)}, and all"
            raise UserError(f"noise: '{name}' is unknown{hint}")
        share = _rate(rate) if colon else None
        if colon and share is None:
            raise UserError(f"noise: '{rate}' is not a rate; write a number from 0 to 1, as in {name}:0.1")
        if colon and rates is not None:
            raise UserError(f"noise: '{text}' has a rate, and so has --noise-rates; give one of them")
        for each in NOISES if name == ALL else [name]:
            own = rates if rates is not None else [NOISES[each].rate if share is None else share]
            found += [Noise(each, value, seed) for value in own]
    return list(dict.fromkeys(found))


def _rate(text: str) -> float | None:
    try:
        rate = float(text)
    except ValueError:
        return None
    return rate if 0 <= rate <= 1 else None


def noisy_completion(text: str, noise: Callable[[str], str]) -> str:
    """A completion with noise: the white space at its beginning stays, and so does a text that would become empty."""
    body = text.lstrip()
    return text[: len(text) - len(body)] + (noise(body) or body)


def noisy_arguments(kind: str, arguments: tuple[Any, ...], noise: Callable[[str], str], on: Target) -> tuple[Any, ...]:
    """The arguments of a request of lm-eval with noise.

    Args:
        kind: `loglikelihood` (context, continuation), `loglikelihood_rolling` (text), which is a completion, or
            `generate_until` (context, settings).
    """
    prompt, completion = on != "completion", on != "prompt"
    if kind == "loglikelihood_rolling":
        [text] = arguments
        return (noise(text) if completion else text,)
    context, other = arguments
    if kind == "loglikelihood" and completion:
        other = noisy_completion(other, noise)
    return (noise(context) if prompt else context, other)


LM = TypeVar("LM")


def with_noise(lm: LM, noise: Callable[[str], str], on: Target = "both") -> LM:
    """A model of lm-eval, any, that gets its requests with noise; the requests themselves stay as they are."""
    noisy: Any = copy.copy(lm)
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(noisy, kind, _with_noise(getattr(lm, kind), kind, noise, on))
    return noisy


def _with_noise(answer: Callable[..., Any], kind: str, noise: Callable[[str], str], on: Target) -> Callable[..., Any]:
    def method(requests: Sequence[Any], *others: Any, **named: Any) -> Any:
        changed = [copy.copy(request) for request in requests]
        for request in changed:
            request.arguments = noisy_arguments(kind, request.args, noise, on)
        return answer(changed, *others, **named)

    return method
