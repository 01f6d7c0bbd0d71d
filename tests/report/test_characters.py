import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelatent.report.text import LOST, characters, finite, visible
from tests.report.report_texts import patched


@given(st.binary(max_size=40), st.lists(st.integers(0, 40)))
def test_every_byte_belongs_to_exactly_one_character(data: bytes, cuts: list[int]) -> None:
    entropies = [float(i) for i in range(len(data))]
    found = [
        c for patch in patched(data, [cut for cut in cuts if cut < len(data)], entropies) for c in characters(patch)
    ]
    offsets = [offset for c in found for offset in range(c.start, c.start + c.num_bytes)]
    assert offsets == list(range(len(data)))
    assert [entropy for c in found for entropy in c.entropies or ()] == entropies


@given(st.text(max_size=20).filter(lambda text: LOST not in text), st.lists(st.integers(0, 60)))
def test_known_bytes_are_those_of_the_text_wherever_it_is_cut(text: str, cuts: list[int]) -> None:
    data = text.encode()
    for patch in patched(data, [cut for cut in cuts if cut < len(data)]):
        for c in characters(patch):
            if c.values is None:
                assert c.text == LOST
            else:
                assert data[c.start : c.start + c.num_bytes] == c.values == c.text.encode()
    whole = len([c for patch in patched(data, []) for c in characters(patch) if c.values is not None])
    assert whole == len(text)


def test_a_cut_emoji_is_one_mark_a_byte() -> None:
    left, right = patched("a😀b".encode(), [3])
    assert [(c.start, c.text) for c in characters(left)] == [(0, "a"), (1, LOST), (2, LOST)]
    assert [(c.start, c.text) for c in characters(right)] == [(3, LOST), (4, LOST), (5, "b")]


@given(st.characters(codec="utf-8"))
def test_what_is_shown_can_neither_hide_nor_steer(character: str) -> None:
    shown = visible(character)
    assert shown
    assert all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") for c in shown)


@pytest.mark.parametrize(
    ("character", "shown"),
    [("\n", "↵"), ("\t", "⇥"), ("\x1b", "␛"), ("\x7f", "␡"), ("\u202e", "<U+202E>"), ("\u0301", "◌\u0301"), ("é", "é")],
)
def test_names_of_the_invisible(character: str, shown: str) -> None:
    assert visible(character) == shown


def test_finite() -> None:
    assert finite("2.5") == 2.5
    assert [finite(value) for value in (None, "x", float("nan"), float("inf"), {})] == [None] * 5
