"""What a model knows of the characters in words: the fourteen tasks of CUTE, made from any words.

Source: Edman, Schmid and Fraser 2024, "CUTE: Measuring LLMs' Understanding of Their Tokens". The questions are in
words of our own.

A word is made of letters and combining signs, a "letter" of it is a letter with the signs that follow it, as readers
of Hindi or of decomposed accents see it: a sign is never apart from its letter.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bytelatent.errors import UserError
from bytelatent.evaluation.examples import Draws, Example, ExampleTask, edit_distance, exact_match, few_shot

SHOTS = 4
NUM_EXAMPLES = 1000  # of a task, as published
SHORTEST, LONGEST = 3, 12  # letters of a word
FEWEST_WORDS, MOST_WORDS = 4, 8  # of a sentence
FEWEST_DIFFERENT = 10  # words to make tasks from
CANDIDATES = 40  # words among which one is the most similar
TRIES = 100  # draws for one new example, before there are taken to be no more

Question = tuple[str, str]  # and its answer


def letters_of(word: str) -> list[str]:
    found: list[str] = []
    for character in word:
        if found and _is_sign(character):
            found[-1] += character
        else:
            found.append(character)
    return found


def words_of(text: str) -> list[str]:
    signs = re.escape("".join(sorted(filter(_is_sign, set(text)))))
    return re.findall(rf"[^\W\d_](?:[^\W\d_]|[{signs}])*" if signs else r"[^\W\d_]+", text)


def _is_sign(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


@dataclass(frozen=True)
class Words:
    """Attributes:
    words: different ones, of SHORTEST to LONGEST letters, in lower case.
    text: all words in the order of a text, from which sentences are taken; if it is empty, words are drawn.
    related: pairs of related meaning.
    """

    words: tuple[str, ...]
    text: tuple[str, ...] = ()
    related: tuple[tuple[str, str], ...] = ()
    letters: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        letters = {letter for word in self.words for letter in letters_of(word)}
        object.__setattr__(self, "letters", tuple(sorted(letters)))

    @classmethod
    def parse(cls, text: str, related: str = "") -> "Words":
        """The words of a text, or of a list with one word per line.

        Args:
            related: lines of two words with a tab between them.

        Raises:
            UserError: there are too few words, or a line of `related` is no pair.
        """
        found = words_of(text.lower())
        is_list = all(len(line.split()) <= 1 for line in text.splitlines())
        words = tuple(dict.fromkeys(word for word in found if SHORTEST <= len(letters_of(word)) <= LONGEST))
        if len(words) < FEWEST_DIFFERENT:
            size = f"{SHORTEST} to {LONGEST} letters"
            raise UserError(f"words: there are {len(words)} different words of {size}; give {FEWEST_DIFFERENT} or more")
        pairs = []
        for number, line in enumerate(related.splitlines(), start=1):
            pair = [word.strip().lower() for word in line.split("\t")]
            if line.strip() and (len(pair) != 2 or not all(pair) or pair[0] == pair[1]):
                raise UserError(f"related: line {number} is no pair of words; write WORD, a tab, and a related word")
            if line.strip():
                pairs.append((pair[0], pair[1]))
        return cls(words, () if is_list else tuple(found), tuple(pairs))

    def sentence(self, draws: Draws) -> list[str]:
        """Some consecutive words of the text, or some words."""
        size = FEWEST_WORDS + draws.below(MOST_WORDS - FEWEST_WORDS + 1)
        if len(self.text) <= size:
            return [draws.choice(self.words) for _ in range(size)]
        begin = draws.below(len(self.text) - size + 1)
        return list(self.text[begin : begin + size])


def inserted(items: Sequence[str], after: str, new: str) -> list[str]:
    return [part for item in items for part in ([item, new] if item == after else [item])]


def deleted(items: Sequence[str], which: str) -> list[str]:
    return [item for item in items if item != which]


def substituted(items: Sequence[str], old: str, new: str) -> list[str]:
    return [new if item == old else item for item in items]


def swapped(items: Sequence[str], a: str, b: str) -> list[str]:
    return [{a: b, b: a}.get(item, item) for item in items]


def _spell(words: Words, draws: Draws, number: int) -> Question | None:
    word = draws.choice(words.words)
    return f'How is "{word}" spelled?', " ".join(letters_of(word))


def _spell_inverse(words: Words, draws: Draws, number: int) -> Question | None:
    word = draws.choice(words.words)
    return f'Which word is spelled "{" ".join(letters_of(word))}"?', word


@dataclass(frozen=True)
class Level:
    """Characters of a word, or words of a sentence: what parts are of what whole."""

    part: str
    whole: str
    between: str

    def whole_of(self, words: Words, draws: Draws) -> list[str]:
        return letters_of(draws.choice(words.words)) if self.between == "" else words.sentence(draws)

    def other(self, words: Words, draws: Draws, items: Sequence[str]) -> str | None:
        """A part that the whole lacks."""
        if self.between == "":  # nor is it the beginning of a letter with signs
            items, others = "".join(items), words.letters
        else:
            others = draws.sample(words.words, MOST_WORDS + 1)
        return draws.choice(found) if (found := [item for item in others if item not in items]) else None

    def contains(self, words: Words, draws: Draws, number: int) -> Question | None:
        items = self.whole_of(words, draws)
        part = draws.choice(items) if number % 2 == 0 else self.other(words, draws, items)
        question = f'Is the {self.part} "{part}" in the {self.whole} "{self.between.join(items)}"?'
        return None if part is None else (question, "no" if number % 2 else "yes")

    def insert(self, words: Words, draws: Draws, number: int) -> Question | None:
        items = self.whole_of(words, draws)
        after, new = draws.choice(items), self.other(words, draws, items)
        return None if new is None else self._change(items, f'"{new}" added after each "{after}"', inserted, after, new)

    def delete(self, words: Words, draws: Draws, number: int) -> Question | None:
        items = self.whole_of(words, draws)
        which = draws.choice(items)
        return self._change(items, f'each "{which}" left out', deleted, which) if len(set(items)) > 1 else None

    def substitute(self, words: Words, draws: Draws, number: int) -> Question | None:
        items = self.whole_of(words, draws)
        old, new = draws.choice(items), self.other(words, draws, items)
        return None if new is None else self._change(items, f'"{new}" in place of each "{old}"', substituted, old, new)

    def swap(self, words: Words, draws: Draws, number: int) -> Question | None:
        items = self.whole_of(words, draws)
        once = [item for item in items if items.count(item) == 1]
        if len(once) < 2:
            return None
        a, b = draws.sample(once, 2)
        return self._change(items, f'"{a}" and "{b}" swapped', swapped, a, b)

    def _change(self, items: list[str], how: str, change: Callable[..., list[str]], *parts: str) -> Question:
        whole = self.between.join(items)
        return f'What is "{whole}" with {how}?', self.between.join(change(items, *parts))


def _choice(question: str, right: str, wrong: str, number: int) -> Question:
    first, second = (right, wrong) if number % 2 == 0 else (wrong, right)
    return f'{question}: "{first}" or "{second}"?', right


def _distance(word: str, other: str) -> int:
    return edit_distance(letters_of(word), letters_of(other))


def _orthographic(words: Words, draws: Draws, number: int) -> Question | None:
    """Of two words, the one that fewer edits make of a word."""
    word, *others = draws.sample(words.words, CANDIDATES)
    ranked = sorted(others, key=lambda other: _distance(word, other))
    close, far = ranked[0], draws.choice(ranked[1:])
    if _distance(word, close) == _distance(word, far):
        return None
    return _choice(f'Which word looks more like "{word}"', close, far, number)


def _semantic(words: Words, draws: Draws, number: int) -> Question | None:
    """Of two words, the one of related meaning; the other looks similar."""
    word, right = draws.choice(words.related)
    related = {word, *(other for pair in words.related if word in pair for other in pair)}
    others = [other for other in draws.sample(words.words, CANDIDATES) if other not in related]
    if not others:
        return None
    wrong = min(others, key=lambda other: _distance(word, other))
    return _choice(f'Which word is closer in meaning to "{word}"', right, wrong, number)


CHARACTERS, SENTENCES = Level("letter", "word", ""), Level("word", "sentence", " ")
YES_OR_NO, CHOOSE = "Answer with yes or no.", "Choose one of two words."
Make = Callable[[Words, Draws, int], Question | None]

# Of each task the instruction, and what makes a question: None where what was drawn does not give one.
CUTE: dict[str, tuple[str, Make]] = {
    "cute_spell": ("Write each word letter by letter, with spaces between the letters.", _spell),
    "cute_spell_inverse": ("Put letters together to a word.", _spell_inverse),
    "cute_contains_char": (YES_OR_NO, CHARACTERS.contains),
    "cute_contains_word": (YES_OR_NO, SENTENCES.contains),
    "cute_orth": (CHOOSE, _orthographic),
    "cute_sem": (CHOOSE, _semantic),
    "cute_ins_char": ("Add a letter to a word.", CHARACTERS.insert),
    "cute_ins_word": ("Add a word to a sentence.", SENTENCES.insert),
    "cute_del_char": ("Leave a letter out of a word.", CHARACTERS.delete),
    "cute_del_word": ("Leave a word out of a sentence.", SENTENCES.delete),
    "cute_sub_char": ("Replace a letter of a word.", CHARACTERS.substitute),
    "cute_sub_word": ("Replace a word of a sentence.", SENTENCES.substitute),
    "cute_swap_char": ("Swap two letters of a word.", CHARACTERS.swap),
    "cute_swap_word": ("Swap two words of a sentence.", SENTENCES.swap),
}


def cute_task(
    name: str, words: Words, num_examples: int = NUM_EXAMPLES, seed: int = 0, num_shots: int | None = None
) -> ExampleTask:
    """A task of CUTE: different examples after the same worked ones, as many as the words give.

    Args:
        num_shots: number of worked ones; None: four, as published.

    Raises:
        UserError: the words give none.
    """
    instruction, make = CUTE[name]
    if make is _semantic and not words.related:
        raise UserError(f"{name}: it needs pairs of words of related meaning; name a file of them with --related")
    num_shots = SHOTS if num_shots is None else num_shots
    questions: dict[str, str] = {}
    while len(questions) < num_shots + num_examples:
        number = len(questions)
        drawn = (make(words, Draws(seed, name, number, attempt), number) for attempt in range(TRIES))
        new = next((found for found in drawn if found is not None and found[0] not in questions), None)
        if new is None:
            break
        questions[new[0]] = new[1]
    shots, asked = list(questions.items())[:num_shots], list(questions.items())[num_shots:]
    if not asked:
        raise UserError(f"{name}: the words give too few examples; name more of them with --words")
    examples = [Example(few_shot(instruction, shots, question), (answer,)) for question, answer in asked]
    score = _same_word if make in (CHARACTERS.contains, SENTENCES.contains) else exact_match
    return ExampleTask(name, tuple(examples), {"exact_match": score})


def _same_word(text: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match of yes and no, in upper or lower case."""
    return exact_match(text.lower(), answers)
