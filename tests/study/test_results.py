"""Rows of a study: written whole, read back as they are, and refused where they are wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from bytelatent.errors import UserError
from bytelatent.study import StudyRow, read_rows, write_row


def a_row(**changes: Any) -> StudyRow:
    values: dict[str, Any] = {
        "name": "space-1e16-0",
        "family": "space",
        "label": "BLT, space",
        "budget": 1e16,
        "seed": 0,
        "kind": "blt",
        "settings": {"steps": 10},
        "parameters": {"local encoder": 100, "output": 20},
        "table_parameters": 1000,
        "table_bytes": 4000,
        "steps": 10,
        "batch_bytes": 100.0,
        "bytes_read": 1000,
        "epochs": 0.5,
        "mean_patch_bytes": 4.5,
        "context_bytes": 1500.0,
        "training_flops_per_byte": {"local encoder": 9e12, "output": 1e12},
        "training_flops": 1e16,
        "inference_flops_per_byte": 3.3e12,
        "seconds": 12.5,
        "bytes_per_second": 80.0,
        "held_out": {"bits_per_byte": 1.1, "bytes": 90, "by_category": {"code": {"bits_per_byte": 0.9, "bytes": 40}}},
        "tuning": {"bits_per_byte": 1.2, "bytes": 80},
        "curve": [{"training_flops": 1e15, "seconds": 1.0, "bits_per_byte": 2.5}],
        "device": "cpu",
        "versions": {"torch": "2.11", "bytelatent": "1"},
        "date": "2026-11-30",
    }
    return StudyRow.parse(values | changes)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [a_row(), a_row(name="space-1e16-1", seed=1, held_out=None, bytes_per_second=None)]
    paths = [write_row(tmp_path, row) for row in reversed(rows)]
    assert read_rows([tmp_path]) == rows == read_rows([tmp_path / "rows"]) == read_rows([*paths, tmp_path])
    assert rows[0].num_parameters == 120
    assert sorted(path.name for path in (tmp_path / "rows").iterdir()) == ["space-1e16-0.json", "space-1e16-1.json"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tuning": {"bits_per_byte": float("nan"), "bytes": 3}}, "tuning.bits_per_byte: Input should be a finite"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1, not 0"),
        ({"famly": "x"}, "famly: unknown key; did you mean 'family'?"),
        ({"kind": "rnn"}, "kind: Input should be 'blt', 'byte_lm' or 'token_lm', not 'rnn'"),
        ({"name": "a/b"}, "name: 'a/b' is no name of a run"),
        ({"name": "other"}, "is the row of 'other'; rename it to other.json, or remove it"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    path = write_row(tmp_path, a_row())
    path.write_text(json.dumps(a_row().plain() | changes))
    with pytest.raises(UserError) as error:
        read_rows([tmp_path])
    assert str(error.value).startswith(f"'{path}'")
    assert line in str(error.value)


def test_no_rows_cut_rows_and_twins_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no rows of a study"):
        read_rows([tmp_path])
    path = write_row(tmp_path, a_row())
    twin = write_row(tmp_path / "other", a_row())
    with pytest.raises(UserError, match="are both rows of 'space-1e16-0'"):
        read_rows([tmp_path, tmp_path / "other"])
    twin.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="it is not JSON"):
        read_rows([tmp_path / "other"])
