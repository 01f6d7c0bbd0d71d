"""Which checkpoints a run's folder holds, and which rows its metrics."""

import json
from pathlib import Path

import pytest

from bytelatent.files import MANIFEST, whole_folder
from bytelatent.run_folder import NoCheckpoint, checkpoints_of, newest_checkpoint, read_metrics, row_in


def write_checkpoint(run: Path, name: str) -> Path:
    folder = run / "checkpoints" / name
    with whole_folder(folder) as aside:
        (aside / "name").write_text(name)
    return folder


def test_newest_checkpoint_skips_corrupt_ones(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match=r"'.*nowhere' has no checkpoint yet") as none:
        newest_checkpoint(tmp_path / "nowhere")
    assert none.value.corrupt == []
    folders = [write_checkpoint(tmp_path, f"step-{step:08d}") for step in range(4)]
    (tmp_path / "checkpoints" / ".step-00000009.1.part").mkdir()  # what a killed process leaves
    (tmp_path / "checkpoints" / "step-00000008").write_text("a file")
    assert newest_checkpoint(tmp_path) == (folders[3], [])
    (folders[3] / "name").unlink()
    (folders[2] / MANIFEST).unlink()
    found, corrupt = newest_checkpoint(tmp_path)
    assert found == folders[1]
    assert corrupt == [
        f"'{folders[3]}' is corrupt (name is missing); skipped",
        f"'{folders[2]}' is corrupt ({MANIFEST} is missing); skipped",
    ]
    for folder in folders:
        (folder / MANIFEST).write_text(json.dumps({"files": {"nothing": [0, ""]}}))
    with pytest.raises(NoCheckpoint, match=r"no checkpoint of .* is whole: .*; remove them to start again") as none:
        newest_checkpoint(tmp_path)
    assert len(none.value.corrupt) == 4


@pytest.mark.parametrize(
    "name", ["step-best", "step-00000080.bak", "step-00000080_best", "step-", "old", "xstep-00000099"]
)
def test_a_folder_of_another_program_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    newest = write_checkpoint(tmp_path, "step-00000080")
    write_checkpoint(tmp_path, name)
    assert newest_checkpoint(tmp_path) == (newest, [])
    assert checkpoints_of(tmp_path) == {80: newest}


def test_a_link_by_another_name_is_no_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "step-00000005")
    newest = write_checkpoint(tmp_path, "step-00000010")
    (tmp_path / "checkpoints" / "step-latest").symlink_to("step-00000005")
    assert newest_checkpoint(tmp_path) == (newest, [])


def test_checkpoints_are_in_order_of_steps(tmp_path: Path) -> None:
    for step in (100_000_000, 99_999_999, 5):
        write_checkpoint(tmp_path, f"step-{step:08d}")
    assert list(checkpoints_of(tmp_path)) == [5, 99_999_999, 100_000_000]
    assert newest_checkpoint(tmp_path)[0].name == "step-100000000"


STRANGE = [
    b'{"step": 7, "bits',
    b'{"note": "hi"}',
    b'{"step": "7"}',
    b"[1]",
    b"7",
    b"\xff\xfe",
    b"\0\0",
    b"[" * 100_000,
]


@pytest.mark.parametrize("line", STRANGE, ids=lambda line: repr(line[:20]))
def test_a_line_without_a_row_costs_no_other(tmp_path: Path, line: bytes) -> None:
    assert row_in(line) is None
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2, "x": 0.5}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "x": 0.5}]
