"""Folders with what real ones hold: what is said of it."""

import os
import re
from pathlib import Path

import pytest

from bytelatent.errors import UserError
from bytelatent.text import find_files
from bytelatent.text.documents import MAX_LINE
from tests.text.test_every_reader import folder_of_everything
from tests.text.text_files import logged


def test_what_is_passed_over_is_said_in_a_line_of_each_kind(tmp_path: Path) -> None:
    place = folder_of_everything(tmp_path)
    with logged() as said:
        found = find_files(str(place))
    assert [Path(file).relative_to(place).as_posix() for file in found] == [
        "a.txt",
        os.fsdecode(b"caf\xe9.txt"),
        "inner/b.jsonl",
        "link/c.txt",
    ]
    links, *others = said
    assert "2 passed over, a link to a folder that is read already: '" in links
    assert sum(int(re.search(r": (\d+) of 11 files passed over, ", line)[1]) for line in others) == 7  # type: ignore[index]
    assert all(len(line) <= MAX_LINE and line.isprintable() for line in said)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in (tmp_path / "pipe.jsonl", Path("/dev/zero")):
        with pytest.raises(UserError, match="a pipe or a device"):
            find_files(str(name))
    with pytest.raises(UserError, match=r"none of the 1 files of .* is text"):
        find_files(str(tmp_path))


def test_a_folder_keeps_its_own_name_beside_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("a")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert find_files(str(tmp_path)) == [str(tmp_path / "b" / "a.txt")]
    assert find_files(str(tmp_path / "*" / "*.txt")) == [str(tmp_path / "b" / "a.txt")]
