"""Lines about bad rows: short, and such that any terminal can print them."""

from hypothesis import given
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.terminal import one_line
from bytelatent.text import BadRow, BadRows
from bytelatent.text.bad_rows import MAX_LINE, short


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_can_be_printed(text: str) -> None:
    for shown in (one_line(text), str(UserError(text))):
        assert shown.isprintable()
        shown.encode()


@given(st.text(max_size=400), st.text(max_size=400), st.integers(1, 10**9))
def test_a_line_is_short_and_keeps_its_end(file: str, reason: str, count: int) -> None:
    said: list[str] = []
    bad = BadRows(count + 1, say=said.append)
    bad.count = count
    bad(BadRow(f"data: '{file}' line 3 {reason}"))
    (line,) = said
    assert len(line) <= MAX_LINE
    assert line.isprintable()
    assert line.endswith(f"; passed over ({count + 1} of at most {count + 1})")


def test_a_long_name_loses_its_beginning_first() -> None:
    line = short(f"data: '/{'folder/' * 40}file.jsonl' line 3 is not JSON", "; passed over")
    assert line.endswith("/file.jsonl' line 3 is not JSON; passed over")
    assert line.startswith("data: '...")
