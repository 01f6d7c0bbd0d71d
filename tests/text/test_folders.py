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


def test_a_file_of_several_names_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("no text of this folder's own")
    place = Path("text")  # a short name, so that the line has room for others
    place.mkdir()
    (place / "b.txt").write_text("b")
    (place / "copy.txt").write_text("b")  # the same text, which is no link
    (place / "a link.txt").symlink_to("b.txt")
    os.link(place / "b.txt", place / "c, hard.txt")
    (place / "outside.txt").symlink_to(tmp_path / "elsewhere")
    (place / "outside again.txt").symlink_to(tmp_path / "elsewhere")
    for source in (place, place / "*.txt"):
        with logged() as said:
            found = find_files(str(source))
        assert [Path(file).name for file in found] == ["b.txt", "copy.txt", "outside again.txt"]
        [line] = said
        assert f"data: '{source}': 3 passed over, a link to a file that is read already: '" in line
        names = ("a link.txt'", "c, hard.txt'", "outside.txt'")
        assert all(name in line for name in (names if source == place else names[:1]))


def test_a_file_named_as_a_pattern_is_that_file(tmp_path: Path) -> None:
    for name in ("*.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert find_files(str(tmp_path / "*.txt")) == [str(tmp_path / "*.txt")]
    assert find_files(str(tmp_path / "[*].txt")) == [str(tmp_path / "*.txt")]
    assert find_files(str(tmp_path / "*.tx[t]")) == [str(tmp_path / name) for name in ("*.txt", "a.txt")]
