"""The automaton of UTF-8 and whole characters, against Python's own decoder."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bytelatent.inference.utf8 import ERROR, NEEDED, RESUMED, TRANSITIONS, CharacterStream, state_after

SCALARS = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
PIECES = st.one_of(
    st.binary(max_size=4),
    st.text(max_size=3).map(str.encode),
    st.sampled_from(
        [b"\xe0", b"\xe0\xa0", b"\xed\xa0", b"\xf0\x90", b"\xf4\x8f\xbf", b"\xf4\x90", b"\xc0\x80", b"\xf1"]
    ),
)
TEXTS = st.lists(PIECES, max_size=8).map(b"".join)

MANY = settings(max_examples=300)


def can_become_valid(data: bytes) -> bool:
    """Whether `data` begins some valid UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def begun(data: bytes) -> bytes:
    """The longest end that can still become a character, but is none."""
    for size in (3, 2, 1):
        end = data[-size:]
        if len(end) == size and can_become_valid(end) and end.decode(errors="ignore") == "":
            return end
    return b""


def walk(data: bytes, state: int = 0) -> int:
    for byte in data:
        state = int(TRANSITIONS[state, byte])
    return state


def encodings() -> Iterator[np.ndarray]:
    """The encodings of all characters, [characters, bytes], those of one length together."""
    for low, high, size in ((0, 0x80, 1), (0x80, 0x800, 2), (0x800, 0x10000, 3), (0x10000, 0x110000, 4)):
        characters = "".join(chr(c) for c in SCALARS if low <= c < high).encode()
        yield np.frombuffer(characters, dtype=np.uint8).reshape(-1, size)


def prefixes() -> list[bytes]:
    """All beginnings of characters, the empty one included."""
    found = {b""}
    for data in encodings():
        for size in range(1, data.shape[1]):
            found.update(map(bytes, data[::64, :size]))  # the last byte of characters in a row counts up to 64
    return sorted(found)


def test_every_character_is_valid_and_needs_what_it_needs() -> None:
    transitions, needed = TRANSITIONS.numpy(), NEEDED.numpy()
    count = 0
    for data in encodings():
        state = np.zeros(len(data), dtype=np.int64)
        for place in range(data.shape[1]):
            state = transitions[state, data[:, place]]
            assert (state != ERROR).all()
            assert (needed[state] == data.shape[1] - place - 1).all()
            assert ((state == 0) == (place == data.shape[1] - 1)).all()
        count += len(data)
    assert count == 1_112_064


def test_every_rejected_byte_is_impossible_and_no_other() -> None:
    """Every byte after every first byte of a character, and after some of the beginnings of two and three bytes."""
    every, valid = prefixes(), (TRANSITIONS != ERROR).tolist()
    assert len({walk(prefix) for prefix in every}) == ERROR == len(TRANSITIONS) - 1
    edges = {0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF}
    for prefix in [prefix for prefix in every if len(prefix) < 2 or edges.issuperset(prefix[1:])]:
        state = walk(prefix)
        assert state_after(prefix) == state
        assert valid[state] == [can_become_valid(prefix + bytes([byte])) for byte in range(256)]


def test_an_error_stays_and_needs_more_than_any_character() -> None:
    assert (TRANSITIONS[ERROR] == ERROR).all()
    assert (NEEDED[:ERROR] < NEEDED[ERROR]).all()
    assert (RESUMED != ERROR).all()


@MANY
@given(TEXTS)
def test_state_after_is_that_of_what_has_begun(data: bytes) -> None:
    assert state_after(data) == walk(begun(data)) != ERROR


@MANY
@example("\ufffd".encode(), [])
@given(TEXTS, st.lists(st.integers(0, 40), max_size=6))
def test_characters_are_complete_and_come_at_once(data: bytes, cuts: list[int]) -> None:
    stream, text, borders = CharacterStream(), "", [0, *sorted(cuts), len(data)]
    for begin, end in pairwise(borders):
        text += stream.feed(data[begin:end])
        known = data[: max(begin, end)]
        assert text == known[: len(known) - len(begun(known))].decode("utf-8", "replace")
    assert text + stream.finish() == data.decode("utf-8", "replace")
    assert stream.finish() == ""


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_character_is_shown_with_its_last_byte(size: int) -> None:
    data = {1: "a", 2: "é", 3: "語", 4: "🙂"}[size]
    stream = CharacterStream()
    assert [stream.feed(bytes([byte])) for byte in data.encode()] == [""] * (size - 1) + [data]
