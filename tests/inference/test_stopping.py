"""Stop texts as bytes come, against a search of the whole output after each byte."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelatent.inference.continuation import StopTexts

# Few different bytes, so that stop texts overlap, repeat and hold one another.
STOPS = st.lists(st.binary(min_size=1, max_size=6).map(lambda data: bytes(b % 3 for b in data)), max_size=5)
OUTPUTS = st.lists(st.integers(0, 2), max_size=40).map(bytes)
MANY = settings(max_examples=300)


def first_match(stops: list[bytes], output: bytes) -> int | None:
    """How many bytes precede the longest stop text with which the output ends."""
    sizes = [len(stop) for stop in stops if output.endswith(stop)]
    return len(output) - max(sizes) if sizes else None


def may_begin(stops: list[bytes], output: bytes) -> int:
    """The longest end of the output that begins a stop text."""
    return max((n for stop in stops for n in range(1, len(stop) + 1) if output.endswith(stop[:n])), default=0)


@MANY
@given(STOPS, OUTPUTS)
def test_every_byte(stops: list[bytes], output: bytes) -> None:
    watch = StopTexts(stops)
    for end, byte in enumerate(output, start=1):
        assert watch.feed(byte) == first_match(stops, output[:end])
        assert watch.held_back() == may_begin(stops, output[:end])


@MANY
@given(STOPS, OUTPUTS)
def test_nothing_of_a_stop_text_is_shown(stops: list[bytes], output: bytes) -> None:
    watch, shown = StopTexts(stops), 0
    for end, byte in enumerate(output, start=1):
        begin = watch.feed(byte)
        if begin is not None:
            assert shown <= begin
            return
        assert end - watch.held_back() >= shown
        shown = end - watch.held_back()


@pytest.mark.parametrize(
    ("stops", "output", "begin"),
    [
        ([b"\n\n"], b"a\n\nb", 1),
        ([b"abcd", b"bc"], b"xabcd", 2),  # the first to be complete
        ([b"bc", b"abc", b"c"], b"xabc", 1),  # of those complete at once the longest
        ([b"aab"], b"aaab", 1),
        (["é".encode()], "ê é".encode(), 3),
        ([b"\xa9"], "é".encode(), 1),  # within a character
        ([bytes(range(256))], bytes(range(256)), 0),
    ],
)
def test_examples(stops: list[bytes], output: bytes, begin: int) -> None:
    watch = StopTexts(stops)
    found = (watch.feed(byte) for byte in output)
    assert next(place for place in found if place is not None) == begin


def test_nothing_to_watch_for() -> None:
    watch = StopTexts([])
    assert [watch.feed(byte) for byte in b"text"] == [None] * 4
    assert watch.held_back() == 0


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(AssertionError):
        StopTexts([b"a", b""])
