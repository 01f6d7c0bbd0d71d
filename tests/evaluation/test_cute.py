import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from bytelatent.errors import UserError
from bytelatent.evaluation.cute import CHARACTERS, CUTE, SENTENCES, SHOTS, Words, cute_task, letters_of, words_of
from bytelatent.evaluation.cute import _orthographic as orthographic
from bytelatent.evaluation.cute import _semantic as semantic
from bytelatent.evaluation.cute import _spell as spell
from bytelatent.evaluation.cute import _spell_inverse as spell_inverse
from bytelatent.evaluation.examples import Draws, answer_in, continue_with, edit_distance
from bytelatent.inference import Decoder, Engine
from tests.model.tiny import tiny_byte_lm

TEXT = """There is a wide blue sky over the happy garden, where apples and berries grow all summer.
The children were glad to apply what they had learned: how to plant, water and harvest a garden.
In winter the white snow covers everything, and nobody walks along the narrow path beside the river."""
RELATED = "happy\tglad\nwide\tbroad\npath\troad\nsnow\tice\ngarden\tpark\nriver\tstream\n"
WORDS = Words.parse(TEXT, RELATED)
HAND = Words(("there", "happy", "apply", "glad", "is", "the", "b", "a"), related=(("happy", "glad"),))


class Scripted:
    """Draws what it is given, in order."""

    def __init__(self, *values: Any):
        self.values = list(values)

    def below(self, size: int) -> int:
        return self.choice(range(size))

    def choice(self, items: Sequence[Any]) -> Any:
        value = self.values.pop(0)
        assert value in items
        return value

    def sample(self, items: Sequence[Any], size: int) -> list[Any]:
        return self.values.pop(0)


SKY = ("the", "sky", "is", "blue")
SENTENCE = Words(HAND.words, text=(*SKY, "today"))
FOUR, BEGIN = 0, 0  # a sentence of four words, from the first
# What is drawn, the number of the example, and question and answer, as in the published examples of each task.
BY_HAND: dict[str, tuple[Callable[..., Any], Words, list[Any], int, str, str]] = {
    "cute_spell": (spell, HAND, ["there"], 0, 'How is "there" spelled?', "t h e r e"),
    "cute_spell_inverse": (spell_inverse, HAND, ["there"], 0, 'Which word is spelled "t h e r e"?', "there"),
    "cute_contains_char": (
        *(CHARACTERS.contains, HAND, ["there", "d"], 1),
        *('Is the letter "d" in the word "there"?', "no"),
    ),
    "cute_contains_word": (
        *(SENTENCES.contains, SENTENCE, [FOUR, BEGIN, "the"], 0),
        *('Is the word "the" in the sentence "the sky is blue"?', "yes"),
    ),
    "cute_orth": (
        *(orthographic, HAND, [["happy", "glad", "apply", "there"], "glad"], 1),
        *('Which word looks more like "happy": "glad" or "apply"?', "apply"),
    ),
    "cute_sem": (
        *(semantic, HAND, [("happy", "glad"), ["glad", "there", "apply", "happy"]], 0),
        *('Which word is closer in meaning to "happy": "glad" or "apply"?', "glad"),
    ),
    "cute_ins_char": (
        *(CHARACTERS.insert, HAND, ["there", "e", "b"], 0),
        *('What is "there" with "b" added after each "e"?', "thebreb"),
    ),
    "cute_ins_word": (
        *(SENTENCES.insert, SENTENCE, [FOUR, BEGIN, "the", ["glad"], "glad"], 0),
        *('What is "the sky is blue" with "glad" added after each "the"?', "the glad sky is blue"),
    ),
    "cute_del_char": (
        *(CHARACTERS.delete, HAND, ["there", "e"], 0),
        *('What is "there" with each "e" left out?', "thr"),
    ),
    "cute_del_word": (
        *(SENTENCES.delete, SENTENCE, [FOUR, BEGIN, "the"], 0),
        *('What is "the sky is blue" with each "the" left out?', "sky is blue"),
    ),
    "cute_sub_char": (
        *(CHARACTERS.substitute, HAND, ["there", "e", "a"], 0),
        *('What is "there" with "a" in place of each "e"?', "thara"),
    ),
    "cute_sub_word": (
        *(SENTENCES.substitute, SENTENCE, [FOUR, BEGIN, "the", ["the", "happy"], "happy"], 0),
        *('What is "the sky is blue" with "happy" in place of each "the"?', "happy sky is blue"),
    ),
    "cute_swap_char": (
        *(CHARACTERS.swap, HAND, ["there", ["t", "r"]], 0),
        *('What is "there" with "t" and "r" swapped?', "rhete"),
    ),
    "cute_swap_word": (
        *(SENTENCES.swap, SENTENCE, [FOUR, BEGIN, ["the", "is"]], 0),
        *('What is "the sky is blue" with "the" and "is" swapped?', "is sky the blue"),
    ),
}


@pytest.mark.parametrize("name", CUTE)
def test_examples_by_hand(name: str) -> None:
    make, words, drawn, number, question, answer = BY_HAND[name]
    draws = Scripted(*drawn)
    assert make(words, draws, number) == (question, answer)
    assert CUTE[name][1] == make
    assert not draws.values


def test_questions_that_words_do_not_give() -> None:
    assert SENTENCES.insert(SENTENCE, Scripted(FOUR, BEGIN, "the", ["the", "is"]), 0) is None  # no other word
    assert CHARACTERS.delete(Words(("aaa",)), Scripted("aaa", "a"), 0) is None  # nothing would be left
    assert CHARACTERS.swap(Words(("aab",)), Scripted("aab"), 0) is None  # one letter occurs once
    assert semantic(HAND, Scripted(("happy", "glad"), ["glad", "happy"]), 0) is None
    assert orthographic(HAND, Scripted(["there", "three", "thorn"], "thorn"), 0) is None  # two edits each


def solve(prompt: str) -> str:
    """The answer to a prompt's last question, found from its words alone."""
    question = prompt.split("\n\n")[-1].removesuffix("\nAnswer:")
    quoted = re.findall(r'"([^"]*)"', question)
    if question.startswith("How is"):
        return " ".join(quoted[0])
    if question.startswith("Which word is spelled"):
        return quoted[0].replace(" ", "")
    if question.startswith("Is the letter"):
        return "yes" if quoted[0] in quoted[1] else "no"
    if question.startswith("Is the word"):
        return "yes" if f" {quoted[0]} " in f" {quoted[1]} " else "no"
    if "looks more like" in question:
        return min(quoted[1:], key=lambda word: slow_distance(word, quoted[0]))
    if "in meaning" in question:
        return next(word for word in quoted[1:] if f"{quoted[0]}\t{word}\n" in RELATED)
    whole, *parts = quoted
    between = " " if " " in whole else ""
    items = whole.split(" ") if between else list(whole)
    for place, item in enumerate(items):
        if "added after" in question and item == parts[1]:
            items[place] = item + between + parts[0]
        elif "left out" in question and item == parts[0]:
            items[place] = "\0"
        elif "in place of" in question and item == parts[1]:
            items[place] = parts[0]
        elif "swapped" in question and item in parts:
            items[place] = parts[1 - parts.index(item)]
    return between.join(item for item in items if item != "\0")


def slow_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return slow_distance(a[1:], b[1:])
    return 1 + min(slow_distance(a[1:], b), slow_distance(a, b[1:]), slow_distance(a[1:], b[1:]))


@pytest.mark.parametrize("name", CUTE)
def test_every_answer_is_right_and_no_question_comes_twice(name: str) -> None:
    words = Words(tuple(word for word in WORDS.words if len(word) < 7), WORDS.text, WORDS.related)
    task = cute_task(name, words, 20, seed=1)
    assert len(task.examples) == 20
    prompts = [example.prompt for example in task.examples]
    questions = [prompt.split("\n\n")[-1] for prompt in prompts]
    assert len(set(questions)) == len(questions)
    for example, question in zip(task.examples, questions, strict=True):
        assert example.answers == (solve(example.prompt),)
        instruction, *worked = example.prompt.removesuffix(question).strip().split("\n\n")
        assert instruction == CUTE[name][0]
        assert len(worked) == SHOTS
        for shot in worked:
            asked, _, answer = shot.partition("\nAnswer: ")
            assert solve(f"{asked}\nAnswer:") == answer
            assert f"{asked}\nAnswer:" not in questions
    if "contains" in name:
        assert [example.answers for example in task.examples] == [("yes",), ("no",)] * 10
    assert cute_task(name, words, 20, seed=1) == task
    assert cute_task(name, words, 5, seed=1).examples == task.examples[:5]
    assert cute_task(name, words, 20, seed=2) != task


def test_words_of_a_list_and_of_a_text() -> None:
    listed = Words.parse(
        "Apple\nbanana\ncherry\n\ndate\nelder\nfigs\ngrape\nhoney\niris\njam\nApple\nof\nenormousnesses"
    )
    assert listed.words == ("apple", "banana", "cherry", "date", "elder", "figs", "grape", "honey", "iris", "jam")
    assert listed.text == ()
    assert all(word in listed.words for word in listed.sentence(Draws(0)))
    assert " ".join(WORDS.sentence(Draws(0))) in " ".join(WORDS.text)
    assert {"is", "a"} <= set(WORDS.text) - set(WORDS.words)


def test_a_letter_has_its_signs() -> None:
    """Hindi, and accents apart from their letters; a sign is never alone."""
    assert words_of("किताब, पानी! 12 e\u0301te\u0301") == ["किताब", "पानी", "e\u0301te\u0301"]
    assert letters_of("किताब") == ["कि", "ता", "ब"]
    hindi = Words(("किताब", "पानी"))
    assert hindi.letters == ("कि", "ता", "नी", "पा", "ब")
    assert spell(hindi, Scripted("किताब"), 0) == ('How is "किताब" spelled?', "कि ता ब")
    swap = CHARACTERS.swap(hindi, Scripted("किताब", ["कि", "ब"]), 0)
    assert swap == ('What is "किताब" with "कि" and "ब" swapped?', "बताकि")
    assert CHARACTERS.other(Words(("पानी", "प")), Scripted(), ["पा", "नी"]) is None  # it begins one that is there


@pytest.mark.parametrize(
    ("text", "related", "message"),
    [
        ("one two three", "", "words: there are 3 different words of 3 to 12 letters; give 10 or more"),
        (TEXT, "happy glad", "related: line 1 is no pair of words; write WORD, a tab, and a related word"),
        (TEXT, "happy\tglad\n\nwide\twide", "related: line 3 is no pair of words"),
    ],
)
def test_bad_words(text: str, related: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Words.parse(text, related)


def test_meaning_needs_pairs_and_tasks_need_words() -> None:
    with pytest.raises(UserError, match=r"cute_sem: it needs pairs .* --related"):
        cute_task("cute_sem", Words.parse(TEXT))
    with pytest.raises(UserError, match="cute_sem: the words give too few examples"):
        cute_task("cute_sem", Words.parse(TEXT, "happy\tglad"))


@pytest.mark.parametrize(
    ("text", "answer"),
    [(" t h e\nmore", "t h e"), (' "the" \n', "the"), ("'", "'"), ("", ""), (" \n\nyes", ""), ("no.", "no.")],
)
def test_answers(text: str, answer: str) -> None:
    assert answer_in(text.split("\n")[0]) == answer


@pytest.mark.parametrize("name", CUTE)
def test_an_oracle_is_right_and_what_cannot_spell_is_wrong(name: str) -> None:
    task = cute_task(name, WORDS, 3)
    [score] = task.scores.values()
    for example in task.examples:
        assert score(f" {solve(example.prompt)}", example.answers) == (1.0, 1.0)
        assert score(f' "{solve(example.prompt)}"', example.answers) == (1.0, 1.0)
        assert score(example.prompt, example.answers) == (0.0, 1.0)
        assert score(example.answers[0] + " x", example.answers) == (0.0, 1.0)
        assert score("", example.answers) == (0.0, 1.0)
        assert len(example.answers[0]) + 2 < task.max_new_bytes
    if "contains" in name:
        assert score(f" {task.examples[0].answers[0].title()}", task.examples[0].answers) == (1.0, 1.0)


def test_a_random_model_cannot_spell() -> None:
    task = cute_task("cute_spell", WORDS, 20)
    generate = continue_with(Engine.plain(Decoder(tiny_byte_lm(0), None, None), 4), 4)
    texts: Iterator[str] = generate([example.prompt for example in task.examples], ["\n"], 6)
    found = [task.scores["exact_match"](text, e.answers) for text, e in zip(texts, task.examples, strict=True)]
    assert found == [(0.0, 1.0)] * 20


def test_a_model_that_gives_nan_is_reported() -> None:
    model = tiny_byte_lm(0)
    model.output.weight.data.fill_(float("nan"))
    generate = continue_with(Engine.plain(Decoder(model, None, None), 1), 1)
    with pytest.raises(UserError, match="the model gives NaN; its weights are corrupt"):
        list(generate(["a"], ["\n"], 4))


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance(["K", "AE", "T"], ["K", "AH", "T", "S"]) == 2
    for a, b in [("happy", "apply"), ("there", "three"), ("glad", "happy")]:
        assert edit_distance(a, b) == slow_distance(a, b)


def test_draws_are_the_same_on_every_machine() -> None:
    draws = Draws(0, "name")
    assert [draws.below(100) for _ in range(5)] == DRAWN
    assert sorted(draws.sample(range(5), 9)) == [0, 1, 2, 3, 4]
    assert Draws(1, "name").below(10**9) != Draws(0, "name").below(10**9)


DRAWN = [24, 42, 0, 52, 92]
