"""What cannot be downloaded, and what is said then."""

import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from bytelatent.errors import UserError
from bytelatent.files import own_file
from bytelatent.hub import is_repository_name, model_exists, repository, transfer
from bytelatent.hub.repository import part_of
from tests.hub.model_folders import (
    BIG,
    MODEL,
    NAME,
    error_of,
    files_asked_for,
    get,
    head,
    place,
    told_by,
    visible,
    without_weights,
    write,
)
from tests.hub_server import HubServer


def test_bytes_that_are_not_as_listed(server: HubServer, tmp_path: Path) -> None:
    """A file of the right size with other bytes is not kept, under no name."""
    server.repositories["model", NAME].listed_digests["model.safetensors"] = "0" * 64
    assert "'model.safetensors' came with other bytes than the hub lists" in error_of()
    folder = place(tmp_path) / "snapshots" / head(server)
    assert not (folder / "model.safetensors").exists()
    assert part_of(folder / "model.safetensors").stat().st_size == 0
    assert "does not hold all of" in error_of(local_files_only=True)
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.snapshot_download(NAME, local_files_only=True)


def test_a_size_that_is_not_as_listed(server: HubServer) -> None:
    server.repositories["model", NAME].listed_sizes["config.json"] = 5
    assert "'config.json' is 2 bytes, but 5 are listed" in error_of()


def test_gated(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["model", NAME].readers = {"hf_good"}
    server.repositories["model", NAME].redirects = True  # the storage refuses whoever shows it a key
    assert error_of() == (
        f"{NAME} needs access: open https://huggingface.co/{NAME}, accept the terms, "
        "then pass token=..., set HF_TOKEN, or run: hf auth login"
    )
    message = error_of(token="hf_other")
    assert message == (
        f"{NAME} needs access that your key does not have: open https://huggingface.co/{NAME}, accept the terms"
    )
    assert model_exists(NAME)
    assert visible(get(token="hf_good", weights=False)) == without_weights()
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert visible(get()) == MODEL


def test_missing_and_private(server: HubServer) -> None:
    message = error_of("someone/else")
    assert "there is no model 'someone/else' on the hub, or it is private" in message
    assert "token=..." in message
    assert not model_exists("someone/else")
    server.repositories["model", NAME].private = True
    server.repositories["model", NAME].readers = {"hf_good"}
    assert "or it is private" in error_of()
    assert not model_exists(NAME)
    assert model_exists(NAME, token="hf_good")
    assert visible(get(token="hf_good")) == MODEL


def test_whether_a_model_exists(server: HubServer) -> None:
    assert model_exists(NAME)
    assert not model_exists(NAME, local_files_only=True)
    get(weights=False)
    server.requests.clear()
    assert model_exists(NAME, local_files_only=True)
    assert not server.requests
    server.fail(401, times=1, url="/api/")
    server.fail(403, times=1, url="/api/")
    for _ in range(2):
        with pytest.raises(UserError):
            model_exists("someone/blt-entropy", token="hf_bad")
    server.close()
    assert model_exists(NAME)
    with pytest.raises(UserError, match="cannot be reached"):
        model_exists("someone/blt-entropy")


def test_a_repository_that_is_no_model(server: HubServer, tmp_path: Path) -> None:
    server.add("someone/pictures", write(tmp_path / "pictures", {"a.png": b"", "b.bin": b""}), kind="model")
    assert "someone/pictures holds no model at 'main'; it has a.png, b.bin" in error_of("someone/pictures")


def test_no_room(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Free:
        free = len(BIG) - 1

    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: Free)
    assert "make room or set HF_HUB_CACHE to another folder" in error_of()
    assert files_asked_for(server) == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(place(tmp_path) / "snapshots" / head(server) / "model.safetensors")
    part.parent.mkdir(parents=True)
    part.touch()
    monkeypatch.setattr(
        repository, "own_file", lambda path, flags: own_file("/dev/full" if str(path) == str(part) else path, flags)
    )
    assert "the disk is full" in error_of()


def test_a_part_that_is_a_link(server: HubServer, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    part = part_of(place(tmp_path) / "snapshots" / head(server) / "model.safetensors")
    part.parent.mkdir(parents=True)
    part.symlink_to(victim)
    assert f"'{part}' is a link, and would be written through; remove it" in error_of()
    assert victim.read_text() == "mine"


def test_a_cache_that_cannot_be_written(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    message = error_of()
    assert f"'{tmp_path / 'hub'}" in message
    assert "cannot be written" in message
    assert "set HF_HUB_CACHE to another folder" in message


def test_a_cache_that_is_only_read(server: HubServer, tmp_path: Path) -> None:
    """Where nothing is missing nothing must be written; where a card is, the model will do."""
    theirs = Path(huggingface_hub.snapshot_download(NAME, allow_patterns=["config.json", "*.safetensors"]))
    shutil.rmtree(tmp_path / "hub" / ".locks")
    (tmp_path / "hub" / ".locks").write_text("in the way")
    [line] = told_by()
    assert "cannot be written; what the cache has is used" in line
    write(theirs, MODEL)
    assert told_by() == []


def test_names() -> None:
    for name in ("facebook/blt-1b", "a/b", "some_one/name.v1.0", "_/x", "9/9"):
        assert is_repository_name(name)
        validate_repo_id(name)
    for name in ("", "a", "a/", "/a", "/a/b", "./a", "../a", "~/a", "a/b/c", ".a/b", "a/.b", "a/b.git", "a/b--c"):
        assert not is_repository_name(name)
    for name in ("a/b..c", "a/b c", "a/é", "hf://a/b", "a\\b/c", "a/b\n", "-a/b", "a/b-", "a/" + "b" * 95):
        assert not is_repository_name(name)
        assert "is no name of a model on the hub; write OWNER/NAME" in error_of(name)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'bytelatent[hf]'" in error_of()
