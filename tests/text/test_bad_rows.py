"""Lines about bad rows: short, and such that any terminal can print them."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from bytelatent.errors import UserError
from bytelatent.terminal import one_line
from bytelatent.text import BadRow, BadRows
from bytelatent.text.documents import MAX_LINE, RowTooLong, forget_logged, short
from tests.text.text_files import logged


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_can_be_printed(text: str) -> None:
    for shown in (one_line(text), str(UserError(text))):
        assert shown.isprintable()
        shown.encode()


@given(st.text(max_size=400), st.text(max_size=400), st.integers(1, 10**9))
def test_a_line_is_short_and_keeps_its_end(file: str, reason: str, count: int) -> None:
    bad = BadRows(count + 1)
    bad.count = count
    with logged() as said:
        bad(BadRow(file, reason, "line 3"))
    (line,) = said
    assert len(line) <= MAX_LINE
    assert line.isprintable()
    assert line.endswith(f"; passed over ({count + 1} of at most {count + 1})")


def test_a_long_name_loses_its_beginning_first() -> None:
    line = short(f"data: '/{'folder/' * 40}file.jsonl' line 3 is not JSON", "; passed over")
    assert line.endswith("/file.jsonl' line 3 is not JSON; passed over")
    assert line.startswith("data: '...")


def test_fields_survive_another_process() -> None:
    error = pickle.loads(pickle.dumps(RowTooLong("a.jsonl", "is longer\nthan allowed", "line 3", 2)))
    assert isinstance(error, RowTooLong)
    assert (error.file, error.where, error.row) == ("a.jsonl", "line 3", 2)
    assert str(error) == "data: 'a.jsonl' line 3 is longer than allowed"
    assert error.line == "'a.jsonl' line 3 is longer than allowed"


def test_a_bad_row_is_logged_once_in_a_run() -> None:
    with logged() as said:
        for _ in range(2):
            BadRows(1)(BadRow("a.jsonl", "is not JSON", "line 3"))
        forget_logged()
        BadRows(1)(BadRow("a.jsonl", "is not JSON", "line 3"))
    assert said == ["data: 'a.jsonl' line 3 is not JSON; passed over (1 of at most 1)"] * 2
