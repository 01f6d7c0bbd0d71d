"""Files and folders that appear whole or not at all."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bytelatent import files
from bytelatent.errors import UserError
from bytelatent.files import (
    MANIFEST,
    find_corruption,
    growing_file,
    only_writer,
    partial_path,
    remove_unfinished,
    whole_file,
    whole_folder,
)


def everything(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder, hidden too."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def write_folder(place: Path, **texts: str) -> Path:
    with whole_folder(place) as aside:
        for name, text in texts.items():
            (aside / name).write_text(text)
        (aside / "inner").mkdir()
        (aside / "inner" / "deep").write_text("deep")
    return place


def test_file(tmp_path: Path) -> None:
    place = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with whole_file(place) as aside:
            aside.write_text(text)
            assert everything(tmp_path).get("new/a.txt") == (None if text == "one" else b"one")
        assert everything(tmp_path) == {"new/a.txt": text.encode()}


def test_folder(tmp_path: Path) -> None:
    place = tmp_path / "new" / "a"
    for name in ("one", "two"):
        write_folder(place, **{name: name})
        assert set(everything(tmp_path)) == {f"new/a/{n}" for n in (name, "inner/deep", MANIFEST)}
        assert set(os.listdir(tmp_path / "new")) == {"a"}
        assert find_corruption(place) is None


def write_half(write, place: Path, error: BaseException) -> None:
    with write(place) as aside:
        (aside / "name" if write is whole_folder else aside).write_text("half")
        raise error


class Stopped(BaseException):
    """As a keyboard interrupt."""


@pytest.mark.parametrize("error", [ValueError("x"), Stopped()])
@pytest.mark.parametrize("exists", [True, False])
def test_an_error_inside_leaves_all_as_it_was(error: BaseException, exists: bool, tmp_path: Path) -> None:
    if exists:
        (tmp_path / "a.txt").write_text("old")
        write_folder(tmp_path / "a", name="old")
    before = everything(tmp_path)
    for write, place in ((whole_file, tmp_path / "a.txt"), (whole_folder, tmp_path / "a")):
        with pytest.raises(type(error)):
            write_half(write, place, error)
    assert everything(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == (2 if exists else 0)


# A system's error comes as it is out of Python, and dressed up out of safetensors; torch.save does not name it at all.
FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    shutil.Error([(f"from/{n}", f"to/{n}", f"[Errno 28] No space left on device: 'from/{n}'") for n in range(999)]),
]


@pytest.mark.parametrize("error", FULL, ids=["disk", "quota", "RuntimeError", "shutil.Error"])
@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_full_disk(write, error: Exception, tmp_path: Path) -> None:
    place = tmp_path / "a"
    with write(place) as aside:
        (aside / "f" if write is whole_folder else aside).write_text("old")
    before = everything(tmp_path)
    with pytest.raises(UserError, match=f"the disk is full: '{place}' was not written"):
        write_half(write, place, error)
    assert everything(tmp_path) == before


def test_a_tree_that_cannot_be_copied_is_a_short_line(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for name in range(999):
        (tmp_path / "tree" / str(name)).symlink_to("nowhere")
    no_such_file = pytest.raises(UserError, match=r"a' cannot be written: .*No such file or directory")
    with no_such_file as caught, whole_folder(tmp_path / "a") as aside:
        shutil.copytree(tmp_path / "tree", aside / "tree")
    assert len(str(caught.value)) < 500


def test_full_disk_that_the_error_does_not_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        with whole_folder(tmp_path / "a"):
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(RuntimeError, match="unexpected pos"):
        write()
    monkeypatch.setattr("bytelatent.files.SCANT_BYTES", 2**62)  # as though nothing were left
    with pytest.raises(UserError, match="the disk is full"):
        write()
    with pytest.raises(UserError, match="the user's own"), whole_folder(tmp_path / "a"):
        raise UserError("the user's own")


def test_full_disk_while_the_manifest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_folder(tmp_path / "a", name="old")
    before = everything(tmp_path)

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bytelatent.files.json.dumps", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_folder(place, name="new")
    assert everything(tmp_path) == before


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_folder(tmp_path / "a", name="old")
    before, replace = everything(tmp_path), os.replace

    def fails(source: Path, target: Path) -> None:
        if str(source).endswith(".part"):
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr("bytelatent.files.os.replace", fails)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        write_folder(place, name="new")
    assert everything(tmp_path) == before


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        write_folder(tmp_path / "a")
    with pytest.raises(UserError, match="cannot be written"), whole_file(tmp_path / "a" / "b") as aside:
        aside.write_text("x")
    assert everything(tmp_path) == {"a": b"a file"}


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda f: (f / "name").write_bytes(b"ol"), "name is not as it was written"),
        (lambda f: (f / "name").write_bytes(b"odl"), "name is not as it was written"),
        (lambda f: (f / "name").write_bytes(b""), "name is not as it was written"),
        (lambda f: (f / "name").unlink(), "name is missing"),
        (lambda f: (f / "inner" / "deep").unlink(), "inner/deep is missing"),
        (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST} is missing"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"name"'), f"{MANIFEST} is corrupt"),
        (lambda f: (f / MANIFEST).write_text("[]"), f"{MANIFEST} is corrupt"),
        (lambda f: (f / MANIFEST).write_text('{"files": 3}'), f"{MANIFEST} is corrupt"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), f"{MANIFEST} is corrupt"),
        (lambda f: (f / "another").write_text("is no harm"), None),
    ],
)
def test_find_corruption(change, shown: str | None, tmp_path: Path) -> None:
    place = write_folder(tmp_path / "a", name="old")
    assert find_corruption(place) is None
    change(place)
    assert find_corruption(place) == shown


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with only_writer(tmp_path / "run"):
        with pytest.raises(UserError, match="another process"), only_writer(tmp_path / "run"):
            pass
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "run"):
        pass


def test_a_growing_file_is_one_writers_until_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, replace, refusals = tmp_path / "out", os.replace, []

    def meanwhile(part: Path, path: Path) -> None:
        with pytest.raises(UserError, match="is being written by another process") as refused, growing_file(out):
            pass
        refusals.append(refused)
        replace(part, path)

    monkeypatch.setattr(os, "replace", meanwhile)
    with growing_file(out) as file:
        file.write(b"one\n")
    assert len(refusals) == 1
    assert everything(tmp_path) == {"out": b"one\n"}


@pytest.mark.parametrize("take_away", [lambda part: os.replace(part, part.with_name("out")), os.unlink])
def test_a_growing_file_that_another_writer_took_away_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, take_away: Callable[[Path], None]
) -> None:
    """Between opening and locking it."""
    out, lock, calls = tmp_path / "out", files._lock, []
    partial_path(out).write_bytes(b"theirs\n")

    def late(file: object) -> bool:
        if not calls:
            take_away(partial_path(out))
        calls.append(file)
        return lock(file)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "_lock", late)
    with growing_file(out) as file:
        file.write(b"ours\n")
    assert len(calls) == 2
    assert everything(tmp_path) == {"out": b"ours\n"}


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """But nothing that a living process writes, or beside another folder."""
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    places = [tmp_path / f".{name}.part" for name in (f"a.{killed.pid}", f"a.{os.getppid()}", f"b.{killed.pid}")]
    for place in places:
        place.mkdir()
    remove_unfinished(tmp_path / "a")
    assert [place.exists() for place in places] == [False, True, True]
