"""Tasks of examples: a prompt that a model continues up to the end of the line, and answers that are right.

They need no package and no network. Each is the same for the same seed, on any machine.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from bytelatent.errors import UserError
from bytelatent.evaluation.models import TransformersModel
from bytelatent.inference import Engine, Sampling

STOP = ("\n",)
MARGIN = 8  # bytes that a text may have more than the longest answer, so that one that goes on is not right
# Llama 3 and BLT of 8B parameters, 1T tokens, in percent. Pagnoni et al. 2024, table 3.
PAPER = {
    "hellaswag": (79.1, 80.6),
    "hellaswag noise": (56.9, 64.3),
    "hellaswag antspeak": (45.6, 57.9),
    "hellaswag drop": (53.8, 58.2),
    "hellaswag randomcase": (55.3, 65.7),
    "hellaswag repeat": (57.0, 66.6),
    "hellaswag uppercase": (72.9, 77.3),
    "g2p": (11.8, 13.0),
    "cute": (27.5, 54.1),
    "cute_contains_char": (0.0, 55.9),
    "cute_contains_word": (55.1, 73.5),
    "cute_del_char": (34.6, 35.9),
    "cute_del_word": (75.5, 56.1),
    "cute_ins_char": (7.5, 7.6),
    "cute_ins_word": (33.5, 31.2),
    "cute_orth": (43.1, 52.4),
    "cute_sem": (65.0, 90.5),
    "cute_spell": (1.1, 99.9),
    "cute_spell_inverse": (30.1, 99.9),
    "cute_sub_char": (0.4, 48.7),
    "cute_sub_word": (16.4, 72.8),
    "cute_swap_char": (2.6, 11.5),
    "cute_swap_word": (20.1, 21.0),
}

Item = TypeVar("Item")
Counts = tuple[float, float]  # what a score sums over examples: its numerator and its denominator
Score = Callable[[str, Sequence[str]], Counts]  # of an answer, with those that are right


@dataclass(frozen=True)
class Example:
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class ExampleTask:
    """Attributes:
    scores: by their names, the most important first.
    """

    name: str
    examples: tuple[Example, ...]
    scores: Mapping[str, Score]

    @property
    def max_new_bytes(self) -> int:
        return MARGIN + 2 * max(len(answer.encode()) for example in self.examples for answer in example.answers)


class Generate(Protocol):
    """Continues prompts, greedily."""

    def __call__(self, prompts: Sequence[str], stop: Sequence[str], max_new_bytes: int) -> Iterator[str]:
        """The continuations in their order, each up to the first stop text, as soon as it and all before are done."""
        ...


class Draws:
    """Random choices that are the same for the same key, on any machine and in any version of Python."""

    def __init__(self, *key: object):
        digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest))

    def below(self, size: int) -> int:
        return int(self._random.random() * size)

    def choice(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Item], size: int) -> list[Item]:
        """Different ones, as many as there are."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(min(size, len(pool)))]


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """The least number of insertions, deletions and substitutions between two sequences (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def few_shot(instruction: str, shots: Sequence[tuple[str, str]], question: str) -> str:
    """An instruction, worked examples, and a question that waits for its answer."""
    worked = [f"{asked}\nAnswer: {answer}" for asked, answer in shots]
    return "\n\n".join([instruction, *worked, f"{question}\nAnswer:"])


def answer_in(text: str) -> str:
    """What a model answers: the rest of the line, without white space and quotes around it."""
    line = text.strip("\n").partition("\n")[0].strip()
    return line[1:-1].strip() if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'" else line


def exact_match(text: str, answers: Sequence[str]) -> Counts:
    return float(answer_in(text) in answers), 1.0


def continue_with(engine: Engine, batch_size: int) -> Generate:
    """Continue prompts with a model of this package, `batch_size` at once, as the engine has slots."""

    def generate(prompts: Sequence[str], stop: Sequence[str], max_new_bytes: int) -> Iterator[str]:
        sampling, asked = Sampling(temperature=0, stop=list(stop)), []
        for number in range(len(prompts)):
            while len(asked) < len(prompts) and engine.num_waiting < batch_size:  # all of them could be more than fit
                asked += engine.submit(prompts[len(asked)], sampling, max_new_bytes)
            while asked[number].ended is None:
                engine.advance()
            if any(map(math.isnan, asked[number].log_probabilities)):
                raise UserError("tasks: the model gives NaN; its weights are corrupt")
            yield asked[number].text

    return generate


def continue_tokens_with(model: TransformersModel, batch_size: int) -> Generate:
    """Continue prompts with a causal language model of transformers, `batch_size` at once."""

    def batch(prompts: Sequence[str], stop: Sequence[str], max_new_bytes: int) -> list[str]:
        special = [] if model.start is None else [model.start]
        ids = [[*special, *model.encode(prompt)] for prompt in prompts]
        width = max(map(len, ids))
        given = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=model.device)

        def text_of(row: list[int]) -> str:
            return model.decode(row[: row.index(model.end)] if model.end in row else row)

        def is_done(ids_BN: Tensor, scores: Tensor, **_: object) -> Tensor:
            texts = map(text_of, ids_BN[:, width:].tolist())
            return torch.tensor([any(end in text for end in stop) for text in texts], device=ids_BN.device)

        settings = {"max_new_tokens": max_new_bytes, "do_sample": False, "pad_token_id": 0, "eos_token_id": model.end}
        new = model.network.generate(given, attention_mask=mask, stopping_criteria=[is_done], **settings)
        texts = map(text_of, new[:, width:].tolist())
        return [text[: min(at for at in [*map(text.find, stop), len(text)] if at >= 0)] for text in texts]

    def generate(prompts: Sequence[str], stop: Sequence[str], max_new_bytes: int) -> Iterator[str]:
        for begin in range(0, len(prompts), batch_size):
            yield from batch(prompts[begin : begin + batch_size], stop, max_new_bytes)

    return generate
